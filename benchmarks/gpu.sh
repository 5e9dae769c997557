#!/usr/bin/env bash
# Test and time every op on a machine with a GPU; needs no network, but torch, Triton, pip and setuptools >= 77.
# The stages of csrc/ need nvcc, ninja and pybind11, the sanitize-* ones compute-sanitizer.
#
#   benchmarks/gpu.sh --seconds N --out DIR [--dry-run] [--stages FILE]
#
# Runs the stages of the plan that fit into N seconds, each under its own limit.  A second call with
# the same DIR goes on: stages that passed are skipped, stages never tried come before stages that
# failed, benchmarks keep the cases they have.  A change of the source starts over.  DIR gets eight
# files at most.  Exits with 0 when every stage passed; a stage that was not run has not passed.
#
# --dry-run   print the plan and what would run, and touch nothing
# --stages    another plan; one stage a line: name | seconds it needs | seconds it may take | command
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# Tests of several processes, test_vocab_parallel*.py and test_attention_sharded.py, are in no stage:
# their processes have CPU tensors alone, and what they would show here they show without a GPU.
# [!sw] leaves out those and attention_with_kv_cache, which has a stage of its own.
plan() {
  cat <<'PLAN'
self-test                    |  30 | 180 | run_self_test
build-cuda                   |  60 | 400 | run_build_cuda
test-cross_entropy           |  60 | 240 | run_tests tests/test_cross_entropy*.py
test-attention               |  60 | 360 | run_tests tests/test_attention.py tests/test_attention_[!sw]*.py tests/test_packing.py
test-gluon                   |  60 | 240 | run_hopper_tests
test-attention_with_kv_cache |  60 | 240 | run_tests tests/test_attention_with_kv_cache*.py tests/test_kv_cache.py
test-generate                |  60 | 240 | run_tests tests/test_generat*.py tests/test_paged_kv_cache.py tests/test_sampling.py
test-linear_cross_entropy    |  60 | 300 | run_tests tests/test_linear_cross_entropy*.py
test-loss                    |  60 | 300 | run_tests tests/test_loss*.py tests/test_linear_top_k*.py
test-layers                  |  60 | 240 | run_tests tests/test_rms_norm.py tests/test_rotary.py tests/test_glu.py tests/test_layers*.py
test-compat                  |  60 | 240 | run_tests tests/test_compat*.py
test-cuda                    |  60 | 300 | run_cuda_tests tests/test_cross_entropy.py tests/test_linear_cross_entropy*.py tests/test_loss_options.py tests/test_rms_norm.py tests/test_rotary.py tests/test_glu.py
test-ahead_of_time           |  60 | 300 | run_tests tests/test_ahead_of_time.py
time-attention               | 150 | 580 | run_benchmark attention
time-attention_options       | 150 | 580 | run_benchmark attention_options
time-attention_with_kv_cache | 100 | 400 | run_benchmark attention_with_kv_cache
time-cross_entropy           | 120 | 400 | run_benchmark cross_entropy
time-linear_cross_entropy    | 150 | 580 | run_benchmark linear_cross_entropy
time-pointwise               | 100 | 400 | run_benchmark rms_norm apply_rotary glu
time-decode                  | 150 | 400 | run_decode
sanitize-memcheck            |  60 | 400 | run_sanitizer memcheck
sanitize-racecheck           |  60 | 300 | run_sanitizer racecheck small
sanitize-synccheck           |  60 | 300 | run_sanitizer synccheck small
PLAN
}

run_self_test() {
  # doctor, except that packages which only the command line needs may be missing
  "$python" -P -c '
from fastlm.cli.doctor import described, examine
report = examine()
print(described(report))
raise SystemExit(any(row["result"] == "wrong" for row in report["self_test"]))'
}

run_tests() {
  # Exit code 77 means: could not be run here, for the reason printed last.
  "$python" -c 'import pytest, hypothesis' || { echo "pytest or hypothesis is missing"; exit 77; }
  # -W default: another torch warns of other things
  "$python" -P -m pytest -W default -m "not slow" -p no:cacheprovider "$@"
}

run_build_cuda() {
  # For the GPU at hand, in a folder where a later call goes on; every later stage finds it.
  command -v nvcc >/dev/null || [ -n "${CUDA_HOME:-}" ] || { echo "nvcc is missing"; exit 77; }
  command -v ninja >/dev/null || { echo "ninja is missing"; exit 77; }
  "$python" -c 'import pybind11' || { echo "pybind11 is missing"; exit 77; }
  archs=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major == 9 else ""))')
  rm -f fastlm/_C.*.so
  FASTLM_CUDA_FLOAT64=1 "$python" -P csrc/build.py build/cuda --archs "$archs"
  cp build/cuda/_C.*.so fastlm/
  "$python" -P -c 'from fastlm.ops.cuda._extension import description; print(description())'
}

run_cuda_tests() {
  "$python" -P -c 'from fastlm.ops.cuda._extension import extension
if isinstance(reason := extension(), str):
    print(reason)
    raise SystemExit(77)' || exit $?
  run_tests -k cuda "$@"
}

run_hopper_tests() {
  "$python" -c 'import torch
if torch.cuda.get_device_capability() != (9, 0):
    print("the Gluon kernels are for sm_90")
    raise SystemExit(77)' || exit $?
  run_tests tests/on_hopper.py
}

# The programs that check kernels without torch, built by nvcc, under a tool of compute-sanitizer.
run_sanitizer() {
  local tool=$1 nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc source name
  shift
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing"; exit 77; }
  ls build/cuda/_C.*.so >/dev/null 2>&1 || { echo "the kernels of csrc/ are not built"; exit 77; }
  for source in tests/cuda_host/check_*.cpp; do
    name=$(basename "$source" .cpp)
    "$nvcc" -std=c++17 -arch=native -DFASTLM_WITH_FLOAT64 -Xcompiler -fPIC -I csrc \
      -I tests/cuda_host -x cu -c "$source" -o "build/cuda/$name.o"
    "$nvcc" -arch=native -cudart static -o "build/cuda/$name" \
      "build/cuda/$name.o" "build/cuda/${name#check_}"*.o
    compute-sanitizer --tool "$tool" --error-exitcode 1 "build/cuda/$name" "$@"
  done
}

run_benchmark() {
  # one file for all ops, and one archive beside it with the milliseconds of every call
  "$python" benchmarks/run.py "$@" --suite gpu --json "$out/gpu.json" \
    --seconds "$((limit - 40))" $fresh
}

run_decode() {
  # transformers may be missing
  "$python" -c 'import transformers' 2>/dev/null && peers= || peers="--only gpt-fast fastlm fastlm.ragged fastlm.int8"
  "$python" benchmarks/decode.py --device cuda $peers --json "$out/decode.json"
}

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }

seconds='' out='' dry_run='' stages=''
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:-} ; shift 2 || usage ;;
    --out) out=${2:-} ; shift 2 || usage ;;
    --stages) stages=${2:-} ; shift 2 || usage ;;
    --dry-run) dry_run=yes ; shift ;;
    *) usage ;;
  esac
done
[[ $seconds =~ ^[0-9]+$ && -n $out ]] || usage

# name -> the words of its line in the plan, and what became of it
declare -a names=()
declare -A needs=() limits=() commands=() status=() took=() note=()
trim() { sed 's/^ *//; s/ *$//' <<<"$1"; }
while IFS='|' read -r name need limit command; do
  [ -n "$(trim "$name")" ] || continue
  name=$(trim "$name")
  names+=("$name")
  needs[$name]=$(trim "$need") limits[$name]=$(trim "$limit") commands[$name]=$(trim "$command")
  status[$name]='not run' took[$name]=0 note[$name]='not reached'
done < <(if [ -n "$stages" ]; then cat "$stages"; else plan; fi)

source_hash() {
  if [ -n "$stages" ]; then cat "$stages"; else
    find fastlm kernels csrc benchmarks tests -regex '.*\.\(py\|cuh?\|cpp\|h\)' -print0 |
      sort -z | xargs -0 cat benchmarks/gpu.sh
  fi | sha256sum | cut -c1-16
}
source=$(source_hash)

# What an earlier call left, if it ran this very source.
resumed=no
if [ -f "$out/stages.tsv" ] && [ "$(head -1 "$out/stages.tsv")" = "source $source" ]; then
  resumed=yes
  while IFS=$'\t' read -r name was spent why; do
    [ -n "${status[$name]:-}" ] && status[$name]=$was took[$name]=$spent note[$name]=$why
  done < <(tail -n +2 "$out/stages.tsv")
fi

# Never tried first, then those that failed; what passed is done.
pending() {
  local name
  for name in "${names[@]}"; do [ "${status[$name]}" = 'not run' ] && echo "$name"; done
  for name in "${names[@]}"; do [[ ${status[$name]} =~ ^(failed|timed\ out)$ ]] && echo "$name"; done
  true
}

if [ -n "$dry_run" ]; then
  echo "source $source, resumed: $resumed, budget $seconds s"
  left=$seconds
  for name in $(pending); do
    if [ "$left" -lt "${needs[$name]}" ]; then verdict="does not fit any more"; else verdict="runs"; fi
    printf '%-28s %-22s needs %4s s, may take %4s s: %s\n' \
      "$name" "$verdict" "${needs[$name]}" "${limits[$name]}" "${commands[$name]}"
    [ "$verdict" = runs ] && left=$((left - needs[$name]))
  done
  for name in "${names[@]}"; do [ "${status[$name]}" = passed ] && echo "$name passed before"; done
  exit 0
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
[ "$resumed" = yes ] || : >"$log"

save() {
  local name
  {
    echo "source $source"
    for name in "${names[@]}"; do
      printf '%s\t%s\t%s\t%s\n' "$name" "${status[$name]}" "${took[$name]}" "${note[$name]}"
    done
  } >"$out/stages.tsv"
}

# Everything that runs sees the package through an editable install, which needs no network.
if [ -z "$stages" ]; then
  {
    nvidia-smi || echo "nvidia-smi is missing"
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e . &&
      "$python" -P -c 'import sys, torch, triton, fastlm.functional
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name())'
  } 2>&1 | tee -a "$log" || { echo "the package cannot be installed and imported here" >&2; exit 1; }
fi

reserve=15 # for the table
for name in $(pending); do
  left=$((seconds - SECONDS - reserve))
  if [ "$left" -lt "${needs[$name]}" ]; then
    [ "${status[$name]}" = 'not run' ] && note[$name]="needs ${needs[$name]} s, ${left} s were left"
    continue
  fi
  limit=$((left < limits[$name] ? left : limits[$name]))
  fresh=''
  [ "${status[$name]}" = 'not run' ] && fresh=--fresh
  echo "== $name, at most $limit s" | tee -a "$log"
  # so that a call cut off from outside is taken up here as a stage that ran out of time
  status[$name]='timed out' note[$name]='the call was cut off'
  save
  begun=$SECONDS code=0
  export python out limit fresh
  export -f run_self_test run_build_cuda run_tests run_cuda_tests run_hopper_tests run_sanitizer run_benchmark run_decode
  timeout --kill-after=10 "$limit" bash -euc "${commands[$name]}" 2>&1 | tee -a "$log" || code=$?
  took[$name]=$((SECONDS - begun))
  last=$(tail -n 1 "$log" | tr '\t' ' ' | cut -c1-100)
  case $code in
    0) status[$name]=passed note[$name]=$last ;;
    77) status[$name]='not run' note[$name]=$last ;;
    124 | 137) status[$name]='timed out' note[$name]="after $limit s" ;;
    *) status[$name]=failed note[$name]="exit code $code: $last" ;;
  esac
  save
done
save
rm -f "$out"/*.part

draw_report() {
  # of its pictures, which would be many files, the page has copies
  local pictures
  pictures=$(mktemp -d)
  "$python" benchmarks/run.py --show "$out" --plot "$pictures" &&
    cp "$pictures/report.html" "$out/report.html"
  rm -rf "$pictures"
}

{
  [ -n "$stages" ] || draw_report || true
  printf '\n%-28s %-10s %7s  %s\n' stage result seconds note
  for name in "${names[@]}"; do
    printf '%-28s %-10s %7s  %s\n' "$name" "${status[$name]}" "${took[$name]}" "${note[$name]}"
  done
} | tee -a "$out/log.txt"
for name in "${names[@]}"; do [ "${status[$name]}" = passed ] || exit 1; done
