"""`mlx-dist plan`: who would hold what, and what that would do. Loads no weights.

For machines in a file, or for the ranks of this job, which are measured first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_dist.cluster import links
from mlx_dist.cluster.additions import best_addition
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import ModelCosts, Workload
from mlx_dist.cluster.machines import read_cluster
from mlx_dist.cluster.world import World, join
from mlx_dist.config import RunConfig
from mlx_dist.engine import placing, ways
from mlx_dist.errors import ConfigError
from mlx_dist.model.counted import Counted
from mlx_dist.model.files import ModelFiles, find_described, find_model
from mlx_dist.plan_view import Plan, show

_DEFAULT_CONTEXT = 4096
_DEFAULT_PROMPTS = (128, 2048)


@dataclass(frozen=True, slots=True)
class Asked:
    """What to plan for. `machines` is a file, or None for the ranks of this job.

    `bits` are those that the weights would be quantized to, or None for what they are. Sequences
    have up to `context_tokens`, and `num_streams` of them run at a time.
    """

    machines: Path | None = None
    bits: int | None = None
    context_tokens: int | None = None
    num_streams: int = 1
    prompt_tokens: tuple[int, ...] = ()

    def workload(self, costs: ModelCosts) -> Workload:
        """Raises ConfigError for more tokens than the model or the context takes."""
        limit = costs.context_tokens
        context = self.context_tokens or min(limit or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
        if limit is not None and context > limit:
            raise ConfigError(f"--context is {context} and the model takes {limit} tokens")
        for tokens in self.prompt_tokens:
            if tokens > context:
                raise ConfigError(
                    f"--prompt-tokens {tokens} is more than --context {context}; give it more"
                )
        prompts = self.prompt_tokens or tuple(n for n in _DEFAULT_PROMPTS if n <= context)
        return Workload(context, self.num_streams, prompts)


def run_plan(config: RunConfig, asked: Asked, as_json: bool) -> None:
    """The program of every rank, or of the one process that looks at a file.

    Raises PlacementError, or on ranks AgreedError, if the model does not fit.
    """
    if asked.machines is not None:
        show(plan_of_file(config, asked, asked.machines), as_json)
        return
    with join(config.fabric, config.jaccl_devices, config.heartbeat_timeout_s) as world:
        plan = _plan_of_ranks(world, config, asked)
        if plan is not None:
            show(plan, as_json)


def plan_of_file(config: RunConfig, asked: Asked, path: Path) -> Plan:
    """The plan for the machines in the file `path`, in whatever order is best."""
    cluster = read_cluster(path)
    files = _find(config.model)
    counted = Counted(files, config.dtype, fused=True, bits=asked.bits)
    costs = counted.of()
    machines = cluster.machines(costs.dtype, costs.bits)
    workload = asked.workload(costs)
    case = Case(costs, machines, cluster.links, workload, config.optimize, costs_of=counted.of)
    return _plan(case, files, config, ways.sizes(config, len(machines)))


def _plan_of_ranks(world: World, config: RunConfig, asked: Asked) -> Plan | None:
    """The plan for all ranks, on the leader; None on the others, which only measure."""
    machines = placing.survey(world, config)
    files = counted = costs = workload = plan = None
    sizes: tuple[int, ...] = ()
    with world.agreement():
        sizes = ways.sizes(config, world.size, world.fabric)
    with world.decision():
        if world.is_leader:
            files = _find(config.model)
            is_fused = machines[world.rank].device == "gpu"
            counted = Counted(files, config.dtype, fused=is_fused, bits=asked.bits)
            costs = counted.of()
            workload = asked.workload(costs)
    machines = placing.measured(world, machines, costs, is_fresh=True)
    matrix = links.measure(world)
    sums = links.measure_sums(world, sizes, None if costs is None else costs.dtype)
    with world.decision():
        if files is not None and counted is not None and workload is not None:
            between = matrix.for_placement()
            case = placing.case_of(world, config, counted, machines, between, workload, sums)
            plan = replace(_plan(case, files, config, sizes), warnings=matrix.warnings)
    return plan


def _plan(case: Case, files: ModelFiles, config: RunConfig, sizes: tuple[int, ...]) -> Plan:
    """Raises PlacementError, which says what would fit, if the model does not."""
    choice = ways.choose(case, config, sizes, files)
    addition = best_addition(case.levelled(), choice.way)
    return Plan(case, case.predicted(choice.shares), addition, choice.said)


def _find(name: str) -> ModelFiles:
    """The model's files; of a folder that has no weights, its config."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return find_described(name, folder, (), revision="")
    return find_model(name)
