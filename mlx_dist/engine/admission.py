"""Who may enter: the queue, the slots, KV memory and what is kept for reuse. Pure.

Nothing enters whose worst case does not fit on every rank beside everybody else's. What is kept
of earlier sequences takes the memory that is left, and makes room when it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger
from mlx_dist.engine.prefix import Match, PrefixIndex
from mlx_dist.engine.sequence import Request, Sequence
from mlx_dist.errors import NotReadyError, PromptTooLongError, QueueFullError
from mlx_dist.messages import PENALTY_CONTEXT, Drop, Keep, Opening, Plan

# The most prompt tokens of a step, by how many are cached before them.
Budget = Callable[[int], int]

# Fewer tokens are computed about as fast as they are copied.
_LEAST_REUSED = 8


@dataclass(frozen=True, slots=True)
class Reuse:
    """Whether ranks keep caches for reuse. Of those of `trim_limit` tokens or more, all or none."""

    is_on: bool = False
    trim_limit: float = 0


@dataclass(frozen=True, slots=True)
class ReuseCounts:
    """How often a kept entry served a new prompt, and how many tokens that saved."""

    queries: int = 0
    hits: int = 0
    hit_tokens: int = 0


@dataclass(slots=True)
class Group:
    """Sequences that are prefilled together and then join microbatch `target`.

    `plans` come before their `Open`.
    """

    target: int
    sequences: list[Sequence] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)


class Admission:
    """Turns waiting requests into sequences with slots, in the order they came."""

    def __init__(self, batching: Batching, ledger: KvLedger, max_queue: int, reuse: Reuse) -> None:
        self.waiting: deque[Sequence] = deque()
        self.prefix = PrefixIndex(len(ledger.budget_bytes))
        self.reuse_counts = ReuseCounts()
        self.is_draining = False
        self._batching = batching
        self._ledger = ledger
        self._max_queue = max_queue
        self._reuse = reuse
        self._ids = count()
        self._entry_ids = count()
        self._free_slots: list[int] = []
        self._num_slots = 0

    def check(self, request: Request, num_new: int = 1) -> None:
        """Raise unless `num_new` requests like this one can be taken now.

        NotReadyError while draining, PromptTooLongError for one that can never be served, and
        QueueFullError for one that may come again later.
        """
        assert request.prompt and request.max_tokens > 0
        if not self._ledger.fits([[request.most_tokens]], None):
            raise PromptTooLongError(
                f"the prompt's {len(request.prompt)} tokens with {request.max_tokens} of answer "
                f"do not fit the KV memory, which takes {self._ledger.most_tokens()}; shorten "
                "it, ask for fewer tokens, or give --kv-memory-gb more"
            )
        self.check_room(num_new)

    def check_room(self, num_new: int) -> None:
        """Raise NotReadyError or QueueFullError unless `num_new` more may wait now."""
        if self.is_draining:
            raise NotReadyError("the server is ending and takes no more requests")
        if len(self.waiting) + num_new > self._max_queue:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already; try again later",
                retry_after_s=1.0,
            )

    def submit(self, request: Request) -> Sequence:
        """Queue a request. Raises what `check` raises."""
        self.check(request)
        sequence = Sequence(next(self._ids), request)
        self.waiting.append(sequence)
        return sequence

    def next_group(self, members: list[list[Sequence]], most_prefill: Budget) -> Group | None:
        """The next sequences that can enter and are prefilled together, or None.

        `members` are those of each microbatch already: as many as decode at a time, and perhaps
        more for sequences of other lengths. Several make a group only if one step
        within `most_prefill`, padding included, is enough for them.
        """
        num_active = sum(map(len, members))
        num_free = self._batching.num_microbatches * self._batching.max_sequences - num_active
        if not self.waiting or not num_free:
            return None
        group = Group(self._target(members, self.waiting[0]))
        # Spread before any is full.
        num_in_all = self._num_in_all(members)
        share = -(-num_in_all // self._batching.num_microbatches_for(num_in_all))
        room = min(share, self._batching.max_sequences) - len(members[group.target])
        room = min(max(room, 1), num_free)
        while self.waiting and len(group.sequences) < room:
            together = [*members[group.target], *group.sequences, self.waiting[0]]
            if group.sequences and _padding(together) > self._batching.most_padding:
                break
            if not self._enter(self.waiting[0], group, members, most_prefill):
                break
            group.sequences.append(self.waiting.popleft())
        for opening in group.openings:
            if opening.entry is not None:
                self.prefix.unpin(opening.entry)
        return group if group.sequences else None

    def borders(self, request: Request) -> tuple[int, ...]:
        """Where the prompt's caches must be kept, for they cannot be cut there later."""
        if not self._reuse.is_on or request.record:
            return ()
        return tuple(b for b in request.borders if b >= self._reuse.trim_limit)

    def free(self, sequence: Sequence) -> None:
        """Take back the slot of a sequence that is over."""
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        sequence.slot = None

    def keep(self, sequence: Sequence, members: list[list[Sequence]]) -> list[Plan]:
        """Plans that keep a copy of the sequence's caches, if there is memory and use for it."""
        tokens = sequence.cached
        if (
            not self._reuse.is_on
            or sequence.request.record
            or len(tokens) < _LEAST_REUSED
            or self.prefix.covers(tokens)
        ):
            return []
        assert sequence.slot is not None
        entry = next(self._entry_ids)
        cost = self._ledger.bytes_of(len(tokens))
        plans: list[Plan] = []
        if not self._make_room(_lengths(members), cost, plans):
            return plans
        dropped = self.prefix.add(entry, tokens, cost, len(tokens) < self._reuse.trim_limit)
        plans.append(Keep(sequence.slot, entry))
        return [*plans, Drop(dropped)] if dropped else plans

    def _num_in_all(self, members: list[list[Sequence]]) -> int:
        """The sequences once all who wait have entered, as far as there are slots."""
        most = self._batching.num_microbatches * self._batching.max_sequences
        return min(sum(map(len, members)) + len(self.waiting), most)

    def _target(self, members: list[list[Sequence]], sequence: Sequence) -> int:
        """The microbatch for `sequence`: of those it is like in length, one with the fewest.

        Those that suffice for all come first. If it is like none, it gets one of its own, or else
        goes where it causes least padding.
        """
        most = self._batching.most_padding
        num_usual = self._batching.num_microbatches_for(self._num_in_all(members))
        padding = {
            i: _padding([*of_one, sequence])
            for i, of_one in enumerate(members)
            if len(of_one) < self._batching.max_sequences
        }
        alike = [i for i in padding if padding[i] <= most and (i < num_usual or members[i])]
        if alike:
            return min(alike, key=lambda i: (i >= num_usual, len(members[i])))
        return min(padding, key=lambda i: padding[i])

    def _enter(
        self, sequence: Sequence, group: Group, members: list[list[Sequence]], most_prefill: Budget
    ) -> bool:
        """Give `sequence` a slot in `group` and its memory, if it fits in there."""
        lengths = _lengths(members)
        lengths[group.target] += [s.request.most_tokens for s in (*group.sequences, sequence)]
        if not self._ledger.fits(lengths, None):
            return False
        match = self._match(sequence.request)
        num_cached = match.length if match else 0
        if group.sequences and not self._can_share(group, sequence, num_cached, most_prefill):
            return False
        if match:
            self.prefix.pin(match.entry_id)
        if not self._make_room(lengths, None, group.plans):
            if match:
                self.prefix.unpin(match.entry_id)
            # What it would begin with may itself be in the way.
            if group.sequences or not self._make_room(lengths, None, group.plans):
                return False
            match, num_cached = None, 0
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        sequence.slot = self._free_slots.pop()
        sequence.num_cached = sequence.position = num_cached
        self._count_reuse(num_cached)
        group.openings.append(
            Opening(
                sequence.slot,
                sequence.request.sampling,
                match.entry_id if match else None,
                num_cached,
                list(sequence.cached[-PENALTY_CONTEXT:]),
            )
        )
        return True

    def _can_share(
        self, group: Group, sequence: Sequence, num_cached: int, most_prefill: Budget
    ) -> bool:
        """Whether the group's prompts and that of `sequence` can go in one step."""
        num_to_prefill = [s.num_to_prefill for s in group.sequences]
        num_to_prefill.append(len(sequence.request.prompt) - 1 - num_cached)
        most_cached = max(num_cached, *(s.num_cached for s in group.sequences))
        return (
            len(num_to_prefill) * max(num_to_prefill) <= most_prefill(most_cached)
            and (self._batching.pads or min(num_to_prefill) == max(num_to_prefill))
            # A step has no rows without tokens.
            and (min(num_to_prefill) > 0 or max(num_to_prefill) == 0)
            # Their step goes past all borders.
            and self._is_past_borders(group.sequences[0].request, group.sequences[0].num_cached)
            and self._is_past_borders(sequence.request, num_cached)
        )

    def _is_past_borders(self, request: Request, num_tokens: int) -> bool:
        return num_tokens >= max(self.borders(request), default=0)

    def _match(self, request: Request) -> Match | None:
        if not self._reuse.is_on or request.record:
            return None
        match = self.prefix.match(request.prompt, len(request.prompt) - 1)
        return match if match and match.length >= _LEAST_REUSED else None

    def _make_room(
        self, lengths: list[list[int]], extra: tuple[int, ...] | None, plans: list[Plan]
    ) -> bool:
        """Drop kept entries, oldest first, until this fits beside the rest."""
        extra = extra or (0,) * len(self._ledger.budget_bytes)
        if not self._ledger.fits(lengths, extra):
            return False
        while not self._ledger.fits(
            lengths, [a + b for a, b in zip(extra, self.prefix.bytes_by_rank, strict=True)]
        ):
            if (evicted := self.prefix.evict()) is None:
                return False
            plans.append(Drop([evicted]))
        return True

    def _count_reuse(self, num_cached: int) -> None:
        if self._reuse.is_on:
            counts = self.reuse_counts
            self.reuse_counts = ReuseCounts(
                counts.queries + 1,
                counts.hits + (num_cached > 0),
                counts.hit_tokens + num_cached,
            )


def _lengths(members: list[list[Sequence]]) -> list[list[int]]:
    """How long the sequences of each microbatch can get."""
    return [[s.request.most_tokens for s in of_one] for of_one in members]


def _padding(sequences: list[Sequence]) -> int:
    """The tokens that sequences of one microbatch are padded by, all in all."""
    lengths = [max(s.position, len(s.request.prompt)) for s in sequences]
    return len(lengths) * max(lengths) - sum(lengths)
