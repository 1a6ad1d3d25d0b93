"""Pipeline, tensor groups, or groups in a pipeline: which there are, and which is best.

Knows what was asked for and what is predicted; knows no ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_dist.cluster import groups, placement
from mlx_dist.cluster.additions import what_would_fit
from mlx_dist.cluster.case import Case, Way
from mlx_dist.cluster.costs import ModelCosts, Workload
from mlx_dist.cluster.placement import Placement, Share
from mlx_dist.config import Objective, Parallel, RunConfig, Split
from mlx_dist.errors import ConfigError, FamilyError, PlacementError
from mlx_dist.model.counted import Counted
from mlx_dist.model.files import ModelFiles

# What is tried when a model does not fit.
_THINNER_BITS = (8, 6, 4, 3)
# What a way for many streams is judged by, before anybody has asked.
_MANY_STREAMS = 32


@dataclass(frozen=True, slots=True)
class Choice:
    """The shares, the way to place others alike, and a line on what was chosen from, if any."""

    shares: Placement
    way: Way
    said: str = ""


def sizes(config: RunConfig, num_ranks: int, fabric: str = "mpi") -> tuple[int, ...]:
    """The sizes of tensor groups to choose from, 1 for a pipeline.

    Raises ConfigError for what cannot be on so many ranks over this fabric.
    """
    _check(config)
    if config.parallel is Parallel.pipeline or num_ranks == 1:
        return (1,)
    if config.parallel is Parallel.tensor:
        return (num_ranks,)
    # Only MPI can make groups of some of the ranks.
    can_group = fabric == "mpi"
    if config.parallel is Parallel.auto:
        some = range(2, num_ranks) if can_group else ()
        return (1, *(size for size in some if num_ranks % size == 0), num_ranks)
    size = config.parallel
    if num_ranks % size:
        raise ConfigError(
            f"--parallel tensor={size} does not divide {num_ranks} ranks into groups; start a "
            f"multiple of {size}, or use --parallel tensor for one group of any size"
        )
    if size < num_ranks and not can_group:
        raise ConfigError(
            f"--parallel tensor={size} needs groups within {num_ranks} ranks, which the "
            f"{fabric} fabric cannot form; use --fabric mpi, or --parallel tensor"
        )
    return (size,)


def judged(config: RunConfig, workload: Workload) -> Workload:
    """The workload by which a server's way is chosen, which must find room for `workload`."""
    if config.optimize is Objective.latency:
        return workload
    return replace(workload, num_sequences=_MANY_STREAMS)


def choose(
    case: Case,
    config: RunConfig,
    asked: tuple[int, ...],
    files: ModelFiles,
    judged_by: Workload | None = None,
) -> Choice:
    """The shares in groups of the size `asked`, or of several the best as predicted.

    Those that do not fit, or whose layers or slices cannot be, are not chosen, and no groups of a
    family that nobody knows how to slice. Raises PlacementError, with what would fit, or
    ConfigError or FamilyError where nothing can be chosen.
    """
    level = case.levelled()
    found: list[tuple[float, int, Placement]] = []
    why = ""
    failed: PlacementError | ConfigError | None = None
    for size in asked:
        try:
            if size == 1:
                shares = _pipeline(level, config, files)
            else:
                shares = groups.place(level, size, config.slices, config.layers)
        except (PlacementError, ConfigError) as error:
            failed = failed or error
        except FamilyError as error:
            if len(asked) == 1:
                raise
            why = f"; {str(error).partition('; use')[0]}"
        else:
            workload = replace(judged_by or case.workload, prompt_tokens=())
            rated = replace(level, workload=workload)
            rate = rated.rate_of(rated.predicted(shares))
            found.append((rate, size, shares))
    if not found:
        assert failed is not None
        raise failed
    rate, size, shares = max(found, key=lambda each: each[0])
    num_machines = len(case.machines)
    way = _way(size, num_machines)
    if len(asked) == 1:
        return Choice(shares, way)
    others = ", ".join(f"{_named(n, num_machines)} {r:.1f}" for r, n, _ in found if n != size)
    beside = f", where {others} would be" if others else ""
    said = f"--parallel auto: {_named(size, num_machines)}, {rate:.1f} tokens/s are predicted"
    return Choice(shares, way, f"{said}{beside}{why}")


def _check(config: RunConfig) -> None:
    if config.leave_out and config.parallel is not Parallel.pipeline:
        raise ConfigError(
            f"--leave-out goes with --parallel pipeline only, not with {_spelled(config.parallel)}:"
            " all ranks of a tensor group are needed; do without one of the two"
        )
    if config.parallel is Parallel.pipeline and config.slices is not Split.auto:
        raise ConfigError("--slices goes with --parallel tensor, tensor=N or auto; leave it out")


def _spelled(parallel: Parallel | int) -> str:
    return parallel.value if isinstance(parallel, Parallel) else f"tensor={parallel}"


def _named(size: int, num_machines: int) -> str:
    return "pipeline" if size == 1 else "tensor" if size == num_machines else f"tensor={size}"


def _way(size: int, num_machines: int) -> Way:
    """How other machines than these would be placed in such groups, whatever numbers were given."""
    if size == 1:
        return Case.placement
    # Of one group of all machines, one more machine would be a part.
    is_one = size == num_machines
    return lambda case: groups.place(case, len(case.machines) if is_one else size)


def _pipeline(case: Case, config: RunConfig, files: ModelFiles) -> Placement:
    """The layers as they are asked for.

    Raises PlacementError for more machines than layers and, with what would fit, for what does not.
    """
    try:
        return _placed(case, config)
    except PlacementError:
        if placement.fits(case.problem()):
            raise
        remedies = what_would_fit(case, _thinner(case.costs, files, config))
        return _placed(replace(case, remedies=remedies), config)


def _placed(case: Case, config: RunConfig) -> Placement:
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
        f"weights of {bits} bits": Counted(files, config.dtype, fused=True, bits=bits).of()
        for bits in _THINNER_BITS
        if bits < (costs.bits or 16)
    }
