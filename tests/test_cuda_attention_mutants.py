"""Bugs planted in csrc/'s attention: each, compiled and run on a CPU, must make a check fail."""

from __future__ import annotations

import pytest
import test_cuda_attention as of_cuda
import torch
from support.attention import judge, judge_pooled
from support.cuda_host import host_library, in_place_of_the_extension, killed, loaded, mutated, run
from support.cuda_host import program as built
from support.interpreter import interpreted_only
from support.memory import in_child
from support.mutants import Mutant

import fastlm
from fastlm.testing import attention_inputs

pytestmark = interpreted_only

MASK = "csrc/attention_mask.cuh"
PLACES = "csrc/attention_places.cuh"
TILES = "csrc/attention_tiles.cuh"
FORWARD = "csrc/attention_forward.cuh"
BACKWARD = "csrc/attention_backward.cuh"
MUTANTS = [
    Mutant("the diagonal is left out", MASK, "return key <= latest", "return key < latest"),
    Mutant("the window is one too wide", MASK, "key > latest - window", "key >= latest - window"),
    Mutant("documents are found one too late", MASK, "/ size + middle <= rank",
           "/ size + middle < rank"),
    Mutant("keys before the window are taken for whole tiles", MASK,
           "const int inside = blocks_of(larger(past_last - sees.window, 0), tile) * tile;",
           "const int inside = 0;"),
    Mutant("queries beyond a window are left out", MASK,
           "- 1 - sees.offset + sees.window;", "- 2 - sees.offset + sees.window;"),
    Mutant("the sign of the scale is lost", MASK, "factor < 0 ? -1 : factor;", "1;"),
    Mutant("the cap has no slope", MASK, "is_capped ? 1 - reduced * reduced : 1", "1"),
    Mutant("padding in front moves blocks", PLACES, "at.q_token = blind;",
           "at.q_token = blind - 1;"),
    Mutant("what follows the documents sees keys", PLACES,
           "document == in.num_documents || at.first >= queries.count",
           "at.first >= queries.count"),
    Mutant("offsets of tokens have 32 bits", TILES, "matrix + (first + row) * row_stride + column",
           "matrix + int((first + row) * row_stride) + column"),
    Mutant("rows beyond the sequence are read", TILES,
           "first + row < rows ? columns - column : 0", "columns - column"),
    Mutant("columns are not where the fragment has them", TILES,
           "j / 2 * 8 + lane_of_warp() % 4 * 2 + j % 2",
           "j / 2 * 8 + lane_of_warp() % 4 + j % 2 * 4"),
    Mutant("sums are not rescaled", FORWARD, "sums[i][j] *= decay;", "sums[i][j] *= 1;"),
    Mutant("the total is not rescaled", FORWARD, "total[i] *= decay;", ""),
    Mutant("heads map to groups by remainder", FORWARD,
           "const int64_t kv_head = at.head / in.group_size;",
           "const int64_t kv_head = at.head % (in.heads / in.group_size);"),
    Mutant("a sink counts once for each lane", FORWARD,
           "sink != -kInfinity<A> && Tiles::leads() ? 1 : 0", "sink != -kInfinity<A> ? 1 : 0"),
    Mutant("every block writes the first columns", FORWARD,
           "at.head * in.value_dim + first_column;", "at.head * in.value_dim;"),
    Mutant("keys do not wait for their copies", FORWARD,
           "    wait_for_copies<0>();\n    __syncthreads();  // the keys are there, and the last",
           "    __syncthreads();  // the keys are there, and the last"),
    Mutant("delta is not subtracted", BACKWARD, "gradients[i][j] -= delta(i, j);",
           "gradients[i][j] -= 0 * delta(i, j);"),
    Mutant("delta forgets dlse", BACKWARD,
           "if (dlse) sum -= static_cast<const A*>(dlse)[query];", ""),
    Mutant("one head of the group is counted", BACKWARD,
           "is_seen && member < in.group_size;", "is_seen && member < 1;"),
    Mutant("hidden keys keep their gradients", BACKWARD,
           "if (!sees(i, j)) scores[i][j] = gradients[i][j] = 0;",
           "if (!sees(i, j)) scores[i][j] = 0;"),
    Mutant("the next rows take the place of these", BACKWARD,
           "if (stages == 1 && goes_on) {\n      __syncthreads();",
           "if (stages == 1 && goes_on) {"),
]  # fmt: skip
# what only ThreadSanitizer sees: fibers of a block come to the same line in turn
UNSEEN = Mutant("values take the place of those in use", FORWARD,
                "    __syncthreads();  // the values are there, and the keys were used\n",
                "")  # fmt: skip


def check() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for last in ("documents", "padding"):
            # queries of 100 and keys of 90: the first see nothing
            for lengths in ((100, 110), (100, 90)):
                inputs = attention_inputs(1, *lengths, 4, 2, 24, dtype, value_dim=20)
                options = of_cuda.everything(*lengths, last)
                options["sinks"] = torch.tensor([0.5, -1.0, 2.0, 0.0])
                with of_cuda.warps(1), of_cuda.shared_memory(20 * 1024):
                    judge(*inputs, backend="cuda", **options)
    # one call is too small to be judged by its largest error
    judge_pooled(
        [
            attention_inputs(1, 70, 80, 1, 1, 8, torch.float16, value_dim=136, seed=s)
            for s in (1, 2)
        ],
        backend="cuda",
    )
    judge(*attention_inputs(1, 40, 70, 1, 1, 8), backend="cuda", scale=-0.4)
    of_cuda.test_later_keys_do_not_reach_earlier_queries(torch.bfloat16)
    query, key, value = attention_inputs(1, 40, 64, 1, 1, 8)
    key[:, 40:] = value[:, 40:] = torch.nan  # a cache beyond its tokens
    assert (
        fastlm.causal_attention(query, key[:, :40], value[:, :40], backend="cuda").isfinite().all()
    )
    of_cuda.check_huge_strides(1, 1)


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
        done = run(built(of_cuda.DRIVER, "tsan", csrc), "small")
    assert done.returncode == 66
    assert "data race" in done.stderr
