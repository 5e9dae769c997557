"""Bugs planted in the CUDA C++ kernels over a cache: each, compiled and run on a CPU, must fail."""

from __future__ import annotations

import dataclasses

import pytest
import test_cuda_attention_with_kv_cache as of_cuda
import torch
from support.cuda_host import (
    host_library,
    in_place_of_the_extension,
    killed,
    loaded,
    mutated,
    program,
    run,
)
from support.interpreter import interpreted_only
from support.kv_cache import call, judge, small_splits
from support.memory import in_child
from support.mutants import Mutant

pytestmark = interpreted_only

KERNEL = "csrc/attention_with_kv_cache.cuh"
APPEND = "csrc/kv_cache_append.cuh"
CACHE = "csrc/kv_cache.cuh"
MUTANTS = [
    Mutant("sums are not rescaled", KERNEL, "sums[pair][i] *= factor;", "(void)factor;"),
    Mutant("tiles are not waited for", KERNEL,
           "wait_for_copies<kStages - 1>();", "wait_for_copies<kStages>();"),
    Mutant("heads are dealt out", KERNEL, "const int first_heads = at.kv_head * in.group_size;",
           "const int first_heads = at.kv_head;"),
    Mutant("the ends are not aligned", KERNEL,
           "const int offset = row.length - row.queries.count;",
           "const int offset = row.length - 1;"),
    Mutant("a sink for every part", KERNEL, "options.sinks && at.part == 0", "options.sinks"),
    Mutant("keys beyond the part are seen", KERNEL,
           "const Visibility sees{row.queries.count, stored_end,",
           "const Visibility sees{row.queries.count, row.length,"),
    Mutant("a window hides too much", KERNEL, "first_query + offset + 1 - options.window",
           "first_query + offset + 9 - options.window"),
    Mutant("parts are not weighted", KERNEL, "out += power_of_two(lses[part] - pivot) * ",
           "out += "),
    Mutant("one part too few is put together", KERNEL,
           "for (int part = 0; part < division.count; ++part) total +=",
           "for (int part = 1; part < division.count; ++part) total +="),
    Mutant("the lse keeps its base", KERNEL, "(largest + binary_logarithm(total)) * kLn2<A>",
           "(largest + binary_logarithm(total))"),
    Mutant("warps are not put together", KERNEL, "sum = turn ? sum + sums[pair][i]",
           "sum = turn ? sums[pair][i]"),
    Mutant("the last channels of a row are left out", KERNEL,
           "first < bytes; first += kWarpSize * 16", "first + 16 < bytes; first += kWarpSize * 16"),
    Mutant("unaligned rows are copied whole", KERNEL,
           "reinterpret_cast<uintptr_t>(stored.elements) % 16 == 0 && is_whole(stored.dim)",
           "is_whole(16)"),
    Mutant("scores keep the scale of integers", KERNEL, "own[0][j] *= scale;", "(void)scale;"),
    Mutant("values keep it", KERNEL, "is_int8 ? p * scales", "is_int8 ? p + 0 * scales"),
    Mutant("integers are cut off", CACHE, "return rintf(x);", "return truncf(x);"),
    Mutant("128 parts", APPEND, "Larger()) / 127)", "Larger()) / 128)"),
    Mutant("a row that is not finite is a number", APPEND,
           "if (!is_finite) scale = NAN;", ""),
    Mutant("pages of new tokens are not looked at", APPEND,
           "pages_exist(in, row.row, 0, row.length)", "pages_exist(in, row.row, 0, row.start)"),
    Mutant("the first slot of a page", CACHE, "token = position % in.page_size;",
           "token = position;"),
    Mutant("one table for all rows", CACHE,
           "in.table[int64_t(number) * in.max_pages + position", "in.table[position"),
    Mutant("lengths below 0 count", CACHE, "start >= 0 && start", "start"),
    Mutant("the append may pass the end", CACHE, "in.capacity - added", "in.capacity"),
    Mutant("halves turn alike", CACHE, "(is_first ? -partner : partner) * sin", "partner * sin"),
    Mutant("offsets have 32 bits", CACHE,
           "return row * stored.row_stride + token * stored.token_stride + head",
           "return int(row * stored.row_stride) + int(token * stored.token_stride) + head"),
    Mutant("rows write over each other's parts", KERNEL,
           "if (plan.row_slots) return row.row * plan.row_slots;",
           "if (plan.row_slots) return 0;"),
    Mutant("queries of the first row for all", KERNEL,
           "(row.queries.first + own) * query.token_stride", "own * query.token_stride"),
]  # fmt: skip
# threads take turns, and none gets ahead of the others by two of them
UNSEEN = Mutant("the next tile overtakes", KERNEL,
                "sums[pair][i] += p[pair] * value[i];\n      }\n    __syncthreads();",
                "sums[pair][i] += p[pair] * value[i];\n      }")  # fmt: skip


def check() -> None:
    with small_splits():
        judge(call((37, 63, 5), 2, 4, 2, head_dim=8, rotary=6), "cuda")
        options = {"rotary": 8, "rotary_interleaved": True, "window_size": 20}
        sinks = torch.tensor([0.7, -1.2])
        judge(call((40,), 3, head_dim=8, sinks=sinks, softcap=2.0, **options), "cuda")
        judge(call((37, 20), 2, head_dim=8, value_dim=7, page_size=7, rotary=8), "cuda")
        judge(call((40,), 9, 2, head_dim=64, window_size=3), "cuda")
        # three tiles of a part
        judge(call((90,), 2, head_dim=8), "cuda", num_splits=1)
        judge(call((37, 20), 2, 4, 2, value_dim=32, page_size=7, int8=True), "cuda")
        judge(call((37, 5, 50), 20, 4, 1, head_dim=4).with_counts((4, 20, 16)), "cuda")
        judge(call((37, 50, 3), 20, 16, 1, head_dim=4).with_counts((1, 2, 20)), "cuda")
        one = call((0,), 1, head_dim=8, int8=True)
        key = one.options["key"].index_fill(3, torch.tensor([3]), torch.inf)
        infinite = dataclasses.replace(one, options=one.options | {"key": key})
        assert infinite("cuda")[4][0, 0].isnan().all()
        for length in (98, -1):
            of_cuda.test_a_row_that_does_not_fit_is_nan_and_writes_nothing(length, 0)
        of_cuda.test_a_page_that_is_none_makes_its_row_nan(-1, 3)
        of_cuda.test_layout_changes_no_bit("k_cache")
        of_cuda.test_strides_beyond_32_bits("v_cache")
        of_cuda.test_nothing_outside_is_touched("back", 0, {})


def test_the_check_passes_without_a_bug():
    library = host_library()

    def passes() -> None:
        with in_place_of_the_extension(loaded(library)):
            check()

    in_child(passes)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_bug_is_found(mutant):
    assert killed(mutant, check)


@pytest.mark.slow
def test_the_sanitizers_find_what_no_result_shows():
    with mutated(UNSEEN) as csrc:
        done = run(program(of_cuda.DRIVER, "tsan", csrc), "small")
    assert done.returncode
    assert "data race" in done.stderr
