"""The cheapest way to cut layers into stages, of all there are. Pure: knows tables of costs.

A dynamic program over which machines have had their turn and which was last, with the least cost of
every number of layers placed so far. Machines that are alike in everything take their turns in
their own order only: eight equal ones are as quick as one.
"""

# M machines, S first layer of a stage, E its end, T stops

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf, prod

import numpy as np
from numpy.typing import NDArray

from mlx_dist.errors import PlacementError

# Sums of the same terms in another order differ by less than this part of them.
ROUNDING = 1e-9
# What is gone through in seconds: the sets of 11 different machines after the first.
_MAX_SETS = 1 << 11

Floats = NDArray[np.float64]
# (machine, start, end) of every stage, in pipeline order
Cut = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Stop:
    """A machine's turn, right after any one of the stops `before`; the first stop has none."""

    machine: int
    before: tuple[int, ...]
    may_be_last: bool


# The stops of all orders that begin with one machine; `before` are places in it.
_Route = tuple[_Stop, ...]


@dataclass(frozen=True, slots=True)
class Search:
    """All cuts. `costs` [M, S, E] is inf where a machine must not hold a stage; `hops` [M, M]."""

    routes: tuple[_Route, ...]
    costs: Floats
    hops: Floats

    def least(self, limit: float = inf) -> tuple[float, Cut]:
        """The least cost of stages and hops together with no stage above the limit, and its cut.

        Infinity and an empty cut if there is none.
        """
        costs_MSE = self._up_to(limit)
        total, cut = inf, Cut()
        for route in self.routes:
            placed_TE = self._placed(route, costs_MSE)
            totals_T = self._totals(route, placed_TE)
            last = int(np.argmin(totals_T))
            if totals_T[last] < total:
                total = float(totals_T[last])
                cut = self._walk_back(route, costs_MSE, placed_TE, last)
        return total, cut

    def levelled(self, most: float = inf) -> Cut:
        """The cut whose costliest stage costs least and, of those, the one with the least total.

        Of the cuts that cost no more than `most` in all, and up to rounding. There must be one.
        """
        limits = np.unique(self.costs[np.isfinite(self.costs)])
        smallest = len(limits)
        for route in self.routes:
            is_possible = partial(self._is_possible, route, most)
            # Most routes are no better than one before, and one look is enough for them.
            if smallest and is_possible(limits[smallest - 1]):
                smallest = bisect_left(limits, True, 0, smallest - 1, key=is_possible)
        return self.least(float(limits[smallest]) * (1 + ROUNDING))[1]

    def _is_possible(self, route: _Route, most: float, limit: float) -> bool:
        totals_T = self._totals(route, self._placed(route, self._up_to(limit)))
        return bool(np.any(np.isfinite(totals_T) & (totals_T <= most)))

    def _up_to(self, limit: float) -> Floats:
        return np.where(self.costs <= limit, self.costs, inf)

    def _totals(self, route: _Route, placed_TE: Floats) -> Floats:
        """The least cost of everything if the stop is the last one."""
        back_T = self.hops[[stop.machine for stop in route], route[0].machine]
        may_be_last_T = np.array([stop.may_be_last for stop in route])
        return np.where(may_be_last_T, placed_TE[:, -1] + back_T, inf)

    def _placed(self, route: _Route, costs_MSE: Floats) -> Floats:
        """The least cost of layers [0, end) if the stop's stage is the last of them."""
        placed_TE = np.empty((len(route), costs_MSE.shape[2]))
        for place, stop in enumerate(route):
            if stop.before:
                starts_S = self._arrivals(route, placed_TE, stop).min(axis=0)
                placed_TE[place] = (starts_S[:, None] + costs_MSE[stop.machine]).min(axis=0)
            else:
                placed_TE[place] = costs_MSE[stop.machine, 0]
        return placed_TE

    def _arrivals(self, route: _Route, placed_TE: Floats, stop: _Stop) -> Floats:
        """The least cost until the stop's stage starts at layer S, by the stop before it."""
        machines = [route[place].machine for place in stop.before]
        return placed_TE[list(stop.before)] + self.hops[machines, stop.machine][:, None]

    def _walk_back(self, route: _Route, costs_MSE: Floats, placed_TE: Floats, last: int) -> Cut:
        stop, end = route[last], costs_MSE.shape[2] - 1
        stages: list[tuple[int, int, int]] = []
        while stop.before:
            arrivals = self._arrivals(route, placed_TE, stop)
            start = int(np.argmin(arrivals.min(axis=0) + costs_MSE[stop.machine, :, end]))
            stages.append((stop.machine, start, end))
            stop, end = route[stop.before[int(np.argmin(arrivals[:, start]))]], start
        return ((stop.machine, 0, end), *reversed(stages))


def search(
    costs_MSE: Floats,
    hops_MM: Floats,
    *,
    first: int | None,
    is_order_fixed: bool,
    may_leave_out: bool,
) -> Search:
    """All cuts that begin with the machine `first`, or any for None, under these rules.

    A stage that ends where it starts, or before, must cost infinity. Raises PlacementError if the
    machines have too many orders to go through.
    """
    machines = range(len(costs_MSE))
    if is_order_fixed:
        firsts = list(machines) if first is None else [first]
        # All of them in their order can only begin with the first of them.
        firsts = [begin for begin in firsts if may_leave_out or begin == 0]
        routes = tuple(_in_their_order(machines[begin:], may_leave_out) for begin in firsts)
    else:
        kinds = _kinds(machines, costs_MSE, hops_MM)
        firsts = [kind[0] for kind in kinds] if first is None else [first]
        routes = tuple(_in_any_order(begin, kinds, may_leave_out) for begin in firsts)
    return Search(routes, costs_MSE, hops_MM)


def _in_their_order(machines: Sequence[int], may_leave_out: bool) -> _Route:
    return tuple(
        _Stop(
            machine,
            before=tuple(range(0 if may_leave_out else max(place - 1, 0), place)),
            may_be_last=may_leave_out or place == len(machines) - 1,
        )
        for place, machine in enumerate(machines)
    )


def _in_any_order(first: int, kinds: Sequence[Sequence[int]], may_leave_out: bool) -> _Route:
    """Sets of machines are counts of each kind: how many of it have had their turn."""
    rest = [[machine for machine in kind if machine != first] for kind in kinds]
    num_sets = prod(len(kind) + 1 for kind in rest)
    if num_sets > _MAX_SETS:
        raise PlacementError(
            f"{1 + sum(map(len, rest))} machines have too many orders to compare; "
            "keep them in the order that they are named in, or name fewer"
        )
    stops: list[_Stop] = []
    ends: dict[tuple[int, ...], tuple[int, ...]] = {}
    # In this order a set comes after all its subsets.
    for place, counts in enumerate(product(*(range(len(kind) + 1) for kind in rest))):
        may_be_last = may_leave_out or place == num_sets - 1
        start = len(stops)
        if place == 0:
            stops.append(_Stop(first, (), may_be_last))
        for kind, count, fewer in _one_fewer(rest, counts):
            stops.append(_Stop(kind[count - 1], ends[fewer], may_be_last))
        ends[counts] = tuple(range(start, len(stops)))
    return tuple(stops)


def _one_fewer(
    kinds: Sequence[Sequence[int]], counts: tuple[int, ...]
) -> Iterator[tuple[Sequence[int], int, tuple[int, ...]]]:
    """Each kind in a set with its count there, and the set without one of it."""
    for i, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        if count:
            yield kind, count, (*counts[:i], count - 1, *counts[i + 1 :])


def _kinds(machines: Sequence[int], costs_MSE: Floats, hops_MM: Floats) -> list[list[int]]:
    """The machines, in groups of those that can be exchanged without any cost changing."""
    kinds: list[list[int]] = []
    for machine in machines:
        for kind in kinds:
            swapped = list(machines)
            swapped[machine], swapped[kind[0]] = kind[0], machine
            if np.array_equal(costs_MSE[machine], costs_MSE[kind[0]]) and np.array_equal(
                hops_MM[np.ix_(swapped, swapped)], hops_MM
            ):
                kind.append(machine)
                break
        else:
            kinds.append([machine])
    return kinds
