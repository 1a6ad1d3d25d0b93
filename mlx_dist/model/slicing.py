"""Which part of a layer each rank of a tensor group holds. Pure: knows heads, blocks and ranges.

Attention is cut between heads, where there are as many ranks between those of keys and values; an
MLP, or every expert, along its width; the vocabulary between tokens. Any number of ranks works, in
any ratio: what is too small to be cut further leaves some of them idle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mlx_dist.cluster.placement import Slice

Range = tuple[int, int]

# Products run at full speed on widths that are multiples of this.
_USUAL_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Cut:
    """Of `axis`, the ranges [start, end) one after the other, where it has `num_parts` parts.

    A part is one or several entries: of quantized weights, those that hold it.
    """

    axis: int
    ranges: tuple[Range, ...]
    num_parts: int

    def entries(self, length: int) -> list[Range]:
        """The ranges in an axis of `length` entries."""
        for range_ in self.ranges:
            assert all(border * length % self.num_parts == 0 for border in range_)
        return [
            (a * length // self.num_parts, b * length // self.num_parts) for a, b in self.ranges
        ]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """What is left of an array of the shape `whole`."""
        kept = sum(end - start for start, end in self.entries(whole[self.axis]))
        return (*whole[: self.axis], kept, *whole[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's [start, end) of the units that a group shares out.

    One that `is_idle` has none of its own: it holds those of another, and its result is not used.
    """

    start: int
    end: int
    is_idle: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """The query heads of a rank, and those of keys and values that they look at.

    Of ranks that hold the same keys and values, one has `own_keys`.
    """

    queries: Part
    keys: Range
    own_keys: bool


def apportion(num_units: int, weights: Sequence[int], least: int = 0) -> list[Range]:
    """Contiguous shares of `num_units`, as near to the ratio of `weights` as whole units allow.

    Each gets at least `least` units where there are enough. By largest remainders, the first of
    equal ones first.
    """
    total = sum(weights)
    ideal = [num_units * weight / total for weight in weights]
    sizes = [math.floor(share) for share in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda i: (sizes[i] - ideal[i], i))
    for i in by_remainder[: num_units - sum(sizes)]:
        sizes[i] += 1
    if num_units >= least * len(weights):
        for i in range(len(sizes)):
            while sizes[i] < least:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[i] += 1
    return list(pairwise(accumulate(sizes, initial=0)))


def parts(num_units: int, slice_: Slice, block: int = 1) -> list[Part]:
    """Every rank's part of `num_units` units, of which `block` must stay together."""
    assert num_units % block == 0
    shares = apportion(num_units // block, slice_.weights, least=1)
    return [
        Part(start * block, end * block) if end > start else Part(0, block, is_idle=True)
        for start, end in shares
    ]


def width_block(width: int, group_size: int | None) -> int:
    """The entries of an MLP's width that stay together: a group of quantized weights, or a few."""
    return math.gcd(width, _USUAL_BLOCK) if group_size is None else group_size


def heads(num_heads: int, num_kv_heads: int, slice_: Slice, block: int = 1) -> list[Heads]:
    """Every rank's heads; `block` query heads must stay together.

    With more ranks than heads of keys and values, several ranks share one and divide its queries.
    """
    repeats = num_heads // num_kv_heads
    kv_block = block // math.gcd(block, repeats)
    if slice_.size <= num_kv_heads // kv_block or repeats % block:
        found = []
        for part in parts(num_kv_heads, slice_, kv_block):
            queries = Part(part.start * repeats, part.end * repeats, part.is_idle)
            found.append(Heads(queries, (part.start, part.end), not part.is_idle))
        return found
    found = []
    sharing = apportion(slice_.size, [1] * num_kv_heads)
    for head, (first, end) in enumerate(sharing):
        shared = Slice(0, slice_.weights[first:end])
        for place, part in enumerate(parts(repeats, shared, block)):
            queries = Part(head * repeats + part.start, head * repeats + part.end, part.is_idle)
            found.append(Heads(queries, (head, head + 1), place == 0))
    return found
