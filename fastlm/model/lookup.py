"""Guesses of what comes next, from what came before: prompt lookup decoding.

Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding.  Text that repeats itself, as
code and quotations do, is guessed several tokens at a time; a model verifies a guess in one pass
over its weights (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

# The longest run of tokens to look for, and the shortest: one token alone says little.
_LONGEST, _SHORTEST = 3, 2


class PromptLookup:
    """Where runs of tokens occurred last in a growing sequence.

    Args:
        ids: The tokens so far.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        # a run of tokens -> where the one after its last occurrence stands, and after the one
        # before that: the last is the end of the sequence itself
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token."""
        self._ids.append(token)
        end = len(self._ids)
        for size in range(_SHORTEST, min(_LONGEST, end) + 1):
            run = tuple(self._ids[end - size :])
            last, _ = self._after.get(run, (-1, -1))
            self._after[run] = end, last

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that followed the run that ends the sequence when it last came.

        Of the runs of two and three tokens the longer one that came before; none if neither did.
        """
        end = len(self._ids)
        for size in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            _, at = self._after[tuple(self._ids[end - size :])]
            if at >= 0:
                # as if the text went on repeating what is from there to its end
                period = end - at
                return [self._ids[at + n % period] for n in range(most)]
        return []
