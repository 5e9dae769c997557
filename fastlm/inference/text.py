"""Text from a growing list of tokens, a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from fastlm._errors import ArgumentError

# what a decoder puts where bytes do not form a character, or not yet
_REPLACEMENT = "\ufffd"
# a character is at most 4 bytes of UTF-8, so its beginning is in no more than the last 3 tokens
_LONGEST_WAIT = 3
# tokens of the prompt that the first pieces are decoded with, for decoders that drop a first space
_CONTEXT = 6


class TextStream:
    """Decode tokens one by one; the pieces join to valid Unicode.

    Byte-level tokens may end inside a character: such a piece is held back until the character is
    complete.

    Args:
        tokenizer: Knows the tokens.
        prompt_ids: What the first token follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        # the text of _ids[:_done] has been returned, decoding starts at _ids[_start]
        self._start, self._done = 0, len(self._ids)

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        self._ids.append(token_id)
        end = len(self._ids)
        if self._text(end).endswith(_REPLACEMENT):
            end = max(self._done, end - _LONGEST_WAIT)
        return self._take(end)

    def finish(self) -> str:
        """What was held back, with U+FFFD for the incomplete character."""
        return self._take(len(self._ids))

    def _take(self, end: int) -> str:
        if end == self._done:
            return ""
        text = self._text(end)
        self._start, self._done = self._done, end
        return text

    def _text(self, end: int) -> str:
        """Text of the tokens from ``_done`` to ``end``, decoded behind those before."""
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._tokenizer.decode(self._ids[self._start : end])[len(before) :]


class StopStrings:
    """Let text through up to the first of some strings.

    The end of what came so far is held back while it may be the beginning of one.

    Args:
        stop: The strings, none of them empty.

    Raises:
        ArgumentError: One is empty or no string.
    """

    def __init__(self, stop: str | Sequence[str] | None) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        for string in self._stop:
            if not isinstance(string, str) or not string:
                raise ArgumentError(
                    f"generate: stop must be strings that are not empty, got {stop!r}"
                )
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that may be shown; nothing once a stop string was found."""
        if self.found:
            return ""
        text = self._held + text
        ends = [text.find(string) for string in self._stop if string in text]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest beginning of ``string`` that ends ``text``."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
