"""The Gluon kernel for Hopper, away from Hopper: what it computes, in every order, and its code."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ahead
from support.gluon_model import Descriptor, HazardError, Pointer, Recording, run
from support.gluon_orders import explore
from support.mutants import Mutant

import fastlm
from fastlm.kernels import attention
from fastlm.kernels._runtime import pretend
from fastlm.kernels.attention import gluon, gluon_tuning
from fastlm.testing import assert_as_accurate

ROOT = Path(__file__).parents[1]
FILE = "kernels/attention/gluon_forward.py"
# as small as a model of it may be, where hardware asks for more
SIZES = {"BLOCK_M": 8, "BLOCK_N": 8, "CONSUMER_REGISTERS": 240, "COPY_REGISTERS": 24}


def inputs_of(batch, num_queries, num_keys, heads, kv_heads, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_queries, heads), (num_keys, kv_heads), (num_keys, kv_heads)]
    return [torch.randn(batch, *s, head_dim, generator=generator).to(dtype) for s in shapes]


def modelled(query, key, value, *, stages=2, block_n=8, text=None, programs=None):
    """``(out, lse, recordings)`` of the kernel, program by program."""
    batch, num_queries, heads, head_dim = query.shape
    num_keys, kv_heads = key.shape[1:3]
    sizes = {**SIZES, "BLOCK_N": block_n, "HEAD_DIM": head_dim, "STAGES": stages}
    out = torch.full(query.shape, math.nan, dtype=query.dtype)
    lse = torch.full((batch, heads, num_queries), math.nan)
    blocks = -(-num_queries // (2 * SIZES["BLOCK_M"]))
    tile = (1, block_n, 1, head_dim)
    recordings = [
        run(
            FILE, "forward_kernel", program,
            Descriptor(query, (1, SIZES["BLOCK_M"], 1, head_dim)),
            Descriptor(key, tile), Descriptor(value, tile), Pointer(out), Pointer(lse),
            batch * heads, heads, heads // kv_heads, num_queries, num_keys, 2, head_dim**-0.5,
            text=text, **sizes,
        )
        for program in (range(blocks * batch * heads) if programs is None else programs)
    ]  # fmt: skip
    return out, lse, recordings


CASES = {
    "whole tiles": (1, 32, 32, 2, 1, 16),
    "nothing divides": (2, 30, 41, 4, 2, 16),
    "a prompt behind others": (1, 9, 60, 2, 2, 16),
    "queries that see nothing": (1, 40, 17, 2, 1, 16),
    "one query": (3, 1, 1, 1, 1, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_attention(case, dtype):
    inputs = inputs_of(*CASES[case], dtype)
    reference = functools.partial(fastlm.causal_attention, return_lse=True, backend="reference")
    truth = reference(*(x.double() for x in inputs))
    plain = fastlm.causal_attention(*inputs, return_lse=True, backend="torch")
    got = modelled(*inputs)[:2]
    for name, actual, one, true in zip(("out", "lse"), got, plain, truth, strict=True):
        assert_as_accurate(name, actual, plain=one, truth=true)


def recording(num_queries, num_keys, *, stages=2, block_n=8, text=None) -> Recording:
    """Of the program of the last queries, which has the most tiles."""
    inputs = inputs_of(1, num_queries, num_keys, 1, 1, 16, torch.float32)
    (made,) = modelled(*inputs, stages=stages, block_n=block_n, text=text, programs=[0])[2]
    return made


@pytest.mark.parametrize(
    ("num_keys", "stages"),
    [
        *((num_keys, stages) for num_keys in (8, 16, 24, 40) for stages in (1, 2)),
        (24, 3),
        pytest.param(56, 2, marks=pytest.mark.slow),
        pytest.param(56, 3, marks=pytest.mark.slow),
    ],
)
def test_no_order_goes_wrong(num_keys, stages):
    made = recording(16, num_keys, stages=stages)
    assert list(made.partitions) == ["_copying_warp", "_second_consumer", "_first_consumer"]
    # copies can overtake nothing, and partitions each other: more than one order
    assert explore(made) > sum(map(len, made.partitions.values()))


MUTANTS = [
    Mutant("one consumer empties a stage of keys", FILE,
           "mbarrier.init(k_empty.index(stage), count=CONSUMERS)",
           "mbarrier.init(k_empty.index(stage), count=1)"),
    Mutant("one consumer empties a stage of values", FILE,
           "mbarrier.init(v_empty.index(stage), count=CONSUMERS)",
           "mbarrier.init(v_empty.index(stage), count=1)"),
    Mutant("three consumers are waited for", FILE,
           "mbarrier.init(v_empty.index(stage), count=CONSUMERS)",
           "mbarrier.init(v_empty.index(stage), count=3)"),
    Mutant("a copy has two arrivals", FILE, "mbarrier.init(k_full.index(stage), count=1)",
           "mbarrier.init(k_full.index(stage), count=2)"),
    Mutant("the turn never changes", FILE, "return tile // STAGES & 1", "return 0"),
    Mutant("the turn changes with each tile", FILE, "return tile // STAGES & 1", "return tile & 1"),
    Mutant("copies wait for the wrong turn of keys", FILE,
           "mbarrier.wait(k_empty.index(stage), turn ^ 1)",
           "mbarrier.wait(k_empty.index(stage), turn)"),
    Mutant("copies do not wait for keys", FILE,
           "mbarrier.wait(k_empty.index(stage), turn ^ 1)", "pass"),
    Mutant("copies do not wait for values", FILE,
           "mbarrier.wait(v_empty.index(stage), turn ^ 1)", "pass"),
    Mutant("keys are not waited for", FILE,
           "    mbarrier.wait(k_full.index(stage), _turn(tile, STAGES))\n", ""),
    Mutant("values are waited for a turn late", FILE,
           "mbarrier.wait(v_full.index(before), _turn(tile - 1, STAGES))",
           "mbarrier.wait(v_full.index(before), _turn(tile, STAGES))"),
    Mutant("values are given back before they are read", FILE,
           "    acc = warpgroup_mma_wait(0, deps=[acc])\n"
           "    mbarrier.arrive(v_empty.index(before), count=1)\n",
           "    mbarrier.arrive(v_empty.index(before), count=1)\n"
           "    acc = warpgroup_mma_wait(0, deps=[acc])\n"),
    Mutant("scores are used at once", FILE, "scores = warpgroup_mma_wait(1, deps=[scores])",
           "scores = warpgroup_mma_wait(2, deps=[scores])"),
    Mutant("keys are never given back", FILE,
           "    mbarrier.arrive(k_empty.index(stage), count=1)\n", ""),
    Mutant("values of the tile itself", FILE,
           "_matrix(values.index(before))", "_matrix(values.index(stage))"),
    Mutant("queries are not waited for", FILE,
           "    mbarrier.wait(q_full.index(CONSUMER), 0)\n", ""),
]  # fmt: skip


def changed(mutant: Mutant) -> str:
    return (ROOT / mutant.file).read_text().replace(mutant.old, mutant.new)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_of_synchronisation_is_found(mutant):
    with pytest.raises((HazardError, IndexError)):
        for num_keys in (16, 40):
            explore(recording(16, num_keys, text=changed(mutant)))


WRONG = [
    Mutant("the last tile is forgotten", FILE,
           "    acc = warpgroup_mma(p, _matrix(values.index(last)), acc, is_async=True)\n"
           "    acc = warpgroup_mma_wait(0, deps=[acc])\n", ""),
    Mutant("the diagonal has no mask", FILE,
           "num_masked = gl.maximum(num_tiles - seen_by_all // BLOCK_N, 1)",
           "num_masked = 1"),
    Mutant("tiles are walked upward", FILE,
           "first_key = (num_tiles - 1 - tile) * BLOCK_N\n        # the",
           "first_key = tile * BLOCK_N\n        # the"),
    Mutant("sums are not rescaled", FILE, "row_sum = row_sum * rescale + ", "row_sum = row_sum + "),
    Mutant("heads of a group have keys of their own", FILE,
           "batch_head % heads // group_size", "0 * batch_head"),
    Mutant("the lse keeps its base", FILE,
           "(row_max + gl.log2(row_sum)) * LN_2", "row_max + gl.log2(row_sum)"),
    Mutant("both consumers have the same queries", FILE,
           "first_query + consumer * BLOCK_M", "first_query"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", WRONG, ids=str)
def test_a_mistake_of_arithmetic_is_found(mutant):
    inputs = inputs_of(*CASES["nothing divides"], torch.float32)
    want = fastlm.causal_attention(*inputs, return_lse=True, backend="reference")
    got = modelled(*inputs, text=changed(mutant))[:2]
    assert not all(torch.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))


REFUSED = {
    "sm_100": ({"arch": 100}, "the Gluon kernel is for sm_90, query is on sm_100"),
    "a window": ({"window_size": 5}, "the Gluon kernel has no window_size"),
    "documents": ({"cu_seqlens_q": torch.tensor([0, 8])}, "the Gluon kernel has no cu_seqlens_q"),
    "padding": ({"key_end": torch.tensor([8])}, "the Gluon kernel has no key_end"),
    "sinks": ({"sinks": torch.zeros(4)}, "the Gluon kernel has no sinks"),
    "a softcap": ({"softcap": 5.0}, "the Gluon kernel has no softcap"),
    "float32": ({"dtype": torch.float32}, "bfloat16 and float16, query is float32"),
    "head_dim 96": ({"width": 96}, "head_dim of 64, 128, 256 of query, key and value, got 96"),
    "a scale below 0": ({"scale": -1.0}, "needs a scale above 0, got -1.0"),
    "no queries": ({"length": 0}, "needs elements, query has none"),
    "columns apart": ({"last": 2}, "the last dimension of query has stride 2"),
    "rows beside 16 bytes": ({"room": 1}, "TMA needs query to begin at a multiple of 16 bytes"),
}


def refusal(monkeypatch, *, arch=90, dtype=torch.bfloat16, width=64, length=8, last=1, room=0,
            scale=0.125, **options):  # fmt: skip
    monkeypatch.setattr(gluon, "INTERPRETED", False)
    monkeypatch.setattr(gluon, "refuses_device", lambda *_: None)
    names = ("sinks", "cu_seqlens_q", "cu_seqlens_k", "key_start", "key_end")
    query = torch.zeros(1, length, 4, last * width + room, dtype=dtype)[..., : last * width : last]
    rest = [options.get(name) for name in names]
    with pretend(arch):
        return gluon.forward_refuses(
            query, query, query, *rest, scale, options.get("window_size"), options.get("softcap")
        )


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_does_not_do_is_refused(case, monkeypatch):
    options, reason = REFUSED[case]
    assert reason in refusal(monkeypatch, **options)


def test_plain_attention_on_hopper_is_not_refused(monkeypatch):
    assert refusal(monkeypatch) is None


def test_the_interpreter_and_a_cpu_are_refused():
    inputs = inputs_of(1, 8, 8, 2, 1, 64, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="interpreter cannot run Gluon kernels"):
        fastlm.causal_attention(*inputs, backend="gluon")


@pytest.mark.parametrize(
    ("dtype", "refuses", "serves"),
    [
        (torch.bfloat16, None, True),
        (torch.bfloat16, "a reason", False),
        (torch.float16, None, False),
    ],
)
def test_rows_that_a_gpu_has_proven_serve_triton(dtype, refuses, serves, monkeypatch):
    row = dataclasses.replace(gluon_tuning.FORWARD[64], proven={torch.bfloat16: "a file"})
    monkeypatch.setitem(gluon_tuning.FORWARD, 64, row)
    monkeypatch.setattr(gluon, "forward_refuses", lambda *_: refuses)
    monkeypatch.setattr(gluon, "forward", lambda *_: (got, got))
    monkeypatch.setattr(attention.launch, "launch", lambda *_, **__: None)
    got = torch.zeros(())
    inputs = inputs_of(1, 8, 8, 2, 1, 64, dtype)
    out, _ = attention.forward(*inputs, *5 * [None], 0.125, None, None)
    assert (out is got) == serves


def proves(file: Path, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the rows of a result file have a time of the kernel, judged right, on a Hopper."""
    result = json.loads(file.read_text())
    names = {str(dtype), str(dtype).removeprefix("torch.")}
    return any(
        (row["op"], row["provider"], row["shape"].get("D")) == ("attention", "gluon", head_dim)
        and row["dtype"] in names
        and "ms_p50" in row
        and "wrong" not in row
        for row in result["rows"]
    )


def test_the_files_that_prove_rows_say_so():
    for head_dim, row in gluon_tuning.FORWARD.items():
        for dtype, file in row.proven.items():
            assert proves(ROOT / file, head_dim, dtype), f"{file}: {head_dim}, {dtype}"


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"wrong": "0.5"}, False),
        ({"provider": "fastlm"}, False),
        ({"shape": {}}, False),
    ],
)
def test_what_a_file_proves(changes, holds, tmp_path):
    row = {"op": "attention", "provider": "gluon", "shape": {"D": 64}, "dtype": "bfloat16"}
    file = tmp_path / "attention.json"
    file.write_text(json.dumps({"rows": [{**row, "ms_p50": 1.0, **changes}]}))
    assert proves(file, 64, torch.bfloat16) == holds


CHILD = """
import json, sys, torch
from support.ahead import empty
from fastlm.kernels import _ahead
from fastlm.kernels._launch import recorded
from fastlm.kernels._runtime import pretend
from fastlm.kernels.attention import gluon

dtype = getattr(torch, sys.argv[2])
for head_dim in map(int, sys.argv[1].split(",")):
    query, key = (empty(2, 4096, heads, head_dim, dtype=dtype) for heads in (8, 2))
    with pretend(90), recorded(run=False) as launches:
        gluon.forward(query, key, key, *5 * [None], 0.125, None, None)
    made = _ahead.compile_launch(launches[0], 90)
    print(json.dumps([head_dim, made.stack, made.shared_memory, made.instructions]))
"""


@pytest.mark.parametrize(
    ("head_dims", "dtype"),
    [
        ("128", "bfloat16"),
        pytest.param("64,256", "bfloat16", marks=pytest.mark.slow),
        pytest.param("64,128,256", "float16", marks=pytest.mark.slow),
    ],
)
def test_rows_compile_as_designed(head_dims, dtype):
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, head_dims, dtype],
        env=ahead.compiling_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        head_dim, stack, shared_memory, count = json.loads(line)
        plan = gluon_tuning.FORWARD[head_dim]
        tiles = 2 * plan.block_m + 2 * plan.stages * plan.block_n
        assert stack == count["LDL"] == count["STL"] == 0
        assert 0 < shared_memory - tiles * head_dim * 2 < 1024
        assert shared_memory <= 227 * 1024
        # of both consumers: scores and sum of the first or last tile and of both loops, 16 deep
        assert count["HGMMA"] == 2 * 3 * (head_dim // 16 + plan.block_n // 16)
        # six products begin and six are waited for; more were the compiler to put them in a row
        assert count["WARPGROUP"] == 2 * (6 + 6)
        # two tiles of queries, one of keys, one of values, in boxes of 64 columns
        assert count["UTMALDG"] == 4 * head_dim // 64
        # probabilities stay in registers
        assert count["LDSM"] == count["STSM"] == 0
        assert count["LDS"] <= 8
        assert count["STS"] <= 8
