"""Tiny models of transformers as folders, with a tokenizer, as users have them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from support import hf_zoo
from support.models import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), eos_token="<|end|>", bos_token="<|end|>"
    )
    made.chat_template = template
    return made


def write_model(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model with random weights, wide enough that its distributions are far from uniform."""
    torch.manual_seed(0)
    config = hf_zoo.small_config(model_type)
    for name, value in {"vocab_size": 320, **changes}.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    # a bar for each file
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
