"""The KV slots of one stage. Knows mlx-lm's caches; knows no ranks and no requests.

Sequences live in microbatches. One alone has mlx-lm's plain caches, so that its arithmetic is
that of one process; several share mlx-lm's batch caches, shorter ones padded on the left.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    make_prompt_cache,
)

from mlx_dist.errors import ProtocolError
from mlx_dist.messages import KvCost, Step
from mlx_dist.model.families import Anatomy

# Tokens.
_LEAST_ROOM = 32


@dataclass(slots=True)
class _Microbatch:
    """Sequences in order: their slots, the tokens cached of each, and the model's caches.

    Of `caches`, only the stage's own hold anything; see `SlotCaches`.
    """

    slots: list[int]
    lengths: list[int]
    caches: list[Any]

    @property
    def is_batched(self) -> bool:
        return len(self.slots) > 1


@dataclass(frozen=True, slots=True)
class _Entry:
    """A copy of one sequence's caches, the stage's own only, and the tokens in them."""

    num_tokens: int
    caches: list[Any]


class SlotCaches:
    """The caches of every open slot, for the layers [start, end) only.

    `can_batch` says whether several sequences can share a microbatch and whether caches can be
    kept, `can_pad` whether rows of several lengths can share a step; `batches` and `pads` are
    what is proven of the family. From a kept entry of fewer than `trim_limit` tokens any first
    part can be taken, from a longer one only the whole. All three are the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        start: int,
        end: int,
        *,
        batches: bool = True,
        pads: bool = True,
    ) -> None:
        self._model = model
        caches = make_prompt_cache(model)
        of_layers = anatomy.caches_of_layer
        # An embedding may have one, of tokens, which every stage is told.
        shared = set(range(len(caches))).difference(*of_layers)
        self._own = sorted(shared.union(*of_layers[start:end]))
        self.can_batch = batches and all(_can_batch(cache) for cache in caches)
        self.can_pad = self.can_batch and pads
        self.trim_limit = min(_trim_limit(part) for cache in caches for part in _parts(cache))
        kinds = [_kind(cache) for cache in caches]
        # A model takes its masks from a fixed cache of each kind, which may belong to a layer
        # that is elsewhere: there it finds a local cache of that kind, which has the same offset.
        local = {kinds[i]: i for i in reversed(self._own) if i not in shared}
        self._shown = [i if i in self._own else local.get(kind, i) for i, kind in enumerate(kinds)]
        # Of a kind that no layer here uses; models read positions off them.
        self._idle = [i for i, kind in enumerate(kinds) if kind not in local]
        self._microbatches: dict[int, _Microbatch] = {}
        self._entries: dict[int, _Entry] = {}

    @property
    def num_slots(self) -> int:
        return sum(len(m.slots) for m in self._microbatches.values())

    @property
    def kv_bytes(self) -> int:
        """What slots and entries hold on this rank."""
        of_slots = (m.caches[i] for m in self._microbatches.values() for i in self._own)
        of_entries = (cache for entry in self._entries.values() for cache in entry.caches)
        return sum(cache.nbytes for cache in (*of_slots, *of_entries))

    @property
    def digest(self) -> int:
        """A CRC-32 of what is open, in what order and how far, and of what is kept.

        Ranks that have done the same plans have the same.
        """
        is_open = [(number, m.slots, m.lengths) for number, m in sorted(self._microbatches.items())]
        kept = [(number, entry.num_tokens) for number, entry in sorted(self._entries.items())]
        return zlib.crc32(repr((is_open, kept)).encode())

    def cost(self, microbatch: int) -> KvCost:
        """What a token costs here, by an open microbatch of one that has seen some."""
        growing: dict[int | None, int] = {}
        fixed_bytes = 0
        for cache in self._owned(self._get(microbatch)):
            for part in _parts(cache):
                if (keys := getattr(part, "keys", None)) is None:
                    fixed_bytes += part.nbytes
                else:
                    window = getattr(part, "max_size", None)
                    growing[window] = growing.get(window, 0) + part.nbytes // keys.shape[2]
        return KvCost(fixed_bytes, [(cost, window) for window, cost in growing.items()])

    def open(
        self, microbatch: int, slots: Sequence[int], kept: Sequence[tuple[int, int] | None]
    ) -> None:
        """Make a microbatch of new sequences in `slots`.

        Each begins with the first tokens of a kept (entry, number of tokens), or with None.
        Raises ProtocolError if the microbatch or a slot is in use, an entry is not there or has
        no such part, or the slots cannot share a microbatch.
        """
        self._check(len(slots) > 0, f"microbatch {microbatch} was opened without sequences")
        self._check(len(slots) == 1 or self.can_batch, f"slots {slots} cannot share a microbatch")
        self._check(microbatch not in self._microbatches, f"microbatch {microbatch} opened twice")
        used = {slot for m in self._microbatches.values() for slot in m.slots}
        is_new = used.isdisjoint(slots) and len(set(slots)) == len(slots)
        self._check(is_new, f"a slot of {slots} was opened twice")
        singles = [self._begin(*source) if source else self._fresh() for source in kept]
        lengths = [source[1] if source else 0 for source in kept]
        own = [[single[i] for single in singles] for i in self._own]
        if len(singles) > 1:
            own = [[caches[0].merge(caches)] for caches in own]
        self._microbatches[microbatch] = _Microbatch(list(slots), lengths, [])
        self._show(self._microbatches[microbatch], [caches[0] for caches in own])

    def merge(self, source: int, target: int) -> None:
        """Append the sequences of microbatch `source` to `target`, which may not exist yet.

        Raises ProtocolError if there is no `source` or they cannot share a microbatch.
        """
        moved = self._get(source)
        grown = self._microbatches.get(target)
        if grown is None:
            self._microbatches[target] = self._microbatches.pop(source)
            return
        is_right = self.can_batch and source != target
        self._check(is_right, f"microbatch {source} cannot join microbatch {target}")
        del self._microbatches[source]
        own, new = self._batched(grown), self._batched(moved)
        _give_up_room([*own, *new])
        for cache, added in zip(own, new, strict=True):
            cache.extend(added)
        grown.slots += moved.slots
        grown.lengths += moved.lengths
        self._show(grown, own)

    def close(self, slots: Sequence[int]) -> None:
        """Free the caches of `slots`. Raises ProtocolError if one is not open."""
        closing = set(slots)
        for number, m in list(self._microbatches.items()):
            rest = [i for i, slot in enumerate(m.slots) if slot not in closing]
            if len(rest) == len(m.slots):
                continue
            closing.difference_update(m.slots)
            if not rest:
                del self._microbatches[number]
                continue
            own = self._owned(m)
            if len(rest) == 1:
                own = self._extract(own, rest[0])
            else:
                _give_up_room(own)
                for cache in own:
                    cache.filter(mx.array(rest))
            m.slots = [m.slots[i] for i in rest]
            m.lengths = [m.lengths[i] for i in rest]
            self._show(m, own)
        self._check(not closing, f"slots {sorted(closing)} were closed and are not open")

    def keep(self, slot: int, entry: int) -> None:
        """Copy the caches of `slot` and keep them as `entry`.

        Raises ProtocolError if the slot is not open, the entry is there already, or the caches
        cannot be copied.
        """
        self._check(self.can_batch, f"slot {slot} was kept and cannot be copied")
        self._check(entry not in self._entries, f"entry {entry} was kept twice")
        for m in self._microbatches.values():
            if slot in m.slots:
                row = m.slots.index(slot)
                own = self._owned(m)
                copies = self._compact(self._extract(own, row) if m.is_batched else own)
                mx.eval([cache.state for cache in copies if not cache.empty()])
                self._entries[entry] = _Entry(m.lengths[row], copies)
                return
        self._check(False, f"slot {slot} was kept and is not open")

    def drop(self, entries: Sequence[int]) -> None:
        """Free kept entries. Raises ProtocolError if one is not there."""
        for entry in entries:
            self._check(entry in self._entries, f"entry {entry} was dropped and is not there")
            del self._entries[entry]

    def of(self, microbatch: int, slots: Sequence[int]) -> list[Any]:
        """What the model takes as its `cache`. Raises ProtocolError unless `slots` are its own."""
        m = self._get(microbatch)
        self._check(m.slots == list(slots), f"microbatch {microbatch} has {m.slots}, not {slots}")
        return m.caches

    def check(self, step: Step, vocab_size: int) -> None:
        """Raise ProtocolError unless `step` goes on where its microbatch's sequences are.

        And unless its tokens are some of `vocab_size`: MLX looks up any number, in whatever
        memory it points to.
        """
        m = self._get(step.microbatch)
        self.of(step.microbatch, [row.slot for row in step.rows])
        for row, length in zip(step.rows, m.lengths, strict=True):
            self._check(
                row.position == length,
                f"slot {row.slot} has {length} tokens and a step goes on after {row.position}",
            )
            self._check(len(row.tokens) > 0, f"a step has no tokens for slot {row.slot}")
            is_known = min(row.tokens) >= 0 and max(row.tokens) < vocab_size
            self._check(is_known, f"a step has tokens for slot {row.slot} that no model has")
        num_rows, num_tokens = step.shape
        is_sampled = not step.sample or num_rows == 1 or num_tokens == 1
        self._check(is_sampled, f"a step samples after {num_tokens} tokens of {num_rows} rows")

    def pad(self, microbatch: int, lengths: Sequence[int]) -> None:
        """Expect rows of these lengths, padded on the right to the longest; see `advance`.

        Raises ProtocolError if they differ and must not, or one has no tokens.
        """
        m = self._get(microbatch)
        longest = max(lengths)
        self._check(min(lengths) > 0, f"rows of {lengths} tokens in microbatch {microbatch}")
        if m.is_batched and longest > 1:
            for part in (part for cache in self._owned(m) for part in _parts(cache)):
                if isinstance(part, BatchRotatingKVCache):
                    # Its mask takes it to be in order, as it is from the update after it.
                    part._temporal_order()
        if min(lengths) < longest:
            self._check(self.can_pad, f"rows of {lengths} tokens cannot share a step")
            for cache in self._owned(m):
                cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])

    def advance(self, microbatch: int, lengths: Sequence[int]) -> None:
        """Count the tokens that each sequence has grown by, and drop what padded them."""
        m = self._get(microbatch)
        if m.is_batched and max(lengths) > 1:
            for cache in self._owned(m):
                # A layer without attention never fills its own.
                if not cache.empty():
                    cache.finalize()
        width = max(m.lengths) + max(lengths)
        m.lengths = [a + b for a, b in zip(m.lengths, lengths, strict=True)]
        if max(m.lengths) < width:
            # All rows are padded on the left now, which a selection drops.
            for cache in self._owned(m):
                cache.filter(mx.arange(len(m.slots)))
        if self._idle:
            self._show(m, self._owned(m))

    def states(self, microbatch: int) -> list[Any]:
        """What the caches of a microbatch hold here: nested lists of arrays, for `mx.eval`."""
        return [cache.state for cache in self._owned(self._get(microbatch)) if not cache.empty()]

    def _show(self, m: _Microbatch, own: list[Any]) -> None:
        """Put together what the model takes as its caches from the stage's own ones."""
        caches = self._fresh()
        for i in self._idle:
            if m.is_batched:
                caches[i] = caches[i].merge([caches[i]] * len(m.slots))
            _set_offset(caches[i], m.lengths)
        for i, cache in zip(self._own, own, strict=True):
            caches[i] = cache
        m.caches = [caches[shown] for shown in self._shown]

    def _owned(self, m: _Microbatch) -> list[Any]:
        return [m.caches[i] for i in self._own]

    def _batched(self, m: _Microbatch) -> list[Any]:
        """The stage's own caches of `m`, for more than one sequence even if there is one."""
        own = self._owned(m)
        return own if m.is_batched else [cache.merge([cache]) for cache in own]

    def _fresh(self) -> list[Any]:
        caches: list[Any] = make_prompt_cache(self._model)
        return caches

    def _extract(self, batched: list[Any], row: int) -> list[Any]:
        """The plain caches of the sequence in `row` of the stage's own batch caches."""
        fresh = self._fresh()
        return [
            fresh[i] if cache.empty() else cache.extract(row)
            for i, cache in zip(self._own, batched, strict=True)
        ]

    def _compact(self, plain: list[Any]) -> list[Any]:
        """Copies of one sequence's caches without the memory of what was trimmed or is shared."""
        if all(_is_compact(cache) for cache in plain):
            return [copy.copy(cache) for cache in plain]
        copies = self._extract([cache.merge([cache]) for cache in plain], 0)
        for part in (part for cache in copies for part in _parts(cache)):
            if isinstance(part, ArraysCache):
                # Else a view of the microbatch's.
                part.cache = [c if c is None else mx.contiguous(c) for c in part.cache]
        return copies

    def _begin(self, number: int, num_tokens: int) -> dict[int, Any]:
        """The stage's own caches with the first `num_tokens` tokens of a kept entry."""
        self._check(number in self._entries, f"entry {number} was used and is not there")
        entry = self._entries[number]
        surplus = entry.num_tokens - num_tokens
        may_trim = 0 < num_tokens < entry.num_tokens < self.trim_limit
        self._check(surplus == 0 or may_trim, f"entry {number} has no first {num_tokens} tokens")
        # Deep: an assignment to a part of an array shows in every reference to it.
        copies = copy.deepcopy(entry.caches)
        if surplus:
            for cache in copies:
                cache.trim(surplus)
            copies = self._compact(copies)
        return dict(zip(self._own, copies, strict=True))

    def _get(self, microbatch: int) -> _Microbatch:
        found = self._microbatches.get(microbatch)
        if found is None:
            raise ProtocolError(f"microbatch {microbatch} is used and is not open")
        return found

    @staticmethod
    def _check(is_right: bool, error: str) -> None:
        if not is_right:
            raise ProtocolError(error)


def _can_batch(cache: Any) -> bool:
    return all(hasattr(part, "merge") for part in _parts(cache))


def _is_compact(cache: Any) -> bool:
    """Whether a plain cache is known to have no room left: what comes next goes elsewhere."""
    return type(cache) is KVCache and not cache.empty() and cache.keys.shape[2] == cache.offset


def _give_up_room(batched: Sequence[Any]) -> None:
    """Leave the room that batch caches have to grow in, before they are copied whole.

    They make room for a quarter of what they hold then, so that growing seldom copies them.
    """
    for part in (part for cache in batched for part in _parts(cache)):
        if type(part) is BatchKVCache and not part.empty():
            part.keys, part.values = part.keys_and_values()
            part.step = min(BatchKVCache.step, max(_LEAST_ROOM, part.size() // 4))


def _parts(cache: Any) -> Sequence[Any]:
    """The caches of a CacheList, or the cache itself."""
    parts: Sequence[Any] = getattr(cache, "caches", (cache,))
    return parts


def _trim_limit(cache: Any) -> float:
    if not hasattr(cache, "offset"):
        return 0
    return getattr(cache, "max_size", math.inf)


def _kind(cache: Any) -> tuple[Any, ...]:
    parts = tuple(_kind(part) for part in _parts(cache) if part is not cache)
    return type(cache).__name__, getattr(cache, "max_size", None), parts


def _set_offset(cache: Any, lengths: list[int]) -> None:
    for part in _parts(cache):
        if hasattr(part, "offset"):
            part.offset = lengths[0] if len(lengths) == 1 else mx.array(lengths)
