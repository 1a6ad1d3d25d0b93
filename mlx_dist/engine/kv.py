"""KV memory, promised before a sequence enters. Pure: knows bytes and tokens, no arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_dist.messages import KvCost

# mlx-lm's caches grow in steps of this many tokens.
_GROWTH = 256


@dataclass(frozen=True, slots=True)
class KvRoom:
    """What sequences cost one rank, and the bytes it has for them and for kept entries."""

    cost: KvCost
    budget_bytes: int


class KvLedger:
    """Counts the worst case of every microbatch on every rank.

    Sequences of a microbatch are padded to the longest, so each costs as much as that one can
    come to need. `slack` is the number of tokens that a step may add beyond a window.
    """

    def __init__(self, rooms: Sequence[KvRoom], slack: int) -> None:
        self._rooms = tuple(rooms)
        self._slack = slack

    @property
    def budget_bytes(self) -> tuple[int, ...]:
        return tuple(room.budget_bytes for room in self._rooms)

    def bytes_of(self, num_tokens: int) -> tuple[int, ...]:
        """The most that one sequence's caches of `num_tokens` cost each rank."""
        return tuple(room.cost.bytes_for(num_tokens, self._slack) for room in self._rooms)

    def reserved_bytes(self, microbatches: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """What microbatches whose sequences may grow to these lengths can cost each rank."""
        rows = [(len(lengths), max(lengths) + _GROWTH) for lengths in microbatches if lengths]
        return tuple(
            sum(count * room.cost.bytes_for(width, self._slack) for count, width in rows)
            for room in self._rooms
        )

    def fits(self, microbatches: Iterable[Sequence[int]], kept: Sequence[int] | None) -> bool:
        """Whether these microbatches fit on every rank beside entries of `kept` bytes on each."""
        reserved = self.reserved_bytes(microbatches)
        kept = kept or (0,) * len(reserved)
        return all(
            used + extra <= budget
            for used, extra, budget in zip(reserved, kept, self.budget_bytes, strict=True)
        )

    def most_tokens(self) -> int:
        """The longest sequence, with its answer, that fits an empty server."""
        low, high = 0, 1 << 32
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([[middle]], None) else (low, middle - 1)
        return low
