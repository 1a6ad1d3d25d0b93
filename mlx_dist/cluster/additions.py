"""What would make a placement faster, and what would make a model fit that does not. Pure.

Everything here is found by trying: the same prediction for other machines, links or costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from mlx_dist.cluster.case import Case, Way
from mlx_dist.cluster.costs import Link, Machine, ModelCosts
from mlx_dist.cluster.machines import faster_link, nominal_link
from mlx_dist.cluster.placement import fits
from mlx_dist.cluster.problems import Links

_GIB = 1 << 30
_LEAST_CONTEXT = 512
_MOST_MORE_MACHINES = 8
# What one more machine beside a single one is taken to be connected by.
_USUAL_LINK = "10gbe"
# Less than this is within the error of the predictions.
_WORTHWHILE = 1.02


@dataclass(frozen=True, slots=True)
class Addition:
    """Something to add, and how many times as fast the asked rate is with it."""

    what: str
    speedup: float


def best_addition(case: Case, way: Way = Case.placement) -> Addition | None:
    """The single addition that raises the asked rate most, or None if none is worth while.

    Tried are one more machine of each kind present, twice the memory of the fullest machine, and
    a faster link. The model must fit, placed in this `way`.
    """
    rate = case.rate(way)
    tried = [Addition(what, other.rate(way) / rate) for what, other in _additions(case, way)]
    top = max(tried, key=lambda addition: addition.speedup)
    return top if top.speedup > _WORTHWHILE else None


def what_would_fit(case: Case, thinner: Mapping[str, ModelCosts]) -> tuple[str, ...]:
    """What would make a model fit that does not, each alone, in words.

    `thinner` are the model's costs in fewer bits, by what one would call that, the most bits first.
    """
    return tuple(_remedies(case, thinner))


def _remedies(case: Case, thinner: Mapping[str, ModelCosts]) -> Iterator[str]:
    thin = (name for name, costs in thinner.items() if _fits(replace(case, costs=costs)))
    yield from islice(thin, 1)
    workload = case.workload

    def with_context(tokens: int) -> Case:
        return replace(case, workload=replace(workload, context_tokens=tokens))

    def with_streams(number: int) -> Case:
        return replace(case, workload=replace(workload, num_sequences=number))

    if context := _largest_half(workload.context_tokens, _LEAST_CONTEXT, with_context):
        yield f"a context of {context} tokens"
    if streams := _largest_half(workload.num_sequences, 1, with_streams):
        yield f"{streams} sequence{'s' * (streams > 1)} at a time"
    if more := _more_machines(case):
        yield more


def _largest_half(value: int, least: int, case_with: Callable[[int], Case]) -> int | None:
    """The first of a half, a quarter, ... of `value`, not below `least`, that fits, or None."""
    while (value := value // 2) >= least:
        if _fits(case_with(value)):
            return value
    return None


def _more_machines(case: Case) -> str | None:
    """The least number of more machines of one kind present that fits, the smallest kind first."""
    for number in range(1, _MOST_MORE_MACHINES + 1):
        for kind in sorted(_kinds(case.machines), key=lambda i: case.machines[i].usable_bytes):
            grown = case
            for _ in range(number):
                grown = _with_another(grown, kind)
            if _fits(grown):
                count = "one" if number == 1 else str(number)
                plural = "s" if number > 1 else ""
                return f"{count} more {_size(case.machines[kind])} machine{plural}"
    return None


def _fits(case: Case) -> bool:
    return fits(case.problem())


def _additions(case: Case, way: Way) -> Iterator[tuple[str, Case]]:
    for kind in _kinds(case.machines):
        machine = case.machines[kind]
        yield f"one more {machine.chip} of {_size(machine)}", _with_another(case, kind)
    fullest = min(case.predicted(way(case)).stages, key=lambda stage: stage.headroom_bytes).machine
    machine = case.machines[fullest]
    larger = replace(
        machine,
        memory_bytes=2 * machine.memory_bytes,
        usable_bytes=machine.usable_bytes + machine.memory_bytes,
    )
    machines = (*case.machines[:fullest], larger, *case.machines[fullest + 1 :])
    yield f"{_size(larger)} in {machine.name}", replace(case, machines=machines)
    if len(case.machines) > 1:
        slowest = min(_between(case.links), key=lambda link: (link.bytes_per_s, -link.latency_s))
        if (faster := faster_link(slowest)) is not None:
            kind_of_link, link = faster
            links = [[link if old == slowest else old for old in row] for row in case.links]
            yield (
                f"links of {_spelled(kind_of_link)} in place of the slowest",
                replace(case, links=links),
            )


def _kinds(machines: Sequence[Machine]) -> list[int]:
    """The first machine of each kind."""
    kinds = [(m.chip, m.memory_bytes, m.usable_bytes) for m in machines]
    return [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]


def _with_another(case: Case, kind: int) -> Case:
    """The case with one more machine like machine `kind`, connected as that one is."""
    row = list(case.links[kind])
    others = [link for i, link in enumerate(row) if i != kind]
    beside = max(others, key=lambda link: link.latency_s, default=nominal_link(_USUAL_LINK))
    new_row = [beside if i == kind else link for i, link in enumerate(row)]
    links = [[*old, new] for old, new in zip(case.links, new_row, strict=True)]
    machine = replace(case.machines[kind], name=f"{case.machines[kind].name} (another)")
    return replace(
        case, machines=(*case.machines, machine), links=[*links, [*new_row, case.links[kind][kind]]]
    )


def _between(links: Links) -> list[Link]:
    return [link for a, row in enumerate(links) for b, link in enumerate(row) if a != b]


def _spelled(kind_of_link: str) -> str:
    return "RDMA over Thunderbolt 5" if kind_of_link == "rdma" else kind_of_link


def _size(machine: Machine) -> str:
    return f"{machine.memory_bytes / _GIB:.0f} GB"
