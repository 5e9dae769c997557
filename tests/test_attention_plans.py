"""causal_attention's launch settings: one for every head_dim, within shared memory; tf32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.attention import judge, with_dtypes

import fastlm
from fastlm.kernels import attention as kernels
from fastlm.kernels._launch import recorded
from fastlm.kernels._runtime import SHARED_MEMORY, Device, modelled, pretend
from fastlm.kernels.attention import tuning
from fastlm.ops import _dispatch
from fastlm.testing import attention_inputs

STEPS = ("forward", "delta", "dkdv", "dq")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEWER = Device(arch=103, num_sms=148, shared_memory=227 * 1024)
DEVICES = [*map(modelled, SHARED_MEMORY), NEWER]


def named(gpu: Device) -> str:
    return f"sm_{gpu.arch}"


@pytest.mark.parametrize("gpu", DEVICES, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_of_every_head_dim_fits_shared_memory(gpu, dtype):
    for step in STEPS:
        for head_dim in range(1, tuning.MAX_HEAD_DIM + 1):
            for value_dim in (8, head_dim, 512):
                options = [(window, tf32) for window in (False, True) for tf32 in (False, True)]
                sizes = (head_dim, value_dim, dtype)
                rows = [tuning.plan(step, *sizes, gpu, *option) for option in options]
                # so that a refusal need not know about options
                assert all(rows) or not any(rows)
                for row in filter(None, rows):
                    assert tuning.shared_memory(step, row, *sizes) <= gpu.shared_memory
                if max(head_dim, value_dim) <= 256 and dtype != torch.float64:
                    assert all(rows)


@pytest.mark.parametrize("gpu", DEVICES, ids=named)
def test_head_dims_up_to_512_are_refused_where_shared_memory_ends(gpu):
    is_small = gpu.shared_memory < 100 * 1024
    wide = {dtype: tuning.plan("dkdv", 512, 512, dtype, gpu) for dtype in DTYPES}
    assert wide[torch.bfloat16]
    assert wide[torch.float16]
    assert (wide[torch.float32] is None) == is_small
    assert wide[torch.float64] is None
    assert tuning.plan("forward", 512, 512, torch.float32, gpu)
    assert (tuning.plan("dkdv", 256, 256, torch.float64, gpu) is None) == is_small


def test_less_shared_memory_than_the_architecture_has_takes_smaller_tiles():
    whole, half = modelled(90), Device(arch=90, num_sms=132, shared_memory=99 * 1024)
    for step in STEPS[:1] + STEPS[2:]:
        row = tuning.plan(step, 256, 256, torch.bfloat16, half)
        assert row == tuning.plan(step, 256, 256, torch.bfloat16, modelled(86))
        assert row != tuning.plan(step, 256, 256, torch.bfloat16, whole)
    nothing = Device(arch=90, num_sms=132, shared_memory=1024)
    assert tuning.plan("forward", 64, 64, torch.bfloat16, nothing) is None


def test_what_does_not_fit_is_refused_in_a_sentence_and_left_to_torch(monkeypatch):
    inputs = [x.requires_grad_() for x in attention_inputs(1, 9, 9, 1, 1, 512)]
    why = r"tiles of head_dim 512 and 512 in float32 do not fit the 99 KiB of shared memory"
    monkeypatch.setattr(_dispatch, "_KERNELS", ())  # auto asks kernels on CPU too
    with pretend(86):
        out = fastlm.causal_attention(*inputs, backend="triton")
        with pytest.raises(NotImplementedError, match=why):
            out.sum().backward()
        out = fastlm.causal_attention(*inputs)
        with recorded() as log:
            out.sum().backward()
    assert log == []
    assert fastlm.causal_attention(*inputs, backend="triton").shape == (1, 9, 1, 512)


@pytest.mark.parametrize(("backend", "dtype"), with_dtypes("triton", dtypes=DTYPES[:3]))
def test_wide_heads_with_the_rows_of_the_table(device, backend, dtype):
    judge(*attention_inputs(1, 40, 50, 2, 1, 512, dtype, device), backend=backend, window_size=35)


# ---- tf32


@pytest.fixture
def _precision_is_put_back() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, matmul.fp32_precision = before


def set_matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def set_everything(value: str) -> None:
    set_matmul("none")
    torch.backends.fp32_precision = value


def set_old_flag(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


PRECISIONS = [
    (set_matmul, "ieee", "ieee"),
    (set_matmul, "none", "ieee"),
    (set_matmul, "tf32", "tf32"),
    (set_everything, "tf32", "tf32"),
    (set_everything, "ieee", "ieee"),
    (set_old_flag, True, "tf32"),
    (set_old_flag, False, "ieee"),
    (torch.set_float32_matmul_precision, "high", "tf32"),
    (torch.set_float32_matmul_precision, "highest", "ieee"),
]


def precisions_launched(*inputs: torch.Tensor, call=fastlm.causal_attention) -> set[str]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with recorded(run=False) as log:
        call(*leaves, backend="triton").sum().backward()
    assert [launch.name for launch in log].count("forward_kernel") == 1
    return {launch.constants["PRECISION"] for launch in log if launch.name != "delta_kernel"}


@pytest.mark.usefixtures("_precision_is_put_back")
@pytest.mark.parametrize(("setter", "value", "wanted"), PRECISIONS)
def test_torchs_setting_decides_about_tf32(device, setter, value, wanted):
    setter(value)
    single = attention_inputs(1, 20, 20, 2, 1, 64, device=device)
    assert precisions_launched(*single) == {wanted}
    assert precisions_launched(*(x.bfloat16() for x in single)) == {"ieee"}
    assert precisions_launched(*(x.double() for x in single)) == {"ieee"}


@pytest.mark.usefixtures("_precision_is_put_back")
def test_compiled_code_follows_the_setting_too(device):
    compiled = torch.compile(fastlm.causal_attention, backend="eager", fullgraph=True)
    inputs = attention_inputs(1, 20, 20, 2, 1, 64, device=device)
    for value in ("tf32", "ieee"):
        set_matmul(value)
        assert precisions_launched(*inputs, call=compiled) == {value}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.usefixtures("_precision_is_put_back")
def test_tf32_takes_larger_tiles_on_hopper_alone(arch):
    def launched(value: str) -> list[tuple[int, ...]]:
        set_matmul(value)
        x = torch.empty(2, 128, 4, 64, device="meta")
        with pretend(arch), recorded(run=False) as log:
            kernels.forward(x, x, x, *(None,) * 5, 0.125, None, None)
        return [launch.constants["BLOCK_M"] for launch in log]

    assert (launched("tf32") > launched("ieee")) == (arch == 90)
