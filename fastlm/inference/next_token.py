"""The distribution of the next token: as numbers, as bars in a terminal, as a picture."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

_EIGHTHS = " ▏▎▍▌▋▊▉"
_BAR, _REST, _INK, _FAINT = "#3b6ea8", "#c9ced6", "#1f2430", "#7a8190"


@dataclass(frozen=True)
class NextToken:
    """The most likely next tokens after a prompt.

    Probabilities are of the whole vocabulary at ``temperature``: nothing is cut off.

    Attributes:
        prompt: The text before.
        temperature: Divided the logits.
        ids: Token ids, most likely first.
        tokens: Their texts; bytes that are no character alone show as U+FFFD.
        probs: Their probabilities.
        logprobs: Natural logarithms of these.
        entropy: Of the whole distribution, in nats.
        vocab_size: Number of tokens there are.
    """

    prompt: str
    temperature: float
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    probs: tuple[float, ...]
    logprobs: tuple[float, ...]
    entropy: float
    vocab_size: int

    @classmethod
    def of(
        cls, logits: Tensor, tokenizer: Tokenizer, prompt: str, top_k: int, temperature: float
    ) -> NextToken:
        """From logits ``(V,)``."""
        logprobs = (logits.double() / temperature).log_softmax(dim=-1)
        probs = logprobs.exp()
        # 0 log 0 = 0
        entropy = -torch.where(probs > 0, probs * logprobs, 0.0).sum()
        best, ids = logprobs.topk(min(top_k, len(logprobs)))
        id_list = ids.tolist()
        return cls(
            prompt=prompt,
            temperature=temperature,
            ids=tuple(id_list),
            tokens=tuple(tokenizer.decode([i], skip_special_tokens=False) for i in id_list),
            probs=tuple(best.exp().tolist()),
            logprobs=tuple(best.tolist()),
            entropy=entropy.item(),
            vocab_size=len(logprobs),
        )

    @property
    def covered(self) -> float:
        """Probability of the tokens listed."""
        return sum(self.probs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; tokens in the shape of OpenAI's ``top_logprobs``, with id and prob added.

        ``bytes`` is None for a token that is no text alone.
        """
        rows = zip(self.tokens, self.ids, self.probs, self.logprobs, strict=True)
        return {
            "prompt": self.prompt,
            "temperature": self.temperature,
            "entropy": self.entropy,
            "vocab_size": self.vocab_size,
            "top_logprobs": [
                {
                    "token": token,
                    "id": token_id,
                    "prob": prob,
                    "logprob": logprob,
                    "bytes": None if "\ufffd" in token else list(token.encode()),
                }
                for token, token_id, prob, logprob in rows
            ],
        }

    def bars(self, width: int = 40) -> str:
        """One line per token: its text, its probability, a bar; the longest bar has ``width``."""
        labels = [repr(token) for token in self.tokens]
        room = max(map(len, labels), default=0)
        most = max(self.probs, default=1.0)
        return "\n".join(
            f"{label:<{room}}  {prob:6.1%}  {_bar(prob / most, width)}".rstrip()
            for label, prob in zip(labels, self.probs, strict=True)
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the bars, and one for all other tokens, into a picture; its suffix says which kind.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib: pip install 'fastlm[plot]'", name=error.name
            ) from None
        others = self.vocab_size - len(self.ids)
        labels = [_label(token) for token in self.tokens]
        probs, colours = list(self.probs), [_BAR] * len(self.probs)
        if others:
            labels.append(f"{others:,} others")
            probs.append(max(0.0, 1.0 - self.covered))
            colours.append(_REST)
        rows = len(probs)
        figure = Figure(figsize=(7.2, 1.5 + 0.34 * rows), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(rows), probs, color=colours, height=0.72)
        axes.invert_yaxis()
        axes.set_yticks(range(rows), labels, family="monospace", fontsize=10.5, color=_INK)
        axes.set_xlim(0, 1.14 * max(probs))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(_REST)
        for row, prob in enumerate(probs):
            text = f"{prob:.1%}" if prob >= 0.001 else f"{prob:.0e}"
            axes.annotate(
                text, (prob, row), (5, 0), textcoords="offset points", va="center",
                fontsize=9.5, color=_INK if row < len(self.ids) else _FAINT,
            )  # fmt: skip
        axes.set_title(
            f"next token after {_quoted(self.prompt)}",
            loc="left",
            fontsize=11.5,
            color=_INK,
            pad=26,
        )
        axes.annotate(
            f"temperature {self.temperature:g}   entropy {self.entropy:.2f} nats   "
            f"top {len(self.ids)} cover {self.covered:.1%}",
            (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
            fontsize=9.5, color=_FAINT,
        )  # fmt: skip
        figure.savefig(path)


def _bar(fraction: float, width: int) -> str:
    eighths = round(fraction * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _label(token: str) -> str:
    """A token on one short line, spaces visible, nothing that would start matplotlib's math."""
    shown = repr(token)[1:-1].replace(" ", "␣")
    return textwrap.shorten(shown, 24, placeholder="…").replace("$", r"\$")


def _quoted(prompt: str) -> str:
    shown = repr(prompt)[1:-1].replace("$", r"\$")
    return f"“…{shown[-44:]}”" if len(shown) > 45 else f"“{shown}”"
