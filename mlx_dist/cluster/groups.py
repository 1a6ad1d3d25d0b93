"""Tensor groups: which slice of which layers each machine holds. Pure: knows numbers only.

Groups are machines that follow each other, all of the same number. Between groups layers are
placed as between single machines; within one, slices are as large to each other as the machines
are fast, as far as their memories go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dist.cluster import placement
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.placement import WHOLE, Placement, Share, Slice
from mlx_dist.cluster.prediction import group_collectives
from mlx_dist.cluster.problems import group_problem, kv_bytes, problem
from mlx_dist.cluster.steps import StepShape, stage_time
from mlx_dist.config import Split
from mlx_dist.errors import ConfigError

# Weights of slices are small numbers: up to this for the slowest machine, and no larger than a
# speed needs that they tell to within this part.
_MOST_OF_SLOWEST = 8
_NEAR_ENOUGH = 0.05
# Where a memory is too small, slices are parts of so many.
_FINE = 64
_MOST_SHIFTS = 6

Weights = tuple[int, ...]


def place(
    case: Case,
    size: int,
    slices: Weights | Split = Split.auto,
    layers: Weights | Split = Split.auto,
) -> Placement:
    """The shares of groups of `size` machines. `layers` are counts, one for each group.

    Raises PlacementError for what does not fit, ConfigError for `slices` that are not one for each
    machine or groups that are not all alike, and FamilyError.
    """
    _check(case, size, slices)
    numbers = range(len(case.machines))
    groups = [tuple(numbers[first : first + size]) for first in numbers[::size]]
    if isinstance(slices, tuple):
        tried = _Placed.of(case, groups, slices, layers)
    elif slices is Split.even:
        tried = _Placed.of(case, groups, (1,) * len(numbers), layers)
    else:
        tried = _by_speed(case, groups, layers)
    remedy = "use weights of fewer bits, a shorter context or more machines"
    if slices is not Split.auto:
        remedy = f"--slices auto shifts them to where there is room; or {remedy}"
    placement.check(tried.problem, tried.shares, remedy)
    return tried.shares


def weights_by_speed(seconds: Sequence[float]) -> Weights:
    """Small numbers in the ratio of speeds, from what one step of the model takes each machine."""
    ratios = [max(seconds) / each for each in seconds]
    best: tuple[float, Weights] = (math.inf, ())
    for of_slowest in range(1, _MOST_OF_SLOWEST + 1):
        weights = tuple(round(of_slowest * ratio) for ratio in ratios)
        pairs = zip(weights, ratios, strict=True)
        off = max(abs(weight / (of_slowest * ratio) - 1) for weight, ratio in pairs)
        best = min(best, (off, weights))
        if off <= _NEAR_ENOUGH:
            return weights
    return best[1]


def capped(shares: Sequence[float], caps: Sequence[float]) -> list[float] | None:
    """`shares` of 1, none above its cap; what is cut off goes to the others in their ratio.

    None where the caps together are less than 1.
    """
    if sum(caps) < 1:
        return None
    full: set[int] = set()
    while True:
        rest = 1 - sum(caps[i] for i in full)
        free = sum(share for i, share in enumerate(shares) if i not in full)
        found = [caps[i] if i in full else rest * share / free for i, share in enumerate(shares)]
        over = {i for i in range(len(shares)) if found[i] > caps[i]}
        if not over:
            return found
        full |= over


@dataclass(frozen=True, slots=True)
class _Placed:
    """Shares by these weights, and the problem that says whether they fit."""

    weights: Weights
    shares: Placement
    problem: placement.Problem

    @classmethod
    def of(
        cls, case: Case, groups: Sequence[Weights], weights: Weights, layers: Weights | Split
    ) -> _Placed:
        slices = [
            Slice(place, tuple(weights[number] for number in group)) if len(group) > 1 else WHOLE
            for group in groups
            for place in range(len(group))
        ]
        own = [case.slice_costs(slice_) for slice_ in slices]
        num_layers = case.costs.num_layers
        if layers is Split.auto and len(groups) > 1:
            placement.even_counts(num_layers, len(groups), "group")
            together = group_problem(
                groups,
                own,
                case.machines,
                case.links,
                [group_collectives(group, case.links, case.sums) for group in groups],
                case.workload,
                case.objective,
            )
            fit = placement.fits(together)
            stages = (
                placement.best(together, case.objective) if fit else placement.nearest(together)
            )
            cuts = [(stage.start, stage.end) for stage in stages]
        else:
            counts = layers if isinstance(layers, tuple) else None
            cuts = placement.cut(num_layers, len(groups), counts, "group")
        shares = tuple(
            Share(number, start, end, slices[number])
            for group, (start, end) in zip(groups, cuts, strict=True)
            for number in group
        )
        by_rank = problem(
            case.costs, case.machines, case.links, case.workload, case.objective, own=own
        )
        return cls(weights, shares, by_rank)

    @property
    def fits(self) -> bool:
        return placement.is_within_memory(self.problem, self.shares)


def _by_speed(case: Case, groups: Sequence[Weights], layers: Weights | Split) -> _Placed:
    """Slices in the ratio of speeds, shifted until all fit, or unshifted where that cannot be."""
    shape = StepShape(1, 1, case.workload.context_tokens // 2, 1)
    num_layers = case.costs.num_layers
    seconds = [
        stage_time(machine.speeds, case.costs, 0, num_layers, shape).total_s
        for machine in case.machines
    ]
    weights = tuple(
        weight
        for group in groups
        for weight in weights_by_speed([seconds[number] for number in group])
    )
    first = tried = _Placed.of(case, groups, weights, layers)
    for _ in range(_MOST_SHIFTS):
        if tried.fits:
            return tried
        shifted = _shifted(case, groups, first.weights, tried)
        if shifted is None or shifted == tried.weights:
            break
        tried = _Placed.of(case, groups, shifted, layers)
    return tried if tried.fits else first


def _shifted(
    case: Case, groups: Sequence[Weights], speeds: Weights, tried: _Placed
) -> Weights | None:
    """The weights with less for those whose memory was too small; None where all are too small.

    What a machine holds is taken to be a fixed part and its fraction of what can be divided.
    """
    weights: list[int] = []
    for group in groups:
        start, end = tried.shares[group[0]].start, tried.shares[group[0]].end
        whole_bytes = case.costs.weights_bytes(start, end)
        whole_bytes += kv_bytes(case.costs, start, end, case.workload)
        total, fast = (sum(each[number] for number in group) for each in (tried.weights, speeds))
        caps = []
        for number in group:
            fraction = tried.weights[number] / total
            held_bytes = tried.problem.stage_bytes(number, start, end)
            room_bytes = case.machines[number].usable_bytes - held_bytes
            caps.append(max(fraction + room_bytes / whole_bytes, 0.0))
        fractions = capped([speeds[number] / fast for number in group], caps)
        if fractions is None:
            return None
        own = [max(1, math.floor(_FINE * fraction)) for fraction in fractions]
        # What rounding leaves goes to whoever has most room for it.
        room = [cap - weight / _FINE for cap, weight in zip(caps, own, strict=True)]
        own[room.index(max(room))] += max(0, _FINE - sum(own))
        divisor = math.gcd(*own)
        weights += [weight // divisor for weight in own]
    return tuple(weights)


def _check(case: Case, size: int, slices: Weights | Split) -> None:
    num_ranks = len(case.machines)
    if num_ranks % size:
        raise ConfigError(
            f"--parallel tensor={size} does not divide {num_ranks} ranks into groups; start a "
            f"multiple of {size}, or use --parallel tensor for one group of any size"
        )
    if isinstance(slices, tuple) and len(slices) != num_ranks:
        raise ConfigError(
            f"--slices {','.join(map(str, slices))} is for {len(slices)} ranks and there are "
            f"{num_ranks}; write one number per rank"
        )
