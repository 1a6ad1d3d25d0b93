"""The ranks of a world without arrays: they execute plans and refuse what real ones would.

Every plan takes effect on all ranks in the same order, so that one model stands for all of them;
only the bytes differ. A token is a function of all the tokens that its sequence has cached: one
wrong token in a cache and everything after it is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from zlib import crc32

from mlx_dist.engine.kv import KvRoom
from mlx_dist.engine.sequence import Request
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import (
    PENALTY_CONTEXT,
    Close,
    Drop,
    Keep,
    Merge,
    Open,
    Opening,
    Plan,
    Step,
    Tokens,
    Vitals,
)

VOCAB_SIZE = 50
# As many of its cached tokens as a sampler must be told.


def next_token(history: tuple[int, ...], seed: int) -> int:
    """What the model says after `history`."""
    return crc32(repr((history, seed)).encode()) % VOCAB_SIZE


def alone(request: Request) -> tuple[list[int], str]:
    """The tokens that `request` gets where nothing else runs, and how it ends."""
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        token = next_token((*request.prompt, *tokens), request.sampling.seed)
        if token in request.stop_tokens:
            return tokens, "stop"
        tokens.append(token)
    return tokens, "length"


@dataclass(slots=True)
class Cached:
    """One sequence's caches: its slot, who it is by its seed, and the tokens in them."""

    slot: int
    seed: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Microbatch:
    """Sequences in order. Their caches are padded to `width` and can take `capacity`."""

    rows: list[Cached]
    width: int
    capacity: int

    @property
    def longest(self) -> int:
        return max(len(row.tokens) for row in self.rows)


class Ranks:
    """What all ranks hold. Raises ProtocolError where a real rank would.

    Caches grow in steps of `growth` tokens; windows hold up to `slack` more than they are.
    """

    def __init__(
        self, rooms: list[KvRoom], *, trim_limit: float = 0, growth: int = 256, slack: int = 0
    ) -> None:
        self.microbatches: dict[int, Microbatch] = {}
        self.entries: dict[int, tuple[int, ...]] = {}
        # All there ever were: one by one, and those of each Open.
        self.openings: list[Opening] = []
        self.opened: list[list[Opening]] = []
        self._rooms = rooms
        self._trim_limit = trim_limit
        self._growth = growth
        self._slack = slack

    @property
    def slots(self) -> list[int]:
        return [row.slot for m in self.microbatches.values() for row in m.rows]

    def slot_bytes(self) -> list[int]:
        """What open slots take on each rank, padding and growth included."""
        sizes = [(len(m.rows), m.capacity) for m in self.microbatches.values()]
        return [
            sum(n * room.cost.bytes_for(size, self._slack) for n, size in sizes if size)
            for room in self._rooms
        ]

    def entry_bytes(self) -> list[int]:
        """What kept entries take on each rank."""
        return [
            sum(room.cost.bytes_for(len(tokens)) for tokens in self.entries.values())
            for room in self._rooms
        ]

    def execute(self, plan: Plan) -> Tokens | None:
        """Do what `plan` says; the last stage's answer if it is a step."""
        match plan:
            case Step():
                return self._step(plan)
            case Open(number, openings):
                self._open(number, openings)
            case Merge(source, target):
                self._merge(source, target)
            case Close(slots):
                self._close(slots)
            case Keep(slot, entry):
                _check(entry not in self.entries, f"entry {entry} was kept twice")
                rows = [r for m in self.microbatches.values() for r in m.rows if r.slot == slot]
                _check(len(rows) == 1, f"slot {slot} was kept and is not open")
                _check(bool(rows[0].tokens), f"slot {slot} was kept and holds nothing")
                self.entries[entry] = rows[0].tokens
            case Drop(entries):
                for entry in entries:
                    _check(entry in self.entries, f"entry {entry} was dropped and is not there")
                    del self.entries[entry]
            case _:
                raise AssertionError(plan)
        return None

    def _open(self, number: int, openings: list[Opening]) -> None:
        slots = [opening.slot for opening in openings]
        _check(number not in self.microbatches, f"microbatch {number} opened twice")
        _check(len({*self.slots, *slots}) == len(self.slots) + len(slots), f"{slots} opened twice")
        rows = [Cached(o.slot, o.sampling.seed, self._begin(o)) for o in openings]
        width = max(len(row.tokens) for row in rows)
        self.microbatches[number] = Microbatch(rows, width, width)
        self.openings += openings
        self.opened.append(openings)

    def _begin(self, opening: Opening) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        if opening.entry is not None:
            _check(opening.entry in self.entries, f"entry {opening.entry} is not there")
            entry = self.entries[opening.entry]
            tokens = entry[: opening.num_cached]
            is_whole = opening.num_cached == len(entry)
            _check(len(tokens) == opening.num_cached > 0, "more was reused than is there")
            _check(is_whole or len(entry) < self._trim_limit, "what cannot be trimmed was")
        _check(opening.num_cached == len(tokens), "tokens were reused from no entry")
        _check(tuple(opening.prefix) == tokens[-PENALTY_CONTEXT:], "a sampler was told lies")
        return tokens

    def _merge(self, source: int, target: int) -> None:
        _check(source in self.microbatches, f"microbatch {source} is not open")
        moved = self.microbatches.pop(source)
        if target not in self.microbatches:
            self.microbatches[target] = moved
            return
        grown = self.microbatches[target]
        for one in (grown, moved):
            if len(one.rows) == 1:
                one.capacity = one.width
        grown.rows += moved.rows
        grown.width = max(grown.width, moved.width)
        grown.capacity = max(grown.capacity, moved.capacity)

    def _close(self, slots: list[int]) -> None:
        _check(bool(slots) and set(slots) <= set(self.slots), f"{slots} are not all open")
        for number, m in list(self.microbatches.items()):
            rest = [row for row in m.rows if row.slot not in slots]
            if not rest:
                del self.microbatches[number]
            elif len(rest) < len(m.rows):
                m.rows = rest
                self._cut_padding(m)
                if len(rest) == 1:
                    m.capacity = m.width

    def _step(self, step: Step) -> Tokens:
        _check(step.microbatch in self.microbatches, f"microbatch {step.microbatch} is not open")
        m = self.microbatches[step.microbatch]
        slots = [row.slot for row in step.rows]
        _check(slots == [row.slot for row in m.rows], f"rows {slots} are not the microbatch's")
        longest = step.shape[1]
        _check(all(row.tokens for row in step.rows), "a row has no tokens")
        _check(not step.sample or longest == 1 or len(slots) == 1, "padding would be sampled from")
        if m.width + longest > m.capacity:
            m.capacity = m.width + self._growth * math.ceil(longest / self._growth)
        m.width += longest
        for row, cached in zip(step.rows, m.rows, strict=True):
            _check(row.position == len(cached.tokens), f"slot {row.slot} is elsewhere")
            cached.tokens += tuple(row.tokens)
        self._cut_padding(m)
        tokens = [next_token(row.tokens, row.seed) for row in m.rows] if step.sample else []
        vitals = [Vitals(0.01, len(self.slots), size, 0) for size in self.slot_bytes()]
        return Tokens(step.microbatch, tokens, [], vitals)

    @staticmethod
    def _cut_padding(m: Microbatch) -> None:
        """Cut off what pads every row on the left."""
        surplus = m.width - m.longest
        m.width -= surplus
        m.capacity -= surplus


def _check(is_right: bool, error: str) -> None:
    if not is_right:
        raise ProtocolError(error)
