"""Which rank holds which layers. The leader decides, by what all ranks say of their machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace as with_fields

from mlx_dist.cluster import chips, hardware, links, memo
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import Link, Machine, ModelCosts, Workload
from mlx_dist.cluster.placement import Placement, Share, Slice
from mlx_dist.cluster.problems import Links
from mlx_dist.cluster.sums import Curve
from mlx_dist.cluster.world import World
from mlx_dist.config import RunConfig, Split
from mlx_dist.engine import ways
from mlx_dist.errors import ConfigError
from mlx_dist.messages import Identity, MachineReport, Placing, Speeds, expect
from mlx_dist.model.counted import Counted
from mlx_dist.model.files import ModelFiles

# What the caches of one sequence must find room for, where the model takes as much.
_LEAST_CONTEXT = 4096
# Between machines that nobody has measured: a wired network. What is alike decides little.
_SOME_LINK = Link(latency_s=100e-6, bytes_per_s=1e9)
_NO_LINK = Link(latency_s=0.0, bytes_per_s=float("inf"))

Sums = Mapping[int, Curve]


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds what: `shares` in the order of the stages, and every rank's machine.

    `costs` are the leader's, and `counted` those of slices. A rank without a share is a spare: it
    holds nothing.
    """

    shares: Placement
    machines: tuple[MachineReport, ...]
    costs: ModelCosts | None = None
    counted: Counted | None = None

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each stage, in order: one, or those of a tensor group."""
        firsts = [share for share in self.shares if share.slice.place == 0]
        return tuple(
            tuple(s.machine for s in self.shares if s.start == first.start) for first in firsts
        )

    @property
    def pipe(self) -> tuple[int, ...]:
        """The first rank of each stage, which speaks for the others."""
        return tuple(ranks[0] for ranks in self.stages)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that hold something, in the order of the stages."""
        return tuple(share.machine for share in self.shares)

    def share_of(self, rank: int) -> Share | None:
        """The stage of `rank`, or None for a spare."""
        return next((share for share in self.shares if share.machine == rank), None)


def lay_out(
    world: World,
    config: RunConfig,
    files: ModelFiles,
    say: Callable[[str], None] = lambda _line: None,
) -> Layout:
    """The layout, the same on every rank. Raises AgreedError, on every rank, if there is none.

    The leader says what it has chosen where it was to choose.
    """
    # Ranks that differ in this would not measure together.
    world.compare(
        {
            "--layers": _spelled(config.layers),
            "--parallel": str(config.parallel),
            "--slices": _spelled(config.slices),
        }
    )
    machines = survey(world, config)
    counted, costs = None, None
    sizes: tuple[int, ...] = ()
    with world.agreement():
        sizes = ways.sizes(config, world.size, world.fabric)
    with world.decision():
        if world.is_leader:
            is_fused = machines[world.rank].device == "gpu"
            counted = Counted(files, config.dtype, fused=is_fused)
            costs = counted.of()
    is_compared = len(sizes) > 1
    by_speed = config.layers if sizes == (1,) else config.slices
    if is_compared or (by_speed is Split.auto and not _are_alike(machines)):
        machines = measured(world, machines, costs)
    hosts = world.hosts
    matrix: Links = [[_NO_LINK if a == b else _SOME_LINK for b in hosts] for a in hosts]
    sums: Sums = {}
    if is_compared:
        matrix = links.measure(world).for_placement()
        sums = links.measure_sums(world, sizes, None if costs is None else costs.dtype)
    placing = Placing([])
    with world.decision():
        if costs is not None and counted is not None:
            context_tokens = min(costs.context_tokens or _LEAST_CONTEXT, _LEAST_CONTEXT)
            workload = Workload(context_tokens)
            case = case_of(world, config, counted, machines, matrix, workload, sums)
            choice = ways.choose(case, config, sizes, files, ways.judged(config, workload))
            placing = _as_message(choice.shares)
            if choice.said:
                say(choice.said)
    placing = expect(world.control.all_gather(placing)[world.leader_rank], Placing)
    return Layout(_as_placement(placing), machines, costs, counted)


def _spelled(numbers: tuple[int, ...] | Split) -> str:
    return numbers.value if isinstance(numbers, Split) else ",".join(map(str, numbers))


def _as_message(shares: Placement) -> Placing:
    return Placing(
        [(s.machine, s.start, s.end, s.slice.place, list(s.slice.weights)) for s in shares]
    )


def _as_placement(placing: Placing) -> Placement:
    return tuple(
        Share(machine, start, end, Slice(place, tuple(weights)))
        for machine, start, end, place, weights in placing.shares
    )


def survey(world: World, config: RunConfig) -> tuple[MachineReport, ...]:
    """Every rank's machine, not measured. Raises AgreedError for a limit of no rank's host."""
    with world.agreement():
        if unknown := sorted(config.memory_gb.keys() - {"", *world.hosts}):
            raise ConfigError(
                f"--memory-gb names {unknown[0]}, which is no host of these ranks; they are on "
                f"{', '.join(dict.fromkeys(world.hosts))}"
            )
    limit_gb = config.memory_gb.get(world.host, config.memory_gb.get(""))
    limit_bytes = None if limit_gb is None else int(limit_gb * 1e9)
    ranks_here = world.hosts.count(world.host)
    return _gather(world, hardware.machine_report(world.rank, world.host, ranks_here, limit_bytes))


def measured(
    world: World,
    machines: tuple[MachineReport, ...],
    costs: ModelCosts | None,
    is_fresh: bool = False,
) -> tuple[MachineReport, ...]:
    """The machines with their speeds, for what the leader's model of `costs` computes in.

    All ranks measure at the same time, for so they will compute, or remember what they measured
    at an earlier start. With `is_fresh` nothing is remembered.
    """
    said = {}
    if costs is not None:
        said = {"dtype": costs.dtype, "bits": str(costs.bits)}
        said |= {"matrix": "x".join(map(str, costs.matrix or ()))}
    gathered = world.control.all_gather(Identity(world.host, said))
    arithmetic = expect(gathered[world.leader_rank], Identity).facts
    own = machines[world.rank]
    facts = {
        **arithmetic,
        "chip": own.chip,
        "cores": own.cores,
        "gpu cores": own.gpu_cores,
        "device": own.device,
        "versions": own.versions,
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "ranks here": world.hosts.count(world.host),
    }
    speeds = None if is_fresh else memo.recall("speeds", facts, Speeds)
    known = _gather(world, with_fields(own, speeds=speeds))
    # Those that remember would else be idle while the others measure.
    if all(machine.speeds for machine in known):
        return known
    with world.agreement():
        outputs, _, inputs = arithmetic["matrix"].partition("x")
        matrix = (int(outputs), int(inputs)) if outputs else None
        speeds = hardware.measure_speeds(arithmetic["dtype"], int(arithmetic["bits"]), matrix)
    memo.keep("speeds", facts, speeds)
    return _gather(world, with_fields(own, speeds=speeds))


def case_of(
    world: World,
    config: RunConfig,
    counted: Counted,
    machines: Sequence[MachineReport],
    links: Links,
    workload: Workload,
    sums: Sums,
) -> Case:
    """What is to be placed on the ranks of `world`. `sums` are as measured, for sizes of groups.

    Raises ConfigError where the fabric could not carry what may come out.
    """
    # A ring knows neighbours only, which of three ranks all are.
    if config.leave_out and not world.is_direct and world.size > 3:
        raise ConfigError(
            f"--leave-out over {world.fabric} could part neighbours among {world.size} ranks; "
            "use --fabric mpi, or do without --leave-out"
        )
    costs = counted.of()
    return Case(
        costs,
        tuple(_as_placed(world, machine, costs) for machine in machines),
        links,
        workload,
        config.optimize,
        leader=world.leader_rank,
        is_order_fixed=not config.leave_out or not world.is_direct,
        may_leave_out=config.leave_out,
        costs_of=counted.of,
        sums=sums,
    )


def _as_placed(world: World, machine: MachineReport, costs: ModelCosts) -> Machine:
    """A machine that nobody has measured is taken for as fast as the others."""
    is_alone = world.hosts.count(machine.host) == 1
    return Machine(
        name=machine.host if is_alone else f"{machine.host} (rank {machine.rank})",
        chip=machine.chip,
        memory_bytes=machine.memory_bytes,
        usable_bytes=machine.usable_bytes,
        speeds=machine.speeds or chips.ordinary_speeds(costs.dtype),
    )


def _are_alike(machines: Sequence[MachineReport]) -> bool:
    """Whether what is measured would be noise."""
    return len({(m.chip, m.cores, m.gpu_cores, m.device) for m in machines}) == 1


def _gather(world: World, own: MachineReport) -> tuple[MachineReport, ...]:
    return tuple(expect(message, MachineReport) for message in world.control.all_gather(own))
