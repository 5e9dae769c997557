"""Weights in 8 and 4 bits: how far each is moved, what is multiplied by, what is refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from support.memory import guarded, in_child
from support.models import tiny_model, tiny_tokenizer
from torch import Tensor, nn

import fastlm
from fastlm import testing
from fastlm.cli import main
from fastlm.inference.perplexity import mean_loss, perplexity
from fastlm.model import quantized_weights as held
from fastlm.model.quantize import QuantizedLinear, quantize

# units of rounding
BF16, F32 = 2.0**-8, 2.0**-24
BITS = [8, 4]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def weights_of_all_kinds(size: int = 24, width: int = 256) -> Tensor:
    """Rows far from each other in magnitude, far from zero, constant, zero, or all in one."""
    torch.manual_seed(0)
    weight = torch.randn(size, width) * torch.logspace(-30, 30, size)[:, None]
    weight[0] = 0.0
    weight[1] = 0.3
    weight[2] = 7.0 + 1e-6 * torch.randn(width)
    weight[3] = torch.zeros(width).index_fill_(0, torch.tensor([5]), 3.0)
    weight[4] = torch.rand(width) * 5e-39
    weight[5] = torch.linspace(-1.0, 3.0, width) * 1e38
    weight[6, ::2], weight[6, 1::2] = -1.0, 1.0
    return weight


def quantised(weight: Tensor, bits: int, group_size: int = 64, bias: Tensor | None = None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return QuantizedLinear(linear, bits, group_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_weight_is_moved_by_more_than_half_a_step(bits, dtype):
    weight = weights_of_all_kinds().to(dtype)
    if bits == 8:
        levels, steps = held.int8_levels(weight)
        assert levels.abs().max() <= 127
        step = steps.double()[:, None]
        got = levels * step
    else:
        levels, pairs = held.int4_levels(weight, 64)
        assert levels.min() >= 0 and levels.max() <= 15
        steps, middles = pairs.double().permute(2, 1, 0)
        step = steps[..., None]
        got = (levels.unflatten(1, (-1, 64)) - 8) * step + middles[..., None]
        weight = weight.unflatten(1, (-1, 64))
    # the levels are chosen in float32
    exact = weight.float().double()
    slack = 4 * F32 * (exact.abs() + got.abs())
    assert ((got - exact).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_steps_are_as_small_as_they_can_be(bits):
    torch.manual_seed(1)
    weight = torch.randn(64, 256)
    if bits == 8:
        least = weight.abs().amax(1) / 127
        steps = held.int8_levels(weight)[1].float()
    else:
        groups = weight.unflatten(1, (-1, 64))
        least = (groups.amax(2) - groups.amin(2)) / 16
        steps = held.int4_levels(weight, 64)[1][..., 0].t().float()
    # rounded up to bfloat16, and the middle of 4 bits, which is far below their distance, as well
    assert (steps <= least * (1 + 2 * BF16) * (1.0 if bits == 8 else 1 + BF16)).all()


@pytest.mark.parametrize("size", [1, 15, 16, 32, 33, 48, 64, 65, 80, 96, 112, 128, 200])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_unpacking_undoes_packing(size, width):
    torch.manual_seed(2)
    levels = torch.randint(16, (size, width), dtype=torch.int32)
    pairs = torch.tensor([1.0, 0.0]).bfloat16().expand(width // 32, size, 2)
    got = held.int4_unpacked(*held.int4_packed(levels, pairs))
    assert torch.equal(got[:size], levels.float() - 8)
    assert not got[size:].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 64, 65, 128, 129, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_are_within_the_roundings_of_exact_ones(bits, rows, dtype):
    torch.manual_seed(3)
    weight, bias = torch.randn(50, 192), torch.randn(50)
    layer = quantised(weight, bits, 64, bias.to(dtype))
    x = torch.randn(rows, 192, dtype=dtype)
    got = layer(x[:, None])
    assert got.shape == (rows, 1, 50) and got.dtype == dtype
    assert (error(got[:, 0], x, weight, bias) <= bound(layer, x, bias, dtype)).all()


def error(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    exact = x.double() @ weight.double().t() + bias.double()
    return (got.double() - exact).abs()


def bound(layer: QuantizedLinear, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each weight half a step; of rows, sum and result the roundings of their formats."""
    if layer.bits == 8:
        half_steps = layer.steps.double()[:, None].expand(-1, layer.in_features) / 2
    else:
        steps = layer.steps[..., 0].double().t()[: layer.out_features]
        half_steps = steps.repeat_interleave(layer.group_size, 1) / 2
    size, total = x.double().abs(), layer.weight.double().abs()
    from_weights = size @ (half_steps + 4 * F32 * total).t()
    sums = size @ total.t()
    from_rows = BF16 * sums
    from_adding = (layer.in_features + 4) * F32 * (1 + BF16) * sums
    result = sums * (1 + BF16) + from_adding
    from_bias = (BF16 if dtype == torch.bfloat16 else F32) * (result + bias.double().abs())
    return from_weights + from_rows + from_adding + BF16 * result + from_bias


@pytest.mark.parametrize("bits", BITS)
def test_products_that_are_wrong_are_refused(bits):
    torch.manual_seed(3)
    weight, bias = torch.randn(50, 192), torch.zeros(50)
    layer = quantised(weight, bits, 64, bias)
    # all inputs and errors of one sign, so that nothing cancels
    x = torch.ones(2, 192)
    allowed = bound(layer, x, bias, torch.float32)
    assert (error(layer(x), x, weight, bias) <= allowed).all()
    steps = layer.steps if bits == 8 else layer.steps[..., 0]
    moved = weight + 2 * steps.float().max()
    assert (error(layer(x), x, moved, bias) > allowed).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_others(bits):
    torch.manual_seed(4)
    layer = quantised(torch.randn(100, 256), bits)
    x = torch.randn(held.MOST_ROWS[bits], 256)
    together = layer(x)
    for count in (1, 2, 3, 5):
        assert torch.equal(torch.cat([layer(part) for part in x.split(count)]), together)


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_are_multiplied_as_few_are(bits):
    torch.manual_seed(5)
    layer = quantised(torch.randn(100, 256), bits)
    x = torch.randn(3 * held.MOST_ROWS[bits], 256)
    few = torch.cat([layer(part) for part in x.split(held.MOST_ROWS[bits])])
    many = layer(x)
    # sums in another order, each rounded to bfloat16 once
    sums = x.bfloat16().double().abs() @ layer.weight.double().abs().t()
    assert ((many - few).abs() <= 2 * BF16 * few.abs() + 4 * 256 * F32 * sums).all()


@pytest.mark.parametrize("bits", BITS)
def test_rows_may_stand_anywhere_in_memory(bits):
    torch.manual_seed(6)
    layer = quantised(torch.randn(20, 64), bits)
    x = torch.randn(4, 64).bfloat16()
    for offset in (1, 8, 16, 31):
        moved = torch.zeros(offset + x.numel()).bfloat16()[offset:].view(4, 64).copy_(x)
        assert torch.equal(layer(moved), layer(x))
    assert torch.equal(layer(x.t().contiguous().t()), layer(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("end", ["back", "front"])
def test_weights_are_not_read_beyond_their_ends(bits, end):
    torch.manual_seed(7)
    width = 48 if bits == 8 else 96
    layer = quantised(torch.randn(23, width), bits, 32)
    x = torch.randn(3, width)
    want = layer(x)
    layer.levels, layer.steps = guarded(layer.levels, end), guarded(layer.steps, end)

    def product():
        assert torch.equal(layer(x), want)
        layer(torch.randn(held.MOST_ROWS[bits] + 1, width))

    in_child(product)


# ---- whole models


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_what_its_moved_weights_give(bits, tied):
    torch.manual_seed(8)
    model = tiny_model(**WIDE, tie_word_embeddings=tied, attention_bias=True)
    embedding = model.model.embed_tokens.weight.clone()
    ids = torch.randint(320, (3, 20))
    report = quantize(model, bits, group_size=32)
    assert report.layers == 2 * 7 + 1
    assert not [layer for layer in model.modules() if type(layer) is nn.Linear]
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    twin = tiny_model(**WIDE, tie_word_embeddings=False, attention_bias=True)
    twin.model.embed_tokens.weight.data.copy_(embedding)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            other = twin.get_submodule(name)
            other.weight.data.copy_(layer.weight)
            if other.bias is not None:
                other.bias.data.copy_(layer.bias)
    with torch.inference_mode():
        testing.assert_as_accurate(
            "logits",
            model(ids).logits,
            plain=copy.deepcopy(twin).bfloat16()(ids).logits.float(),
            truth=twin.double()(ids).logits,
        )


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_quantised_models_generate_and_have_a_loss(bits):
    torch.manual_seed(9)
    model = tiny_model(**WIDE, tie_word_embeddings=True)
    prompt = torch.randint(320, (2, 5))
    quantize(model, bits, group_size=32)
    ids = model.generate(prompt, 20)
    assert ids.shape == (2, 25) and torch.equal(ids[:, :5], prompt)
    assert torch.equal(model.generate(prompt, 20), ids)
    # the loss is that of the moved weight, without the rounding of rows and logits
    loss = model(ids, labels=ids).loss
    want = nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    sums = model.model(ids).abs() @ model.lm_head.weight.abs().t()
    assert (loss - want).abs() <= 2 * (2 * BF16 * (1 + BF16) * sums.max())


def test_the_report_counts_bytes():
    model = tiny_model(**WIDE, tie_word_embeddings=True)
    linears = [layer for layer in model.modules() if type(layer) is nn.Linear]
    elements = sum(layer.weight.numel() for layer in linears)
    rows = sum(layer.out_features for layer in linears)
    head = model.lm_head.weight.numel()
    report = quantize(model)
    assert report.read_before == 4 * elements
    assert report.read_after == elements + 2 * rows
    # the embedding stays
    saved = 4 * (elements - head) - report.read_after
    assert report.bytes_before - report.bytes_after == saved
    assert str(report) == (
        f"15 layers in int8: {report.bytes_before / 1e6:.1f} to {report.bytes_after / 1e6:.1f} MB "
        f"held, {report.read_before / 1e6:.1f} to {report.read_after / 1e6:.1f} MB read per token"
    )
    four = tiny_model(**WIDE)
    assert quantize(four, 4, group_size=32).read_after == elements // 2 + 4 * elements // 32


def test_gradients_are_refused():
    model = tiny_model()
    quantize(model)
    ids = torch.randint(320, (1, 4))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model(ids)
    model.model.embed_tokens.weight.requires_grad_()
    with pytest.raises(NotImplementedError, match="quantised layers have no gradients"):
        model(ids)
    with torch.no_grad():
        model(ids)
        model.lm_head(torch.randn(1, 32, requires_grad=True))


@pytest.mark.parametrize("bits", BITS)
def test_layers_are_compiled_whole(bits):
    torch.manual_seed(14)
    layer = quantised(torch.randn(20, 64), bits, bias=torch.randn(20))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for rows in (1, 3, held.MOST_ROWS[bits]):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), layer(x))
    assert compiled(torch.randn(150, 64)).shape == (150, 20)


def test_a_quantised_model_is_not_saved(tmp_path):
    model = tiny_model()
    quantize(model)
    with pytest.raises(NotImplementedError, match="a quantised model cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_moving_keeps_levels_and_steps():
    torch.manual_seed(10)
    layer = quantised(torch.randn(20, 64), 8, bias=torch.ones(20))
    x = torch.randn(3, 64)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    layer.bfloat16()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.float()(x), want)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert layer.levels.dtype == torch.int8 and layer.steps.dtype == torch.bfloat16
    assert layer.to("meta").levels.device.type == "meta"
    four = quantised(torch.randn(20, 64), 4)
    with pytest.raises(NotImplementedError, match="int4 weights cannot move from cpu to meta"):
        four.to("meta")
    assert torch.equal(four.double()(x), four(x))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"bits": 3}, "bits must be 8 or 4, got 3"),
        ({}, {"bits": 4, "group_size": 48}, r"group_size must be one of \(32, 64, 128, 256\)"),
        ({"intermediate_size": 40}, {}, "down_proj: int8 weights need a width that 16 divides"),
        (
            {**WIDE, "intermediate_size": 80},
            {"bits": 4, "group_size": 32},
            r"layers.0.mlp.down_proj: int4 weights need a width that group_size 32 divides, got 80",
        ),
    ],
)
def test_what_cannot_be_quantised_is_named_and_left_alone(changes, options, message):
    model = tiny_model(**changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize(model, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_values_and_states_that_cannot_be_quantised_are_named():
    model = tiny_model()
    model.lm_head.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="lm_head: quantised weights need finite values"):
        quantize(model)
    with pytest.raises(ValueError, match="need a CPU or a CUDA device, got meta"):
        quantize(tiny_model().to("meta"))
    model = tiny_model()
    quantize(model)
    with pytest.raises(ValueError, match="must have layers that are not quantised, got none"):
        quantize(model)
    huge = torch.zeros(1).expand(2**27, 16)
    assert held.int8_refuses(huge) == (
        f"quantised weights need fewer than 2^31 elements, got {2**31}"
    )


# ---- perplexity


@pytest.mark.parametrize("window", [None, 64, 7])
def test_perplexity_is_that_of_the_definition(window):
    torch.manual_seed(11)
    model = tiny_model()
    ids = torch.randint(320, (150,)).tolist()
    total = 0.0
    with torch.inference_mode():
        double = copy.deepcopy(model).double()
        for start in range(0, 149, window or 64):
            part = torch.tensor(ids[start : start + (window or 64) + 1])
            logprobs = double(part[None, :-1]).logits[0].log_softmax(-1)
            total -= logprobs.gather(-1, part[1:, None]).sum().item()
    assert mean_loss(model, ids, window=window) == pytest.approx(total / 149, rel=1e-5)
    assert perplexity(model, ids, window=window) == pytest.approx(math.exp(total / 149), rel=1e-4)


def test_quantising_changes_perplexity_by_little_and_4_bits_by_more():
    torch.manual_seed(12)
    model = tiny_model(**WIDE)
    with torch.inference_mode():
        # a text that the model itself finds likely
        ids = model.generate(torch.zeros(1, 1, dtype=torch.int64), 60, temperature=0.5, seed=1)
    ids = ids[0].tolist()
    losses = {None: mean_loss(model, ids)}
    for bits in BITS:
        other = copy.deepcopy(model)
        quantize(other, bits, group_size=32)
        losses[bits] = mean_loss(other, ids)
    assert 0 < abs(losses[8] - losses[None]) < abs(losses[4] - losses[None]) < 1


def test_what_has_no_perplexity_is_named():
    model = tiny_model()
    with pytest.raises(ValueError, match="text must have at least two tokens, got 1"):
        perplexity(model, [5])
    with pytest.raises(ValueError, match=r"window must be in \[1, 64\], the context of the model"):
        perplexity(model, [5, 6], window=65)
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        perplexity(model, [5, 6])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(13)
    path = tmp_path_factory.mktemp("run")
    tokenizer = tiny_tokenizer()
    tiny_model(**WIDE, vocab_size=tokenizer.get_vocab_size()).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "text.txt").write_text("the cat sat on the mat again and again. " * 3)
    return path


def test_eval_reports_perplexity_before_and_after(run, capsys):
    files = [str(run), str(run / "text.txt")]
    lm = fastlm.load(run)
    ids = lm.encode((run / "text.txt").read_text())
    before = fastlm.perplexity(lm.model, ids)
    report = fastlm.quantize(lm.model, 4, group_size=32)
    after = fastlm.perplexity(lm.model, ids)
    assert main(["eval", *files]) == 0
    assert f"perplexity {before:.4f}, loss" in capsys.readouterr().out
    flags = ["--weights", "int4", "--group-size", "32"]
    assert main(["eval", *files, *flags]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"perplexity {before:.4f}, ")
    assert second == f"perplexity {after:.4f} ({after / before - 1:+.2%}) with {report}"
    assert main(["eval", *files, *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(before)
    assert found["quantised"]["perplexity"] == pytest.approx(after)
    assert found["quantised"]["bytes_after"] == report.bytes_after


def test_eval_names_what_is_wrong(run, capsys):
    assert main(["eval", str(run), str(run / "nowhere.txt")]) == 1
    assert "nowhere.txt: No such file" in capsys.readouterr().err
    flags = ["--weights", "int4", "--group-size", "256"]
    assert main(["eval", str(run), str(run / "text.txt"), *flags]) == 2
    assert "width that group_size 256 divides, got 64" in capsys.readouterr().err
