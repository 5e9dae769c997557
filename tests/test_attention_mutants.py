"""Bugs planted in the attention kernels: each must make a short check fail."""

from __future__ import annotations

import pytest
import torch
from support.attention import blocks, judge
from support.interpreter import interpreted_only
from support.memory import guarded, sparse
from support.mutants import Mutant, killed
from support.poison import poisoned

import fastlm
from fastlm.testing import attention_inputs

FORWARD = "kernels/attention/forward.py"
BACKWARD = "kernels/attention/backward.py"
TILES = "kernels/attention/tiles.py"
LAUNCH = "kernels/attention/launch.py"


def accurate() -> None:
    """Three blocks each way, shared keys, a scale of either sign, more of either, a value_dim."""
    with blocks(16, 16):
        judge(*attention_inputs(1, 35, 35, 2, 1, 8), backend="triton", scale=-0.4)
        judge(*attention_inputs(1, 35, 18, 1, 1, 5, value_dim=7), backend="triton")
        judge(*attention_inputs(1, 20, 23, 1, 1, 8), backend="triton")


def wide() -> None:
    query, key, value = attention_inputs(1, 3, 3, 1, 1, 4)
    with blocks(16, 16):
        expected = fastlm.causal_attention(query, key, value, backend="triton")
        far = sparse(key.shape, (12, 2**30 + 64, 4, 1), key.dtype).copy_(key)
        assert torch.equal(fastlm.causal_attention(query, far, value, backend="triton"), expected)


def inside() -> None:
    tensors = [guarded(x) for x in attention_inputs(1, 18, 18, 1, 1, 9)]
    leaves = [x.requires_grad_() for x in tensors]
    with blocks(16, 16):
        out = fastlm.causal_attention(*leaves, backend="triton")
        out.sum().backward()


def unspoiled() -> None:
    """Blocks keep order, whatever stands in later ones, and a score of +inf makes the lse +inf."""
    query, key, value = attention_inputs(1, 40, 40, 1, 1, 8)
    query[..., 0] = 1.0
    with blocks(16, 16):
        expected = fastlm.causal_attention(query, key, value, backend="triton")
        key[:, 32:, :, 0] = torch.inf
        value[:, 32:] = torch.nan
        out, lse = fastlm.causal_attention(query, key, value, return_lse=True, backend="triton")
    assert torch.equal(out[:, :32], expected[:, :32])
    assert (lse[..., 32:] == torch.inf).all()


def packed() -> None:
    """Documents, one of them without queries and one without keys, and a rest."""
    ends = [torch.tensor(x, dtype=torch.int32) for x in ((0, 18, 18, 23, 33), (0, 18, 21, 21, 31))]
    bounds = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    with blocks(16, 16):
        judge(*attention_inputs(1, 40, 35, 2, 1, 8), backend="triton", **bounds)


def windowed() -> None:
    """Windows of less and of more than a block, under a cap, beside sinks."""
    sinks = torch.tensor([1.5, -0.5])
    with blocks(16, 16):
        for size in (4, 33):
            judge(
                *attention_inputs(1, 70, 72, 2, 1, 8),
                backend="triton", window_size=size, softcap=1.5, sinks=sinks,
            )  # fmt: skip


def padded() -> None:
    """Padding on either side, in memory that is not zero before."""
    start, end = (torch.tensor([x], dtype=torch.int32) for x in (19, 36))
    with blocks(16, 16), poisoned(0x7F):
        judge(*attention_inputs(1, 45, 41, 2, 1, 8), backend="triton", key_start=start, key_end=end)


# what several of the texts below have in common
STEP = "* stride + cols[None, :]\n    if CHECK_ROWS and"
ROWS, COLS = "mask=(rows < num_rows)[:, None]", " & (cols < DIM)[None, :]"
KEY, VALUE = "*key.stride()[:3],", "*value.stride()[:3],"
FIRST = "tl.maximum(first_key - offset, 0)"

# (bug, file, old, new, check)
PLANTED = [
    (
        "the diagonal is left out",
        TILES,
        "keys <= queries + offset",
        "keys < queries + offset",
        accurate,
    ),
    ("ends are not aligned", TILES, "keys <= queries + offset", "keys <= queries", accurate),
    ("documents are found one too late", TILES, "first <= rank", "first < rank", packed),
    ("a document has no block of its own", TILES, "// BLOCK + documents", "// BLOCK", packed),
    (
        "what follows the documents sees keys",
        TILES,
        "(document == num_documents) | (first_query >= q_count)",
        "first_query >= q_count",
        packed,
    ),
    ("the window is one too wide", TILES, "offset - window\n", "offset - window - 1\n", windowed),
    (
        "the window's end is not masked",
        TILES,
        "past_last - window, 0), BLOCK_N) * BLOCK_N",
        "past_last - window, 0), BLOCK_N) * 0",
        windowed,
    ),
    (
        "blocks before the window are skipped by one",
        TILES,
        "tl.maximum(past_first - window, 0) // BLOCK_N",
        "tl.cdiv(tl.maximum(past_first - window, 0), BLOCK_N)",
        windowed,
    ),
    (
        "queries beyond a window are left out",
        TILES,
        "num_keys) - 1 - offset + window",
        "num_keys) - 2 - offset + window",
        windowed,
    ),
    ("the cap's slope is forgotten", BACKWARD, "1.0 - products * products", "1.0", windowed),
    (
        "a sink counts twice",
        FORWARD,
        'float("-inf"), 0.0, 1.0)',
        'float("-inf"), 0.0, 2.0)',
        windowed,
    ),
    (
        "a sink's gradient has the wrong sign",
        LAUNCH,
        ".mul_(delta).neg_()",
        ".mul_(delta)",
        windowed,
    ),
    (
        "padding in front is seen",
        TILES,
        "num_keys - num_queries - start",
        "num_keys - num_queries",
        padded,
    ),
    (
        "padding behind is seen",
        TILES,
        "return start, end - start,",
        "return start, num_keys - start,",
        padded,
    ),
    (
        "gradients of padding are not written",
        LAUNCH,
        "sequences.is_padded else",
        "False else",
        padded,
    ),
    (
        "padding in front moves blocks",
        TILES,
        "q_token = tl.where(is_blind, 0, blind)",
        "q_token = tl.where(is_blind, 0, blind - 1)",
        padded,
    ),
    ("acc is not rescaled", FORWARD, "acc = acc * rescale[:, None]", "acc = acc", accurate),
    ("the sum is not rescaled", FORWARD, "row_sum * rescale +", "row_sum +", accurate),
    (
        "the old maximum is kept",
        TILES,
        "tl.exp2(row_max - pivot), new_max",
        "tl.exp2(row_max - pivot), row_max",
        accurate,
    ),
    (
        "heads map to groups by remainder",
        FORWARD,
        "heads // group_size\n",
        "heads % group_size\n",
        accurate,
    ),
    ("the sign of the scale is lost", TILES, "scale < 0, -1.0", "scale < 0, 1.0", accurate),
    (
        "a row without keys divides by 0",
        FORWARD,
        "row_sum == 0, 1.0, row_sum",
        "row_sum == 0, 0.0, row_sum",
        accurate,
    ),
    ("lse stays in base 2", FORWARD, "tl.log2(row_sum)) * LN_2", "tl.log2(row_sum))", accurate),
    (
        "rows are 32 bits wide",
        TILES,
        f"rows.to(tl.int64)[:, None] {STEP}",
        f"rows[:, None] {STEP}",
        wide,
    ),
    ("columns past head_dim are read", TILES, f"{ROWS}{COLS}, other", f"{ROWS}, other", inside),
    (
        "one row too many is read",
        TILES,
        f"{ROWS}{COLS}, other",
        f"{ROWS}{COLS}, other".replace("<", "<=", 1),
        inside,
    ),
    ("delta forgets dlse", BACKWARD, "delta -= tl.load", "delta -= 0 * tl.load", accurate),
    ("delta is not subtracted", BACKWARD, "(dp - delta[None, :])", "dp", accurate),
    ("dkey is not scaled", BACKWARD, "dk * scale", "dk", accurate),
    (
        "one head of the group is counted",
        BACKWARD,
        "range(num_blocks * group_size)",
        "range(num_blocks)",
        accurate,
    ),
    (
        "blocks before the diagonal are skipped",
        BACKWARD,
        "        unmasked_end, end, k_count,",
        "        unmasked_end, unmasked_end, k_count,",
        accurate,
    ),
    (
        "a query too late begins the walk",
        TILES,
        f"{FIRST} // BLOCK_M * BLOCK_M",
        f"tl.cdiv({FIRST}, BLOCK_M) * BLOCK_M",
        accurate,
    ),
    (
        "keys after the diagonal are walked over",
        TILES,
        "end = tl.minimum(tl.maximum(past_last, 0), num_keys)",
        "end = num_keys",
        unspoiled,
    ),
    (
        "a score of +inf makes the lse NaN",
        TILES,
        'tl.abs(new_max) == float("inf")',
        'new_max == float("-inf")',
        unspoiled,
    ),
    (
        "strides of key and value are swapped",
        LAUNCH,
        f"{KEY} {VALUE}\n        batch",
        f"{VALUE} {KEY}\n        batch",
        accurate,
    ),
]
# a normal run plants these; the rest are for the long one
QUICK = {
    "the diagonal is left out",
    "documents are found one too late",
    "the window is one too wide",
    "the cap's slope is forgotten",
    "padding in front is seen",
    "acc is not rescaled",
    "heads map to groups by remainder",
    "rows are 32 bits wide",
    "columns past head_dim are read",
    "delta is not subtracted",
    "one head of the group is counted",
    "a query too late begins the walk",
}


@interpreted_only
@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        pytest.param(
            Mutant(*planted),
            check,
            id=planted[0],
            marks=[] if planted[0] in QUICK else pytest.mark.slow,
        )
        for *planted, check in PLANTED
    ],
)
def test_a_planted_bug_is_found(mutant, check):
    assert killed(mutant, check)
