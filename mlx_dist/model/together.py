"""Modules that a tensor group runs together. Knows arrays; knows no families and no files.

Each sum depends on the one before, so that all ranks of a group come to them in the same order.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_dist.model.slicing import Part


class Group(Protocol):
    """The ranks of a tensor group, as arrays see them."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def sum(self, array: mx.array) -> mx.array:
        """The sum of every rank's array, on every rank: the same bits."""

    def gather(self, array: mx.array) -> mx.array:
        """Every rank's array, one after the other along the first axis, on every rank."""


class Summed(nn.Module):  # type: ignore[misc]
    """Attention, or an MLP, of which every rank of the group computes a part."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        super().__init__()
        self.module = module
        self._group = group

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._group.sum(self.module(*args, **kwargs))


class Silent(nn.Module):  # type: ignore[misc]
    """A part that is another rank's: it is computed, for the sums that it has inside, in vain."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return mx.where(mx.array(False), self.module(*args, **kwargs), 0)


class InTurn:
    """Sums that do not need each other, made to follow one another in the order of the calls."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._last: mx.array | None = None

    def sum(self, array: mx.array, is_first: bool) -> mx.array:
        """As the group's. The first of a turn waits for none."""
        if self._last is not None and not is_first:
            (array,) = mx.depends([array], [self._last])
        self._last = self._group.sum(array)
        return self._last


class SummedNorm(nn.Module):  # type: ignore[misc]
    """An RMSNorm over all heads, of which this rank has some, whether they count or are copies."""

    def __init__(
        self, norm: nn.RMSNorm, num_entries: int, counts: bool, sums: InTurn, is_first: bool
    ) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps
        self._num_entries = num_entries
        self._counts = mx.array(counts)
        self._sums = sums
        self._is_first = is_first

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        squares = mx.where(self._counts, mx.square(wide).sum(axis=-1, keepdims=True), 0)
        mean = self._sums.sum(squares, self._is_first) / self._num_entries
        normal: mx.array = (wide * mx.rsqrt(mean + self.eps)).astype(x.dtype)
        return normal * self.weight  # type: ignore[no-any-return]


class SlicedEmbedding(nn.Module):  # type: ignore[misc]
    """Some tokens' vectors; those of others come from their ranks. As a head, all logits."""

    def __init__(
        self, embedding: nn.Module, tokens: Sequence[Part], place: int, group: Group
    ) -> None:
        super().__init__()
        self.module = embedding
        self._tokens = tokens
        self._own = tokens[place]
        self._group = group

    def __call__(self, tokens_BL: mx.array) -> mx.array:
        own, start = self._own, self._own.start
        end = start if own.is_idle else own.end
        is_own = mx.logical_and(tokens_BL >= start, tokens_BL < end)
        found_BLD = self.module(mx.where(is_own, tokens_BL - start, 0))
        return self._group.sum(mx.where(is_own[..., None], found_BLD, 0))

    def as_linear(self, hidden_BLD: mx.array) -> mx.array:
        return _all_logits(self.module.as_linear(hidden_BLD), self._tokens, self._group)


class SlicedHead(nn.Module):  # type: ignore[misc]
    """A head of which every rank computes some tokens' logits."""

    def __init__(self, head: nn.Module, tokens: Sequence[Part], group: Group) -> None:
        super().__init__()
        self.module = head
        self._tokens = tokens
        self._group = group

    def __call__(self, hidden_BLD: mx.array) -> mx.array:
        return _all_logits(self.module(hidden_BLD), self._tokens, self._group)


def _all_logits(own_BLV: mx.array, tokens: Sequence[Part], group: Group) -> mx.array:
    """The logits of all tokens (B, L, V), from those of this rank's."""
    sizes = [0 if part.is_idle else part.end - part.start for part in tokens]
    width = max(part.end - part.start for part in tokens)
    if own_BLV.shape[-1] < width:
        own_BLV = mx.pad(own_BLV, [(0, 0), (0, 0), (0, width - own_BLV.shape[-1])])
    of_ranks = mx.split(group.gather(own_BLV), group.size, axis=0)
    return mx.concatenate([a[..., :size] for a, size in zip(of_ranks, sizes, strict=True)], axis=-1)
