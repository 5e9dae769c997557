"""Every causal language model that the installed transformers can build small."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from support.hf_configs import ALSO, NOT_BUILT, REFUSED, SMALL, VOCABULARY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fastlm
from fastlm.hf import Report
from fastlm.hf.verify import agree

LENGTH = 12
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> Any:
    """A config of the type with few and narrow layers.

    Raises:
        Exception: What the config's class raises where it cannot be so small.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    there = {*vars(default), *default.attribute_map}
    changes = {name: value for name, value in SMALL.items() if name in there}
    changes |= {name: 0.0 for name in there if "drop" in name or "jitter" in name}
    changes |= ALSO.get(model_type, {})
    return config_class(**{name: value for name, value in changes.items() if value is not ...})


def build(model_type: str) -> nn.Module:
    """The model with numbers large enough that nothing hides, in evaluation mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = small_config(model_type)
        # torch's product of groups of rows has no float64, which the truth is in
        model = transformers.AutoModelForCausalLM.from_config(
            config, experts_implementation="eager"
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.mul_(3.0)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded at its end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    seen = torch.ones_like(ids)
    seen[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": seen, "labels": ids.masked_fill(seen == 0, -100)}


def loss_and_gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """By name; of parameters that the loss does not depend on there is none."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
    model.zero_grad(set_to_none=True)
    return found


def in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


class OpLog(TorchDispatchMode):
    """The operators of fastlm that ran, forward and backward, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastlm":
            self.ran[func._opname] += 1
        return func(*args, **(kwargs or {}))


SAMPLE = [
    "bart", "bert", "biogpt", "bloom", "cohere", "cpmant", "deepseek_v3", "doge", "falcon",
    "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granite_swa", "hyperclovax", "inkling_text", "llama", "mamba", "minicpm3",
    "mistral", "mixtral", "nanochat", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "qwen3_next", "recurrent_gemma", "roberta", "stablelm", "xlnet",
]  # fmt: skip


@dataclass
class Result:
    """What became of one type.

    Attributes:
        report: What optimize says.
        ran: What the log of operators says.
        wrong: The first result that breaks the tolerance rule, or None.
        restored: Whether the model gave the same bits again afterwards.
    """

    report: Report
    ran: dict[str, int]
    wrong: str | None
    restored: bool

    @property
    def is_accelerated(self) -> bool:
        """In attention or loss, forward and backward."""
        attends = self.ran.get("causal_attention_forward", 0)
        return bool(
            (attends and self.ran.get("causal_attention_backward"))
            or self.ran.get("linear_cross_entropy_gradients")
        )


def examine(model_type: str) -> Result:
    """Compare a model's loss and gradients before and after, in training mode."""
    model, inputs = build(model_type).train(), batch()
    # made before some of the models keep states of a pass
    double, *others = in_double(model), *(rounded_otherwise(model, seed) for seed in (2, 3))
    truth = loss_and_gradients(double, **inputs)
    plain = loss_and_gradients(model, **inputs)
    # and with parameters that rounding may have made of the same: it loses the most of these
    usual = plain
    for other in others:
        found = loss_and_gradients(other, **inputs)
        usual = {name: furthest(usual[name], found[name], truth[name]) for name in usual}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fastlm.optimize(model)
    with OpLog() as log:
        actual = loss_and_gradients(model, **inputs)
    fastlm.restore(model)
    again = loss_and_gradients(model, **inputs)
    same = again.keys() == plain.keys() and all(torch.equal(again[n], plain[n]) for n in plain)
    return Result(report, dict(log.ran), first_wrong(actual, usual, truth), same)


def rounded_otherwise(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which each parameter is the next number up or down."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            up = torch.randint(2, parameter.shape, generator=generator).bool()
            towards = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, towards))
    return other


def furthest(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    nearer = (first - truth).abs() < (second - truth).abs()
    return torch.where(nearer, second, first)


def first_wrong(
    actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> str | None:
    """How a model's loss and gradients break the tolerance rule, all together; or None."""
    if actual.keys() != truth.keys():
        return f"gradients of other parameters: {sorted(actual.keys() ^ truth.keys())[:3]}"
    return agree(*([x[name] for name in truth] for x in (actual, plain, truth))).why


def row(model_type: str) -> str:
    if model_type in NOT_BUILT:
        return f"| {model_type} | not built | | | | | {NOT_BUILT[model_type]} |"
    result = examine(model_type)
    assert result.wrong is None and result.restored, (model_type, result.wrong)
    assert result.is_accelerated == (model_type not in REFUSED), model_type
    return line(model_type, result)


def line(model_type: str, result: Result) -> str:
    """Of a type in docs/hf_models.md."""
    rows = result.report.rows
    counts = ["" if each.found == 0 else f"{each.replaced} of {each.found}" for each in rows]
    reasons = {f"{each.kind}: {short(reason)}" for each in rows[:2] for reason in each.reasons}
    note = REFUSED.get(model_type) or "; ".join(sorted(reasons))
    return f"| {model_type} | {' | '.join(counts)} | {note} |"


def short(reason: str) -> str:
    """Without what differs between machines and versions."""
    return reason.partition(": ")[0].replace("|", "/")


def page() -> str:
    rows = {model_type: row(model_type) for model_type in TYPES}
    built = [row for row in rows.values() if "| not built |" not in row]
    served = [t for t in rows if t not in NOT_BUILT and t not in REFUSED]
    return PAGE.format(
        version=transformers.__version__, types=len(rows), built=len(built), served=len(served),
        rows="\n".join(rows.values()),
    )  # fmt: skip


PAGE = """# Models of transformers

What `fastlm.optimize` replaces in the causal language models of transformers {version}. Each type
is built small, and its loss and every gradient, in training mode and with padding, are compared
with those of the untouched model against float64, as docs/hf.md says. Of
{types} types {built} are built, of these {served} have attention or loss of ours; none is wrong.
`tests/test_hf_zoo.py` examines a sample in every run and all types in `make test-all`. "2 of 2" are
layers; of losses there is one. Made by

```bash
PYTHONPATH=tests OMP_NUM_THREADS=1 python -P -m support.hf_zoo docs/hf_models.md
```

| type | attention | loss | norms | rotary | MLPs | what is not replaced, and why |
|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    Path(sys.argv[1]).write_text(page())
