"""Which machine holds which layers. Pure: knows layers, bytes and seconds; no model, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite

import numpy as np

from mlx_dist.cluster.cuts import ROUNDING, Floats, Search, search
from mlx_dist.config import Objective
from mlx_dist.errors import PlacementError


@dataclass(frozen=True, slots=True)
class Problem:
    """Layers to cut and machines to hold them; every callable takes machines' numbers first.

    `stage_bytes` and `stage_s` say what layers [start, end) ask of a machine: memory, and seconds
    of one step. A part of a stage must never take more bytes than the whole. `hop_s` is a message's
    way from one machine to another: a hidden state's down the pipe, or the tokens' from its end to
    its start. The `leader` holds the first stage; any machine may for None. `remedies` say what
    would fit, for the error if this does not.
    """

    num_layers: int
    capacity_bytes: tuple[int, ...]
    stage_bytes: Callable[[int, int, int], int]
    stage_s: Callable[[int, int, int], float]
    hop_s: Callable[[int, int], float]
    names: tuple[str, ...]
    leader: int | None = 0
    is_order_fixed: bool = False
    may_leave_out: bool = True
    remedies: tuple[str, ...] = ()

    @property
    def num_machines(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Slice:
    """One of the slices that a tensor group cuts its layers into: number `place`.

    `weights` say how large they are to each other, one for each rank of the group.
    """

    place: int = 0
    weights: tuple[int, ...] = (1,)

    @property
    def size(self) -> int:
        return len(self.weights)

    @property
    def spelled(self) -> str:
        """The part of a layer that this is, as in 2/5."""
        return f"{self.weights[self.place]}/{sum(self.weights)}"


WHOLE = Slice()


@dataclass(frozen=True, slots=True)
class Share:
    """A machine's stage: layers [start, end), of which it holds `slice`."""

    machine: int
    start: int
    end: int
    slice: Slice = WHOLE


Placement = tuple[Share, ...]


def latency_s(problem: Problem, placement: Placement) -> float:
    """Seconds of one step: every stage, the hops between them, and the tokens' way back."""
    stages_s = sum(problem.stage_s(share.machine, share.start, share.end) for share in placement)
    if len(placement) == 1:
        return stages_s
    machines = [share.machine for share in placement]
    return stages_s + sum(problem.hop_s(a, b) for a, b in pairwise([*machines, machines[0]]))


def slowest_s(problem: Problem, placement: Placement) -> float:
    """Seconds of the slowest stage. Hops do not count: with microbatches in flight they overlap."""
    return max(problem.stage_s(share.machine, share.start, share.end) for share in placement)


def is_within_memory(problem: Problem, placement: Placement) -> bool:
    return not _excesses(problem, placement)


def check(problem: Problem, placement: Placement, remedy: str | None = None) -> None:
    """Raises PlacementError, which says what is missing where, if some memory is too small.

    A `remedy` is in place of the one that is found for stages of single machines.
    """
    if is_within_memory(problem, placement):
        return
    if remedy is None:
        remedy = "another placement fits: --layers auto" if fits(problem) else _remedy(problem)
    missing = _what_is_missing(problem, placement)
    raise PlacementError(f"the model does not fit as it is cut: {missing}; {remedy}")


def best(problem: Problem, objective: Objective) -> Placement:
    """The placement of least `latency_s`, or for throughput that of least `slowest_s`.

    The other one decides between those that differ by rounding only. Raises PlacementError if
    nothing fits, with what is missing where and the remedies.
    """
    _check_rules(problem)
    if not fits(problem):
        missing = _what_is_missing(problem, nearest(problem))
        raise PlacementError(f"the model does not fit: {missing}; {_remedy(problem)}")
    machines = range(problem.num_machines)
    hops = np.array([[problem.hop_s(a, b) if a != b else 0.0 for b in machines] for a in machines])
    seconds = _search(problem, _table(problem, problem.stage_s, _furthest_ends(problem)), hops)
    if objective is Objective.throughput:
        return _placement(seconds.levelled())
    return _placement(seconds.levelled(most=seconds.least()[0] * (1 + ROUNDING)))


def fits(problem: Problem) -> bool:
    """Whether some placement keeps every machine's memory. Cheap: asks for no seconds."""
    nothing = _table(problem, lambda machine, start, end: 0.0, _furthest_ends(problem))
    return isfinite(_search(problem, nothing).least()[0])


def even_counts(num_layers: int, num_ranks: int, holder: str = "rank") -> tuple[int, ...]:
    """Layers of each rank, as even as can be; the first ranks take what does not divide.

    Raises PlacementError with more ranks than layers.
    """
    if num_ranks > num_layers:
        raise PlacementError(
            f"the model has {num_layers} layers and there are {num_ranks} {holder}s; "
            f"start at most {num_layers}"
        )
    share, rest = divmod(num_layers, num_ranks)
    return tuple(share + (rank < rest) for rank in range(num_ranks))


def cut(
    num_layers: int, num_ranks: int, counts: Sequence[int] | None, holder: str = "rank"
) -> list[tuple[int, int]]:
    """Every rank's layers [start, end): `counts` of them each, or an even split for None.

    Raises PlacementError unless every layer is held exactly once and every rank holds one. It
    calls them by the name of the `holder`, which may be a group.
    """
    if counts is None:
        counts = even_counts(num_layers, num_ranks, holder)
    written = ",".join(map(str, counts))
    if len(counts) != num_ranks:
        raise PlacementError(
            f"--layers {written} cuts for {len(counts)} {holder}s and there are {num_ranks}; "
            f"write one count per {holder}"
        )
    if sum(counts) != num_layers:
        raise PlacementError(
            f"--layers {written} adds up to {sum(counts)} and the model has {num_layers} layers"
        )
    if min(counts) < 1:
        raise PlacementError(
            f"--layers {written} leaves a {holder} without layers; give it one or start fewer"
        )
    stages, start = [], 0
    for count in counts:
        stages.append((start, start + count))
        start += count
    return stages


def _check_rules(problem: Problem) -> None:
    """Raises PlacementError for what no memory would help."""
    if not problem.names:
        raise PlacementError("there is no machine to hold a layer; name one")
    if problem.may_leave_out:
        return
    if problem.num_machines > problem.num_layers:
        raise PlacementError(
            f"the model has {problem.num_layers} layers and there are {problem.num_machines} "
            f"machines; name at most {problem.num_layers}, or let some be left out"
        )
    if problem.is_order_fixed and problem.leader:
        raise PlacementError(
            f"{problem.names[problem.leader]} leads and must come first in the fixed order "
            f"{', '.join(problem.names)}; name it first"
        )


def _search(problem: Problem, costs: Floats, hops: Floats | None = None) -> Search:
    return search(
        costs,
        np.zeros((problem.num_machines, problem.num_machines)) if hops is None else hops,
        first=problem.leader,
        is_order_fixed=problem.is_order_fixed,
        may_leave_out=problem.may_leave_out,
    )


def _table(
    problem: Problem,
    cost: Callable[[int, int, int], float],
    ends: Sequence[Sequence[int]] | None = None,
) -> Floats:
    """Costs by machine, start and end; inf beyond the machine's `ends` for each start, if given."""
    num_layers = problem.num_layers
    costs = np.full((problem.num_machines, num_layers + 1, num_layers + 1), np.inf)
    for machine in range(problem.num_machines):
        for start in range(num_layers):
            last = num_layers if ends is None else ends[machine][start]
            for end in range(start + 1, last + 1):
                costs[machine, start, end] = cost(machine, start, end)
    return costs


def _furthest_ends(problem: Problem) -> list[list[int]]:
    """Where the longest stage that fits on each machine ends, for each start."""
    ends = []
    for machine, capacity_bytes in enumerate(problem.capacity_bytes):
        ends.append([0] * problem.num_layers)
        end = 0
        for start in range(problem.num_layers):
            # What ended here from an earlier start fits from this one.
            end = max(end, start)
            while (
                end < problem.num_layers
                and problem.stage_bytes(machine, start, end + 1) <= capacity_bytes
            ):
                end += 1
            ends[machine][start] = end
    return ends


def _excess_bytes(problem: Problem, machine: int, start: int, end: int) -> int:
    return max(problem.stage_bytes(machine, start, end) - problem.capacity_bytes[machine], 0)


def _excesses(problem: Problem, placement: Placement) -> list[tuple[Share, int]]:
    """The stages that are larger than their machines, and by how many bytes."""
    excesses = [
        (share, _excess_bytes(problem, share.machine, share.start, share.end))
        for share in placement
    ]
    return [(share, num_bytes) for share, num_bytes in excesses if num_bytes]


def nearest(problem: Problem) -> Placement:
    """The placement that lacks the least memory in all, the lack as evenly shared as can be."""
    excess = _search(problem, _table(problem, partial(_excess_bytes, problem)))
    return _placement(excess.levelled(most=excess.least()[0] * (1 + ROUNDING)))


def _what_is_missing(problem: Problem, placement: Placement) -> str:
    """For a placement that does not fit: the memory there is, and what it lacks where."""
    there = ", ".join(
        f"{name} has {_gb(num_bytes)}"
        for name, num_bytes in zip(problem.names, problem.capacity_bytes, strict=True)
    )
    excesses = _excesses(problem, placement)
    missing = ", ".join(
        f"{_gb(num_bytes)} on {problem.names[share.machine]} for {_spelled(share)}"
        for share, num_bytes in excesses
    )
    missing_bytes = sum(num_bytes for _, num_bytes in excesses)
    return f"{there}, and {_gb(missing_bytes)} are missing ({missing})"


def _spelled(share: Share) -> str:
    layers = f"layers {share.start}-{share.end - 1}"
    return layers if share.slice.size == 1 else f"{share.slice.spelled} of {layers}"


def _remedy(problem: Problem) -> str:
    if problem.remedies:
        return f"what would fit: {', or '.join(problem.remedies)}"
    return "use weights of fewer bits, a shorter context or more machines"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


def _placement(stages: Sequence[tuple[int, int, int]]) -> Placement:
    return tuple(Share(machine, start, end) for machine, start, end in stages)
