"""The step that decoding repeats: without modules on a CPU, as a CUDA graph on a GPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from support.models import scramble, tiny_model
from torch.nn.modules.module import register_module_forward_hook

import fastlm
from fastlm.model import decode_step as decode_step_module
from fastlm.model import generate, graphed_step
from fastlm.model.decode_step import DirectStep, _by_modules, decode_step
from fastlm.model.generate import Generation, Request
from fastlm.model.graphed_step import GraphedStep
from fastlm.model.prefill import prefill
from fastlm.model.products import MOST_ROWS, FewRows
from fastlm.model.sampling import Sampling
from fastlm.testing import assert_as_accurate

MODELS = {
    "qwen3": {},
    "llama": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
    },
    "one head of keys": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "window": {
        "model_type": "qwen2", "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    "tied": {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "gelu"},
}  # fmt: skip


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def stepped(model, lengths, make):
    """Logits after prompts, of two steps of a token and one of two, by what ``make`` gives."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(320, (n,), generator=generator).tolist() for n in lengths]
    cache = model.new_cache(len(lengths), 32)
    step = make(model, cache)
    reads = isinstance(step, DirectStep) and step.reads(prompts)
    first = step.read(prompts) if reads else prefill(model, prompts, cache)
    assert reads == (isinstance(step, DirectStep) and len(set(lengths)) == 1)
    ids = torch.randint(320, (len(lengths), 4), generator=generator)
    parts = [first[:, None], *(step(part).clone() for part in ids.split((1, 1, 2), dim=1))]
    assert cache.lengths == [length + 4 for length in lengths] == cache.seqlens.tolist()
    return torch.cat(parts, 1)


def by_modules(model, cache):
    return functools.partial(_by_modules, model, cache)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("lengths", [(7,), (6, 6, 6), (4, 4, 9, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_computes_what_the_modules_do(name, lengths, count, monkeypatch):
    monkeypatch.setattr("fastlm.model.products._FEW_ELEMENTS", 0)
    model = tiny_model(**MODELS[name]).double()
    scramble(model)
    with threads(count):
        got = stepped(model, lengths, DirectStep)
    want = stepped(model, lengths, by_modules)
    # the angles' tables are float32 in both
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [(7,), (6, 6, 6)])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_as_accurate_as_the_modules(name, lengths):
    model = tiny_model(**MODELS[name])
    truth = stepped(copy.deepcopy(model).double(), lengths, by_modules)
    plain = stepped(model, lengths, by_modules)
    assert_as_accurate("logits", stepped(model, lengths, DirectStep), plain=plain, truth=truth)


@torch.inference_mode()
def test_a_step_follows_rows_that_leave():
    model = tiny_model()
    prompts = [torch.randint(320, (5,)).tolist() for _ in range(3)]
    cache = model.new_cache(3, 16)
    prefill(model, prompts, cache)
    step = decode_step(model, cache)
    first = torch.randint(320, (3, 1))
    step(first)
    cache.keep([2, 1])
    second = torch.randint(320, (2, 1))
    got = step(second)
    for row, prompt in ((0, 2), (1, 1)):
        ids = [*prompts[prompt], int(first[prompt]), int(second[row])]
        want = model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(got[row, 0], want)


@torch.inference_mode()
def test_a_step_keeps_the_memory_of_its_widest():
    model = tiny_model()
    cache = model.new_cache(2, 64)
    step = DirectStep(model, cache)
    logits = [step(torch.zeros(2, count, dtype=torch.int64)) for count in (1, 5, 3, 5, 2, 1)]
    assert len({x.untyped_storage().data_ptr() for x in logits[1:]}) == 1


@torch.inference_mode()
def test_a_step_beyond_the_cache_is_refused():
    model = tiny_model()
    cache = model.new_cache(1, 3)
    prefill(model, [[1, 2, 3]], cache)
    with pytest.raises(ValueError, match="input must fit in the 0 of 3 tokens"):
        decode_step(model, cache)(torch.zeros(1, 1, dtype=torch.int64))


def test_whoever_watches_modules_sees_them():
    model = tiny_model()
    cache = model.new_cache(1, 8)
    assert isinstance(decode_step(model, cache), DirectStep)
    with fastlm.checked():
        assert not isinstance(decode_step(model, cache), DirectStep)
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert not isinstance(decode_step(model, cache), DirectStep)
    handle.remove()
    handle = register_module_forward_hook(lambda *_: None)
    assert not isinstance(decode_step(model, cache), DirectStep)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(decode_step(model, cache), DirectStep)
        model.generate([[1, 2, 3]], 3)


class Scaled(torch.nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


class Shifted(fastlm.CausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return out._replace(logits=out.logits.roll(1, -1))


@pytest.mark.parametrize(
    "place", ["mlp", "embedding", "model", "method", "norm", "linear", "width"]
)
@torch.inference_mode()
def test_modules_of_others_decode_as_they_are(place):
    model = tiny_model()
    if place == "mlp":
        model.model.layers[0].mlp = torch.nn.Identity()
    elif place == "embedding":
        weight = model.model.embed_tokens.weight
        model.model.embed_tokens = Scaled.from_pretrained(weight)
    elif place == "model":
        model.__class__ = Shifted
    elif place == "method":
        model.model.layers[1].mlp.forward = lambda hidden: 3 * hidden
    elif place == "norm":
        model.model.norm = torch.nn.LayerNorm(32, elementwise_affine=False)
        model.model.norm.forward = lambda x, residual: (x + residual, x)
    elif place == "width":
        model.model.layers[1].mlp = tiny_model(intermediate_size=40).model.layers[1].mlp
    else:
        model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(
            model.model.layers[0].self_attn.q_proj, torch.nn.Tanh()
        )
    ids = model.generate([[1, 2, 3]], 8)
    want = model(ids).logits[0, 2:-1].argmax(-1)
    assert ids[0, 3:].tolist() == want.tolist()


def test_narrow_models_decode_by_their_modules():
    model = tiny_model().bfloat16()
    assert not isinstance(decode_step(model, model.new_cache(1, 8)), DirectStep)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("size", "count"), [(48, 1), (48, 2), (48, 3), (47, 2), (2, 3)])
def test_products_of_few_rows_are_as_accurate_as_one_product(size, count, rows, bias, monkeypatch):
    monkeypatch.setattr("fastlm.model.products._FEW_ELEMENTS", 0)
    weight, x = torch.randn(size, 40), torch.randn(rows, 40)
    vector = torch.randn(size) if bias else None
    with threads(count):
        product = FewRows(weight, vector)
        got, total = torch.full((rows, size), torch.nan), torch.randn(rows, size)
        calls = [*product.into(x, got), *product.added(x, total)]
    before = total.clone()
    for call in calls:
        call()
    plain = torch.nn.functional.linear(x, weight, vector)
    truth = torch.nn.functional.linear(
        x.double(), weight.double(), None if vector is None else vector.double()
    )
    assert_as_accurate("product", got, plain=plain, truth=truth)
    assert_as_accurate("sum", total, plain=before + plain, truth=before + truth)


class Graph:
    """A CUDA graph as the CPU can play it: replay runs what was captured, and the host does not."""

    captured = 0

    def replay(self) -> None:
        self.run()


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's part in a capture."""

    @contextlib.contextmanager
    def captures(graph, pool, stream):
        assert pool == "pool"
        Graph.captured += 1
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    for name, fake in {
        "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": Graph, "graph": captures, "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: "pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(graphed_step.torch.cuda, name, fake)
    monkeypatch.setattr(Graph, "captured", 0)
    original = GraphedStep._captured

    def captured(self, bucket):
        graph, inputs, logits = original(self, bucket)
        whole = self._whole
        # a capture runs nothing
        whole.seqlens[:bucket] -= 1

        def run():
            # on the memory that was captured, and without a word to the host
            rows = whole.part(0, bucket)
            rows.set_lengths(rows.seqlens.tolist())
            logits.copy_(self.step_of(rows)(inputs))

        graph.run = run
        return graph, inputs, logits

    monkeypatch.setattr(GraphedStep, "_captured", captured)
    monkeypatch.setattr(graphed_step, "_kept", weakref.WeakKeyDictionary())


@torch.inference_mode()
def test_a_graph_serves_growing_lengths_and_rows_that_leave(graphs, monkeypatch):
    model = tiny_model(num_key_value_heads=1)
    prompts = [torch.randint(320, (length,)).tolist() for length in (3, 8, 1, 5, 2)]
    cache = model.new_cache(5, 24)
    prefill(model, prompts, cache)
    step = GraphedStep(functools.partial(_by_modules, model, cache), cache)
    step.step_of = lambda rows: functools.partial(_by_modules, model, rows)
    texts = [list(prompt) for prompt in prompts]
    buckets = []
    for kept in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 4, 2, 3], [0, 3, 2], [2, 1], [0], [0]):
        texts = [texts[row] for row in kept]
        cache.keep(kept)
        tokens = torch.randint(320, (len(kept), 1))
        got = step(tokens)
        assert got.shape == (len(kept), 1, 320)
        for row, text in enumerate(texts):
            text.append(int(tokens[row]))
            want = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(got[row, 0], want)
        assert cache.lengths == [len(text) for text in texts] == cache.seqlens.tolist()
        # those that have left stay where every position is one
        bucket = min(1 << (len(kept) - 1).bit_length(), 5)
        assert all(length <= 1 for length in step._whole.seqlens[len(kept) : bucket].tolist())
        buckets.append(Graph.captured)
    # five rows, four, three in the graph of four, two, one
    assert buckets == [1, 1, 2, 2, 3, 4, 4]


# ---- graphs that are kept


@pytest.fixture
def as_on_a_gpu(graphs, monkeypatch):
    """``generate`` of a model as on a GPU: by graphs."""

    def run_as(model):
        def new_step(model, *sizes):
            make = functools.partial(functools.partial, _by_modules, model)
            return graphed_step.graphed_step(model, make, *sizes)

        monkeypatch.setattr(generate, "new_step", new_step)
        step_of = functools.partial(functools.partial, _by_modules, model)
        monkeypatch.setattr(GraphedStep, "step_of", staticmethod(step_of), raising=False)
        return model

    return run_as


def captures_of(model, *arguments, **options):
    """How many graphs a generation captures; its tokens must be those of the modules."""
    before = Graph.captured
    got = model.generate(*arguments, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "new_step", decode_step_module.new_step)
        assert torch.equal(got, model.generate(*arguments, **options))
    return Graph.captured - before


def test_graphs_are_kept_for_generations_of_the_same_shape(as_on_a_gpu):
    model = as_on_a_gpu(tiny_model(max_position_embeddings=600))
    assert captures_of(model, [[1, 2, 3]], 5) == 1
    # other texts and other lengths
    assert captures_of(model, [[7] * 9], 12) == 0
    # rows up to the next power of two
    assert captures_of(model, [[1], [2, 3], [4]], 5) == 1
    assert captures_of(model, [[1], [2, 3], [4], [5] * 7], 5, num_return_sequences=1) == 0
    # a cache that is longer, or of another kind
    assert captures_of(model, [[1]], 4) == 1
    assert captures_of(model, [[1] * 260], 3) == 1
    assert captures_of(model, [[1] * 260], 3, kv_cache="int8") == 1
    assert captures_of(model, [[2] * 270], 3, kv_cache="int8") == 0


class Switched(torch.nn.Linear):
    """As of an adapter, which may be off."""

    is_on = True

    def forward(self, x):
        return super().forward(x) * (2.0 if self.is_on else 1.0)


def test_layers_with_switches_are_captured_each_time(as_on_a_gpu):
    model = as_on_a_gpu(tiny_model())
    layer = model.model.layers[0].mlp
    switched = Switched(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    switched.weight = layer.up_proj.weight
    layer.up_proj = switched
    assert captures_of(model, [[1, 2]], 5) == 1
    switched.is_on = False
    assert captures_of(model, [[1, 2]], 5) == 1


def test_graphs_follow_weights_that_change_in_place_alone(as_on_a_gpu):
    model = as_on_a_gpu(tiny_model())
    assert captures_of(model, [[1, 2]], 5) == 1
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    assert captures_of(model, [[1, 2]], 5) == 0
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight.detach() * 2)
    assert captures_of(model, [[1, 2]], 5) == 1
    again = torch.nn.Linear(*reversed(layer.up_proj.weight.shape), bias=False)
    again.weight = layer.up_proj.weight
    layer.up_proj = again
    assert captures_of(model, [[1, 2]], 5) == 1


def test_generations_side_by_side_have_caches_of_their_own(as_on_a_gpu):
    model = as_on_a_gpu(tiny_model())
    model.generate([[1, 2]], 3)
    kept = graphed_step._kept[model].graphed._whole.keys
    requests = [
        Request(prompt=prompt, max_new_tokens=4, sampling=Sampling()) for prompt in ((1, 2), (3,))
    ]
    both = [Generation(model, [request]) for request in requests]
    got = [[drawn.token for one in both for drawn in one.step()] for _ in range(4)]
    assert both[0]._cache.keys.data_ptr() == kept.data_ptr() != both[1]._cache.keys.data_ptr()
    for row, request in enumerate(requests):
        want = model.generate([list(request.prompt)], 4)[0, len(request.prompt) :]
        assert [tokens[row] for tokens in got] == want.tolist()


def test_a_generation_that_was_stopped_leaves_its_graphs_too(as_on_a_gpu):
    model = as_on_a_gpu(tiny_model())
    generation = Generation(model, [Request(prompt=(1,), max_new_tokens=9, sampling=Sampling())])
    generation.step()
    generation.step()
    generation.end(0)
    with pytest.raises(RuntimeError, match="the generation that it was made for has ended"):
        generation._step(torch.zeros(1, 2, dtype=torch.int64))
    assert captures_of(model, [[1]], 5) == 0


def test_graphs_end_with_their_model(as_on_a_gpu, monkeypatch):
    model = as_on_a_gpu(tiny_model())
    model.generate([[1, 2]], 3)
    gone, kept = weakref.ref(model), graphed_step._kept
    assert len(kept) == 1
    # what stands for a GPU knows the model
    monkeypatch.undo()
    del model
    gc.collect()
    assert gone() is None
    assert len(kept) == 0
