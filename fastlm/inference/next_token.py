"""The distribution of the next token: as numbers, as bars in a terminal, as a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

_EIGHTHS = " ▏▎▍▌▋▊▉"
_BAR, _LINE, _INK, _FAINT = "#2f6db3", "#c9ced6", "#1f2430", "#6b7280"


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
        """Draw the bars into a picture; the suffix of ``path`` says which kind.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib: pip install 'fastlm[plot]'", name=error.name
            ) from None
        rows = len(self.probs)
        most = max(self.probs)
        figure = Figure(figsize=(7.2, 1.3 + 0.33 * rows), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh(range(rows), self.probs, color=_BAR, height=0.74)
        for bar, prob in zip(bars, self.probs, strict=True):
            bar.set_alpha(0.35 + 0.65 * prob / most)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * most)
        labels = [_label(token) for token in self.tokens]
        axes.set_yticks(range(rows), labels, family="monospace", fontsize=11, color=_INK)
        axes.set_xticks([])
        axes.tick_params(length=0, pad=6)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(_LINE)
        for row, prob in enumerate(self.probs):
            text = f"{prob:.1%}" if prob >= 0.001 else f"{prob:.0e}"
            axes.annotate(
                text, (prob, row), (5, 0), textcoords="offset points", va="center",
                fontsize=10, color=_INK,
            )  # fmt: skip
        # no y of our own: the layout makes room only for a title that it places
        figure.suptitle(
            f"Next token after {_quoted(self.prompt)}",
            x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK,
        )  # fmt: skip
        others = self.vocab_size - rows
        shared = f", {others:,} others share {max(0.0, 1 - self.covered):.1%}" if others else ""
        axes.set_title(
            f"entropy {self.entropy:.2f} nats at temperature {self.temperature:g}{shared}",
            loc="left", fontsize=10, color=_FAINT, pad=8,
        )  # fmt: skip
        figure.savefig(path)


def _bar(fraction: float, width: int) -> str:
    eighths = round(fraction * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _label(token: str) -> str:
    """A token on one short line, spaces visible, nothing that would start matplotlib's math."""
    shown = repr(token)[1:-1].replace(" ", "␣")
    return (shown if len(shown) <= 24 else f"{shown[:23]}…").replace("$", r"\$")


def _quoted(prompt: str) -> str:
    shown = repr(prompt)[1:-1].replace("$", r"\$")
    return f"“…{shown[-39:]}”" if len(shown) > 40 else f"“{shown}”"
