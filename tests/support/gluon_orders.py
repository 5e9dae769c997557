"""Every order in which the partitions of a recorded Gluon program may run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from support.gluon_model import Event, HazardError, Place, Recording


class _Barrier(NamedTuple):
    """A phase ends, and the parity changes, when nothing is pending: neither arrivals nor bytes."""

    parity: int
    arrivals: int
    bytes: int


class _State(NamedTuple):
    """Where each partition is, and what barriers, tiles and copies are.

    Of tiles the number of copies that have arrived, and whether one is on its way; of copies those
    on their way, by partition and event.
    """

    counters: tuple[int, ...]
    barriers: tuple[_Barrier, ...]
    tiles: tuple[tuple[int, bool], ...]
    copies: frozenset[tuple[int, int]]


def explore(recording: Recording) -> int:
    """Run the partitions in every order; the number of states they can be in.

    A copy that was issued arrives at any time.  A product reads its tiles until it is waited for.

    Raises:
        HazardError: In some order all wait for ever, a tile is overwritten while a product reads it
            or copies race for it, a product reads what has not arrived or what came after, a
            barrier counts more arrivals than its phase has, or products are at work at the end.
    """
    return _Explorer(recording).run()


class _Explorer:
    def __init__(self, recording: Recording) -> None:
        self._names = list(recording.partitions)
        self._events = list(recording.partitions.values())
        self._arrivals = list(recording.arrivals.values())
        self._barriers = {place: n for n, place in enumerate(recording.arrivals)}
        every = [event for events in self._events for event in events]
        places = dict.fromkeys(event.tile for event in every if event.tile is not None)
        self._tiles = {place: n for n, place in enumerate(places)}
        self._read = [_read_before(events) for events in self._events]

    def run(self) -> int:
        start = _State(
            (0,) * len(self._events),
            tuple(_Barrier(0, count, 0) for count in self._arrivals),
            ((0, False),) * len(self._tiles),
            frozenset(),
        )
        seen, left = {start}, [start]
        while left:
            state = left.pop()
            after = list(self._after(state))
            if not after:
                self._check_end(state)
            for new in after:
                if new not in seen:
                    seen.add(new)
                    left.append(new)
        return len(seen)

    def _check_end(self, state: _State) -> None:
        waiting = [
            f"{name} at {events[at]}"
            for name, events, at in zip(self._names, self._events, state.counters, strict=True)
            if at < len(events)
        ]
        if waiting:
            raise HazardError(f"all wait: {'; '.join(waiting)}")
        for name, read in zip(self._names, self._read, strict=True):
            if read[-1]:
                raise HazardError(f"{name} ends with products at work")

    def _after(self, state: _State) -> Iterator[_State]:
        for partition, events in enumerate(self._events):
            at = state.counters[partition]
            if at == len(events):
                continue
            new = self._done(state, partition, events[at])
            if new is not None:
                counters = list(new.counters)
                counters[partition] += 1
                yield new._replace(counters=tuple(counters))
        for partition, at in state.copies:
            event = self._events[partition][at]
            assert event.tile is not None
            number = self._tiles[event.tile]
            new = self._counted(state, event.barrier, arrivals=0, bytes_=-event.count)
            tiles = list(new.tiles)
            tiles[number] = tiles[number][0] + 1, False
            yield new._replace(tiles=tuple(tiles), copies=new.copies - {(partition, at)})

    def _done(self, state: _State, partition: int, event: Event) -> _State | None:
        """After the next event of a partition; None while it waits."""
        if event.kind == "wait":
            assert event.barrier is not None
            is_over = state.barriers[self._barriers[event.barrier]].parity != event.count
            return state if is_over else None
        if event.kind == "expect":
            return self._counted(state, event.barrier, arrivals=1, bytes_=event.count)
        if event.kind == "arrive":
            return self._counted(state, event.barrier, arrivals=event.count, bytes_=0)
        if event.kind == "copy":
            return self._issued(state, partition, event)
        for place, version in event.reads:
            arrived, is_written = state.tiles[self._tiles[place]]
            if is_written or arrived != version + 1:
                raise HazardError(
                    f"{self._names[partition]} reads copy {version} of {place} when {arrived} have "
                    f"arrived{' and one is on its way' if is_written else ''}"
                )
        return state

    def _issued(self, state: _State, partition: int, event: Event) -> _State:
        assert event.tile is not None
        number = self._tiles[event.tile]
        arrived, is_written = state.tiles[number]
        if is_written:
            raise HazardError(f"two copies to {event.tile} at once")
        for name, read, at in zip(self._names, self._read, state.counters, strict=True):
            if event.tile in read[at]:
                raise HazardError(f"{event.tile} is overwritten while {name} reads it")
        tiles = list(state.tiles)
        tiles[number] = arrived, True
        copies = state.copies | {(partition, state.counters[partition])}
        return state._replace(tiles=tuple(tiles), copies=copies)

    def _counted(self, state: _State, place: Place | None, *, arrivals: int, bytes_: int) -> _State:
        assert place is not None
        number = self._barriers[place]
        parity, pending, missing = state.barriers[number]
        pending, missing = pending - arrivals, missing + bytes_
        if pending < 0:
            raise HazardError(f"barrier {place} counts more arrivals than its phase has")
        if pending == missing == 0:
            parity, pending = parity ^ 1, self._arrivals[number]
        barriers = list(state.barriers)
        barriers[number] = _Barrier(parity, pending, missing)
        return state._replace(barriers=tuple(barriers))


def _read_before(events: list[Event]) -> list[frozenset[Place]]:
    """Before each event, and at the end, the tiles that products at work may read."""
    working: list[frozenset[Place]] = []
    out = [frozenset[Place]()]
    for event in events:
        if event.kind == "mma":
            working = [*working, frozenset(place for place, _ in event.reads)]
        elif event.kind == "mma_wait":
            working = working[len(working) - event.count :] if event.count else []
        out.append(frozenset().union(*working))
    return out
