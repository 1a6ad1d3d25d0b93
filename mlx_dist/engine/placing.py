"""Which rank holds which layers. The leader decides, by what all ranks say of their machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec.structs import replace as with_fields

from mlx_dist.cluster import chips, hardware, memo, placement
from mlx_dist.cluster.additions import Case, what_would_fit
from mlx_dist.cluster.costs import Link, Machine, ModelCosts, Workload
from mlx_dist.cluster.placement import Placement, Share, fits
from mlx_dist.cluster.prediction import Links
from mlx_dist.cluster.world import World
from mlx_dist.config import RunConfig, Split
from mlx_dist.errors import ConfigError, PlacementError
from mlx_dist.messages import Identity, MachineReport, Placing, Speeds, expect
from mlx_dist.model.costing import costs_of_config, costs_of_files
from mlx_dist.model.files import ModelFiles

# What the caches of one sequence must find room for, where the model takes as much.
_LEAST_CONTEXT = 4096
# What is tried when a model does not fit.
_THINNER_BITS = (8, 6, 4, 3)
# Between machines that nobody has measured: a wired network. What is alike decides little.
_SOME_LINK = Link(latency_s=100e-6, bytes_per_s=1e9)
_NO_LINK = Link(latency_s=0.0, bytes_per_s=float("inf"))


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds what: `shares` in the order of the stages, and every rank's machine.

    `costs` are the leader's. A rank without a share is a spare: it holds nothing.
    """

    shares: Placement
    machines: tuple[MachineReport, ...]
    costs: ModelCosts | None = None

    @property
    def pipe(self) -> tuple[int, ...]:
        """The ranks that hold stages, in the order of the stages."""
        return tuple(share.machine for share in self.shares)

    def share_of(self, rank: int) -> Share | None:
        """The stage of `rank`, or None for a spare."""
        return next((share for share in self.shares if share.machine == rank), None)


def lay_out(world: World, config: RunConfig, files: ModelFiles) -> Layout:
    """The layout, the same on every rank. Raises AgreedError, on every rank, if there is none."""
    # Ranks that differ in this would not measure together.
    layers = config.layers
    spelled = layers.value if isinstance(layers, Split) else ",".join(map(str, layers))
    world.compare({"--layers": spelled})
    machines = survey(world, config)
    costs = None
    with world.decision():
        if world.is_leader:
            is_fused = machines[world.rank].device == "gpu"
            costs = costs_of(files, config, is_fused)
    if layers is Split.auto and not _are_alike(machines):
        machines = measured(world, machines, costs)
    placing = Placing([])
    with world.decision():
        if costs is not None:
            context_tokens = min(costs.context_tokens or _LEAST_CONTEXT, _LEAST_CONTEXT)
            hosts = world.hosts
            links = [[_NO_LINK if a == b else _SOME_LINK for b in hosts] for a in hosts]
            case = case_of(world, config, costs, machines, links, Workload(context_tokens))
            shares = shares_of(case, config, files)
            placing = Placing([(share.machine, share.start, share.end) for share in shares])
    placing = expect(world.control.all_gather(placing)[world.leader_rank], Placing)
    return Layout(tuple(Share(*share) for share in placing.shares), machines, costs)


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
    said = {} if costs is None else {"dtype": costs.dtype, "bits": str(costs.bits)}
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
        speeds = hardware.measure_speeds(arithmetic["dtype"], int(arithmetic["bits"]))
    memo.keep("speeds", facts, speeds)
    return _gather(world, with_fields(own, speeds=speeds))


def case_of(
    world: World,
    config: RunConfig,
    costs: ModelCosts,
    machines: Sequence[MachineReport],
    links: Links,
    workload: Workload,
) -> Case:
    """What is to be placed on the ranks of `world`.

    Raises ConfigError where the fabric could not carry what may come out.
    """
    # A ring knows neighbours only, which of three ranks all are.
    if config.leave_out and not world.is_direct and world.size > 3:
        raise ConfigError(
            f"--leave-out over {world.fabric} could part neighbours among {world.size} ranks; "
            "use --fabric mpi, or do without --leave-out"
        )
    return Case(
        costs,
        tuple(_as_placed(world, machine, costs) for machine in machines),
        links,
        workload,
        config.optimize,
        leader=world.leader_rank,
        is_order_fixed=not config.leave_out or not world.is_direct,
        may_leave_out=config.leave_out,
    )


def costs_of(
    files: ModelFiles, config: RunConfig, fused: bool, bits: int | None = None
) -> ModelCosts:
    """The model's costs as it is or, with `bits`, as if it were quantized to these.

    Raises ModelError if it does not load.
    """
    if bits is None and files.weights:
        return costs_of_files(files, config.dtype, fused=fused)
    return costs_of_config(
        files.config, name=files.name, bits=bits, dtype=config.dtype, fused=fused
    )


def shares_of(case: Case, config: RunConfig, files: ModelFiles) -> Placement:
    """The layers as they are asked for.

    Raises PlacementError for more machines than layers and, with what would fit, for what does not.
    """
    level = levelled(case)
    try:
        return _shares_of(level, config)
    except PlacementError:
        if fits(level.problem()):
            raise
        remedies = what_would_fit(level, _thinner(case.costs, files, config))
        return _shares_of(replace(level, remedies=remedies), config)


def levelled(case: Case) -> Case:
    """The case with machines of a kind as fast as the first of them: else noise would decide."""
    first: dict[tuple[str, int], Speeds] = {}
    for machine in case.machines:
        first.setdefault((machine.chip, machine.memory_bytes), machine.speeds)
    machines = (replace(m, speeds=first[m.chip, m.memory_bytes]) for m in case.machines)
    return replace(case, machines=tuple(machines))


def _shares_of(case: Case, config: RunConfig) -> Placement:
    if config.layers is Split.auto:
        if not case.may_leave_out:
            placement.even_counts(case.costs.num_layers, len(case.machines))
        return case.placement()
    counts = None if config.layers is Split.even else config.layers
    cuts = placement.cut(case.costs.num_layers, len(case.machines), counts)
    shares = tuple(Share(number, start, end) for number, (start, end) in enumerate(cuts))
    placement.check(case.problem(), shares)
    return shares


def _thinner(costs: ModelCosts, files: ModelFiles, config: RunConfig) -> dict[str, ModelCosts]:
    """The model's costs in fewer bits, the most first, by what one would call that."""
    return {
        f"weights of {bits} bits": costs_of(files, config, fused=True, bits=bits)
        for bits in _THINNER_BITS
        if bits < (costs.bits or 16)
    }


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
