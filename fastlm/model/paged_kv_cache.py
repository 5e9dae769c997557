"""Keys and values in pages that sequences share until they differ.

Sequences take pages as they grow and give them back when they end (Kwon et al., 2023,
https://arxiv.org/abs/2309.06180), so memory is that of the tokens there are, not of the longest
sequence there may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fastlm.model.kv_cache import following, new_scales
from fastlm.ops.attention_with_kv_cache import attention_with_kv_cache


class PagedKVCache:
    """``num_pages`` pages of ``page_size`` tokens in every layer, and who has which.

    A sequence is known by a number, from :meth:`add` until :meth:`free`.  One made by :meth:`fork`
    shares the pages of the other; a page that several have is copied before one of them writes to
    it.  All bookkeeping is on the host, which reads nothing of the device.

    Attributes:
        keys: ``(layers, pages, page_size, G, D)``, of the model's dtype or int8.
        values: Same shape and dtype.
        scales: Of int8, those of keys and of values, ``(layers, pages, page_size, G)`` float32;
            else both None.
        max_length: Tokens that a sequence may have.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.scales = new_scales(self.keys)
        self.max_length = max_length
        # the last one is handed out first
        self._free = list(reversed(range(num_pages)))
        self._owners = [0] * num_pages
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences there are, oldest first."""
        return tuple(self._lengths)

    def length(self, sequence: int) -> int:
        """Tokens stored of a sequence.

        Raises:
            ValueError: There is no such sequence.
        """
        self._check(sequence)
        return self._lengths[sequence]

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The pages of a sequence, in the order of its tokens.

        Raises:
            ValueError: There is no such sequence.
        """
        self._check(sequence)
        return tuple(self._pages[sequence])

    def add(self) -> int:
        """A new sequence without tokens or pages."""
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = [], 0
        return sequence

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence with the first ``length`` tokens of another, None for all; no copy.

        Raises:
            ValueError: There is no such sequence, or it is shorter.
        """
        length = self.length(sequence) if length is None else length
        self._check_length(sequence, length)
        pages = self._pages[sequence][: self._pages_for(length)]
        for page in pages:
            self._owners[page] += 1
        new = self.add()
        self._pages[new], self._lengths[new] = list(pages), length
        return new

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from ``length`` on; pages behind it are given back, reserved ones too.

        Raises:
            ValueError: There is no such sequence, or it is shorter.
        """
        self._check_length(sequence, length)
        pages, keep = self._pages[sequence], self._pages_for(length)
        self._give_back(pages[keep:])
        self._pages[sequence], self._lengths[sequence] = pages[:keep], length

    def advance(self, tokens: Mapping[int, int]) -> None:
        """Count tokens that have been stored, of each sequence, where there was room reserved.

        Raises:
            ValueError: There is no such sequence, or its pages end before.
        """
        for sequence, more in tokens.items():
            room = len(self.pages(sequence)) * self.page_size - self._lengths[sequence]
            if not 0 <= more <= room:
                raise ValueError(f"PagedKVCache: tokens must be in [0, {room}], got {more}")
        for sequence, more in tokens.items():
            self._lengths[sequence] += more

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that no other one has are free again.

        Raises:
            ValueError: There is no such sequence.
        """
        self._check(sequence)
        self._give_back(self._pages.pop(sequence))
        del self._lengths[sequence]

    def rows(self, sequences: Sequence[int]) -> PagedRows:
        """These sequences as the batch of a call, ``model(input_ids, cache=cache.rows(...))``.

        Raises:
            ValueError: One of them is not there, or is given twice.
        """
        return PagedRows(self, sequences)

    def reserve(self, tokens: Mapping[int, int]) -> None:
        """Make room for more tokens of sequences, in pages that each shares with none.

        Args:
            tokens: Sequence to how many more.

        Raises:
            ValueError: There is no such sequence, too few pages are free, or a sequence would be
                longer than the model's context; nothing has changed then.
        """
        owners = dict[int, int]()
        shared: list[tuple[int, int]] = []
        needed = 0
        for sequence, more in tokens.items():
            self._check(sequence)
            if more < 0:
                raise ValueError(f"PagedKVCache: tokens must be at least 0, got {more}")
            length, pages = self._lengths[sequence], self._pages[sequence]
            if length + more > self.max_length:
                raise ValueError(
                    f"PagedKVCache: input must fit in the {self.max_length - length} of "
                    f"{self.max_length} tokens that a sequence may still have, got {more}"
                )
            # the page that the next token goes to is the only one written to that is there already
            first = length // self.page_size
            if more and first < len(pages):
                page = pages[first]
                left = owners.get(page, self._owners[page])
                if left > 1:
                    shared.append((sequence, first))
                    owners[page] = left - 1
            needed += max(0, self._pages_for(length + more) - len(pages))
        needed += len(shared)
        if needed > len(self._free):
            raise ValueError(
                f"PagedKVCache: input must fit in the {len(self._free)} of {self.num_pages} pages "
                f"of {self.page_size} tokens that are free, got tokens for {needed}"
            )
        for sequence, at in shared:
            self._own(sequence, at)
        for sequence, more in tokens.items():
            pages = self._pages[sequence]
            while len(pages) < self._pages_for(self._lengths[sequence] + more):
                pages.append(self._take())

    def _own(self, sequence: int, at: int) -> None:
        """Copy a page that others have too."""
        old, new = self._pages[sequence][at], self._take()
        filled = self._lengths[sequence] - at * self.page_size
        for cache in (self.keys, self.values, *self.scales):
            if cache is None:
                continue
            cache[:, new, :filled] = cache[:, old, :filled]
        self._owners[old] -= 1
        self._pages[sequence][at] = new

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_length(self, sequence: int, length: int) -> None:
        longest = self.length(sequence)
        if not 0 <= length <= longest:
            raise ValueError(f"PagedKVCache: length must be in [0, {longest}], got {length}")

    def _check(self, sequence: int) -> None:
        if sequence not in self._lengths:
            raise ValueError(
                f"PagedKVCache: sequence must be one of {list(self._lengths)}, got {sequence}"
            )


class PagedRows:
    """Sequences of a :class:`PagedKVCache` as the rows of a batch.

    Attributes:
        cache: Where they are.
        sequences: Their numbers, one for each row.
    """

    def __init__(self, cache: PagedKVCache, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            cache.length(sequence)
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"PagedKVCache: sequences must differ, got {list(sequences)}")
        self.cache = cache
        self.sequences = tuple(sequences)
        self._table = torch.empty(0)
        self._seqlens = torch.empty(0)

    @property
    def device(self) -> torch.device:
        return self.cache.keys.device

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have, where there are pages for them."""
        return self.cache.max_length

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored so far, of each sequence."""
        return [self.cache.length(sequence) for sequence in self.sequences]

    def check_room(self, batch: int, tokens: int | Sequence[int]) -> None:
        """Refuse tokens that do not fit, before anything is written; else take pages for them.

        Args:
            batch: Number of rows.
            tokens: How many more in each row, or one number for all.

        Raises:
            ValueError: The batch differs, or too few pages are free.
        """
        if batch != self.batch:
            raise ValueError(f"PagedKVCache: input must have batch {self.batch}, got {batch}")
        more = [tokens] * batch if isinstance(tokens, int) else tokens
        self.cache.reserve(dict(zip(self.sequences, more, strict=True)))
        pages = [self.cache.pages(sequence) for sequence in self.sequences]
        longest = max(map(len, pages), default=0)
        # a page that is not there: a row that needed it would be NaN
        table = [[*row, *[-1] * (longest - len(row))] for row in pages]
        device = self.cache.keys.device
        self._table = torch.tensor(table, dtype=torch.int32).view(batch, longest).to(device)
        self._seqlens = torch.tensor(self.lengths, dtype=torch.int32).to(device)

    @property
    def scales(self) -> tuple[Tensor | None, ...]:
        return self.cache.scales

    def part(self, start: int, end: int) -> PagedRows:
        """The rows from ``start`` to ``end`` as a batch of their own."""
        return PagedRows(self.cache, self.sequences[start:end])

    def spread(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Make row b row ``sources[b]`` or a fork of it, which has ``lengths[sources[b]]``."""
        rows = list[int]()
        for source in sources:
            row = self.sequences[source]
            rows.append(self.cache.fork(row, lengths[source]) if row in rows else row)
        self.sequences = tuple(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the sequences ``rows``, in this order, and free the others."""
        kept = tuple(self.sequences[row] for row in rows)
        for sequence in set(self.sequences) - set(kept):
            self.cache.free(sequence)
        self.sequences = kept

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens of each sequence are kept.

        Raises:
            ValueError: A sequence has fewer.
        """
        for sequence, length in zip(self.sequences, lengths, strict=True):
            self.cache.truncate(sequence, length)

    def positions(self, tokens: int) -> Tensor:
        return following(self._seqlens, self.lengths, tokens)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window_size: int | None,
        *,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Rotate, store, attend: ``(B, T, H, D)``."""
        cos, sin = rotary if rotary is not None else (None, None)
        k_scale, v_scale = (None if x is None else x[layer] for x in self.cache.scales)
        out = attention_with_kv_cache(
            query, self.cache.keys[layer], self.cache.values[layer], key=key, value=value,
            cache_seqlens=self._seqlens, block_table=self._table,
            rotary_cos=cos, rotary_sin=sin, window_size=window_size,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return cast(Tensor, out)

    def store(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Write ``(N, G, D)`` keys and values, each at its row and position, ``(N,)`` int64.

        Not into int8 pages: only attention rounds to them.
        """
        size = self.cache.page_size
        pages = self._table[rows, positions // size].long()
        self.cache.keys[layer, pages, positions % size] = key
        self.cache.values[layer, pages, positions % size] = value

    def advance(self, tokens: int | Sequence[int]) -> None:
        """Count tokens that every layer has stored: as many of each row, or a number for each."""
        more = [tokens] * self.batch if isinstance(tokens, int) else tokens
        self.cache.advance(dict(zip(self.sequences, more, strict=True)))
