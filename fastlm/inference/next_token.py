"""The distribution of the next token: as numbers, as bars in a terminal, as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlm.inference import picture
from fastlm.model.sampling import scaled

_EIGHTHS = " ▏▎▍▌▋▊▉"


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
        logprobs = scaled(logits.double(), temperature).log_softmax(dim=-1)
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

        ``bytes`` is None for a token that is no text alone, ``logprob`` for one of probability 0.
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
                    # JSON has no infinity
                    "logprob": logprob if math.isfinite(logprob) else None,
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
            ArgumentError: The suffix is none of ``fastlm.inference.picture.KINDS``.
            MissingPackageError: matplotlib is not installed.
        """
        picture.draw(self, path)


def _bar(fraction: float, width: int) -> str:
    eighths = round(fraction * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
