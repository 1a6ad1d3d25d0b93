"""What a tensor group's collectives cost: measured, or by the links between its ranks. Pure.

A sum of n bytes over p ranks takes, by the better of two ways, log2(p) exchanges of all of it, or
2 (p - 1) of a p-th each. A gather of n bytes in all is the second half of the second way. (Thakur,
Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mlx_dist.cluster.costs import Link, ModelCosts
from mlx_dist.cluster.steps import StepShape, interpolate

_NOWHERE = Link(0.0, math.inf)

# Seconds of a sum by its bytes.
Curve = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of a group of `size` ranks, of which `link` is the slowest between two.

    `curve` is what was measured, if anything was, on groups of `measured_size`; for groups of
    another size it is as much more or less as by the formulas. `plan_s` is what a plan takes from
    the first rank to the others, once a step.
    """

    size: int = 1
    link: Link = _NOWHERE
    curve: Curve = field(default_factory=dict)
    measured_size: int = 0
    plan_s: float = 0.0

    def sum_s(self, num_bytes: float) -> float:
        """Seconds of a sum of so many bytes."""
        if not self.curve:
            return _by_link(self.link, self.size, num_bytes)
        measured_s = interpolate(self.curve, num_bytes)
        if self.measured_size == self.size:
            return measured_s
        here_s = _by_link(self.link, self.size, num_bytes)
        there_s = _by_link(self.link, self.measured_size, num_bytes)
        return measured_s * here_s / there_s if there_s else measured_s

    def gather_s(self, num_bytes: float) -> float:
        """Seconds of a gather of so many bytes in all."""
        return self.sum_s(num_bytes) / 2

    def step_s(self, costs: ModelCosts, start: int, end: int, shape: StepShape) -> float:
        """Seconds of all collectives in a step of the stage [start, end); `costs` of any slice."""
        if self.size == 1:
            return 0.0
        seconds = self.plan_s
        for sums, equal in groupby(layer.sums for layer in costs.layers[start:end]):
            seconds += sum(1 for _ in equal) * self.sums_s(sums, shape)
        if start == 0:
            seconds += self.sums_s(costs.entry_sums, shape)
        if end == costs.num_layers:
            seconds += self.logits_s(costs, shape)
        return seconds

    def sums_s(self, sums: Sequence[int], shape: StepShape) -> float:
        """Seconds of sums of so many bytes a token, one after the other."""
        return sum(self.sum_s(num_bytes * shape.num_tokens) for num_bytes in sums)

    def logits_s(self, costs: ModelCosts, shape: StepShape) -> float:
        """Seconds of gathering the logits of the tokens that are sampled."""
        return self.gather_s(costs.logits_bytes * shape.num_sampled) if shape.num_sampled else 0.0


def collectives(
    ranks: Sequence[int],
    links: Sequence[Sequence[Link]],
    measured: Mapping[int, Curve],
    plan_s: float,
) -> Collectives:
    """Those of a group of `ranks`, where `measured` has the curves of some sizes of groups."""
    if len(ranks) == 1:
        return Collectives()
    between = [links[a][b] for a in ranks for b in ranks if a != b]
    # A ring's sum goes from neighbour to neighbour only.
    reached = [link for link in between if math.isfinite(link.latency_s)] or between
    slowest = Link(
        max(link.latency_s for link in reached), min(link.bytes_per_s for link in reached)
    )
    size = min(measured, key=lambda known: abs(known - len(ranks)), default=0)
    plan_s += max(link.latency_s for link in reached)
    return Collectives(len(ranks), slowest, measured.get(size, {}), size, plan_s)


def _by_link(link: Link, size: int, num_bytes: float) -> float:
    doubling_s = math.ceil(math.log2(size)) * link.seconds(num_bytes)
    return min(doubling_s, 2 * (size - 1) * link.seconds(num_bytes / size))
