"""The KV slots of one stage. Knows mlx-lm's caches; knows no ranks and no requests."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_dist.errors import ProtocolError
from mlx_dist.model.families import Anatomy


class SlotCaches:
    """The caches of every open slot, for the layers [start, end) only."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, start: int, end: int) -> None:
        self._model = model
        self._own = {i for layer in range(start, end) for i in anatomy.caches_of_layer[layer]}
        caches = make_prompt_cache(model)
        own_kinds = {_kind(caches[i]) for i in self._own}
        self._idle = {i for i, cache in enumerate(caches) if _kind(cache) not in own_kinds}
        self._slots: dict[int, list[Any]] = {}

    def open(self, slot: int) -> None:
        """Give `slot` empty caches. Raises ProtocolError if it is in use."""
        if slot in self._slots:
            raise ProtocolError(f"slot {slot} was opened twice")
        caches = make_prompt_cache(self._model)
        # A model takes its masks from a fixed cache of each kind, which may belong to a layer
        # that is elsewhere: there it finds a local cache of that kind, which has the same offset.
        local = {_kind(caches[i]): caches[i] for i in sorted(self._own, reverse=True)}
        self._slots[slot] = [
            cache if i in self._own else local.get(_kind(cache), cache)
            for i, cache in enumerate(caches)
        ]

    def close(self, slot: int) -> None:
        """Free the caches of `slot`. Raises ProtocolError if it is not open."""
        if self._slots.pop(slot, None) is None:
            raise ProtocolError(f"slot {slot} was closed and is not open")

    def of(self, slot: int) -> list[Any]:
        """What the model takes as its `cache`, one entry a layer. Raises ProtocolError."""
        if slot not in self._slots:
            raise ProtocolError(f"slot {slot} is used and is not open")
        return self._slots[slot]

    def states(self, slot: int) -> list[Any]:
        """What the caches of `slot` hold here: nested lists of arrays, for `mx.eval`."""
        caches = self._slots[slot]
        return [caches[i].state for i in sorted(self._own) if not caches[i].empty()]

    def advance(self, slot: int, num_tokens: int) -> None:
        """Count `num_tokens` in caches that no layer here fills: models read positions off them."""
        for i, cache in enumerate(self._slots[slot]):
            if i in self._idle:
                _advance(cache, num_tokens)


def _kind(cache: Any) -> tuple[Any, ...]:
    parts = tuple(_kind(part) for part in getattr(cache, "caches", ()))
    return type(cache).__name__, getattr(cache, "max_size", None), parts


def _advance(cache: Any, num_tokens: int) -> None:
    for part in getattr(cache, "caches", (cache,)):
        if hasattr(part, "offset"):
            part.offset += num_tokens
