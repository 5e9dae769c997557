"""Loss and gradients of transformers' models with our parts in them are those of the models."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
from support import hf_zoo
from support.hf_configs import NOT_BUILT, REFUSED

PAGE = Path(__file__).parent.parent / "docs" / "hf_models.md"
BUILT = [each for each in hf_zoo.TYPES if each not in NOT_BUILT]

pytestmark = [
    # what transformers and torch say of small models, and optimize of those it refuses
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "transformers")


@functools.cache
def examined(model_type: str) -> hf_zoo.Result:
    return hf_zoo.examine(model_type)


def check(model_type: str) -> None:
    result = examined(model_type)
    assert result.wrong is None
    assert result.restored, "restore does not give the model back"
    assert result.is_accelerated == (model_type not in REFUSED), result.report
    for kind, operator in (
        ("attention", "causal_attention_forward"), ("loss", "linear_cross_entropy_gradients"),
    ):  # fmt: skip
        assert result.ran.get(operator, 0) >= result.report[kind].replaced


@pytest.mark.parametrize("model_type", hf_zoo.SAMPLE)
def test_gives_the_loss_and_gradients_of_the_untouched_model(model_type):
    check(model_type)
    line = f"{hf_zoo.line(model_type, examined(model_type))}\n"
    assert line in PAGE.read_text(), "the page says otherwise"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [each for each in BUILT if each not in hf_zoo.SAMPLE])
def test_so_does_every_other_type(model_type):
    check(model_type)


def test_most_of_the_sample_and_of_all_types_are_accelerated():
    assert len(hf_zoo.SAMPLE) == len(set(hf_zoo.SAMPLE)) == 40
    assert sum(examined(each).is_accelerated for each in hf_zoo.SAMPLE) >= 30
    assert len(set(BUILT) - REFUSED.keys()) >= 110


def test_every_type_has_a_line_on_the_page_and_a_place_in_the_lists():
    text = PAGE.read_text()
    for each in hf_zoo.TYPES:
        assert f"\n| {each} | " in text, each
    assert set(NOT_BUILT) | set(REFUSED) <= set(hf_zoo.TYPES)
    for each, why in NOT_BUILT.items():
        assert f"| {each} | not built | | | | | {why} |" in text


def test_a_wrong_gradient_is_seen():
    model = hf_zoo.build("llama").train()
    truth = hf_zoo.loss_and_gradients(hf_zoo.in_double(model), **hf_zoo.batch())
    plain = hf_zoo.loss_and_gradients(model, **hf_zoo.batch())
    assert hf_zoo.first_wrong(plain, plain, truth) is None
    for name in ("loss", "lm_head.weight", "model.norm.weight"):
        wrong = {**plain, name: plain[name] * (1 + 1e-4)}
        assert "results differ" in hf_zoo.first_wrong(wrong, plain, truth)
    del wrong["loss"]
    assert "other parameters" in hf_zoo.first_wrong(wrong, plain, truth)
