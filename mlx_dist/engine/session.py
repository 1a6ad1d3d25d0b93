"""From a configuration to ranks that are ready: meet, compare, load.

Every step is one that all ranks take together and that fails on all of them if it fails on one.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import mlx.core as mx

import mlx_dist
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import Workload
from mlx_dist.cluster.launch import LOCAL_VARIABLES
from mlx_dist.cluster.links import measure as measure_links
from mlx_dist.cluster.links import measure_sums
from mlx_dist.cluster.memory import available_bytes
from mlx_dist.cluster.placement import WHOLE
from mlx_dist.cluster.world import World, join
from mlx_dist.config import RunConfig, Weights
from mlx_dist.engine.admission import Reuse
from mlx_dist.engine.batching import Batching, parse_batching
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.leader import Leader
from mlx_dist.engine.placing import Layout, case_of, lay_out, measured
from mlx_dist.engine.program import Rank, Spare
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.text import Tokenizer
from mlx_dist.engine.transport import Transport
from mlx_dist.errors import ConfigError
from mlx_dist.messages import WIRE_VERSION, Report, expect
from mlx_dist.model.families import family_of
from mlx_dist.model.feed import load_stages
from mlx_dist.model.files import ModelFiles
from mlx_dist.model.grammar import Grammars
from mlx_dist.model.outline import found_model
from mlx_dist.model.sampling import Samplers
from mlx_dist.model.stage import Stage
from mlx_dist.model.verdicts import UNBATCHED, UNPADDED
from mlx_dist.model.weights import load_stage

# Of ours only this one changes what ranks do: the others set flags, or are a rank's own.
_SHARED_VARIABLE = "MLX_DIST_DEBUG"
# Of the memory that is free once the weights are in, what sequences may fill.
_KV_SHARE = 0.6
_LEAST_TOKENS = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Session:
    """A rank that has met the others, found the model and knows its place.

    `tokenizer` is the leader's. `facts` are equal on all ranks.
    """

    world: World
    config: RunConfig
    files: ModelFiles
    tokenizer: Tokenizer | None
    facts: dict[str, str]
    layout: Layout

    def load(self, progress: Progress = lambda _done, _total: None) -> Rank | Spare:
        """Read this rank's part of the model. `progress` hears of (bytes read, bytes in all).

        Raises AgreedError, the same on every rank, if any rank cannot.
        """
        progress = self._told(progress)
        share = self.layout.share_of(self.world.rank)
        group = self.world.tensor_group(self.layout.stages)
        start = time.perf_counter()
        loaded = None
        if self.config.weights == Weights.leader:
            span = None if share is None else (share.start, share.end)
            slice_ = WHOLE if share is None else share.slice
            loaded = load_stages(
                self.world, self.files, span, self.config.dtype, progress, _say, slice_
            )
        if share is None:
            with self.world.agreement():
                return Spare()
        with self.world.agreement():
            loaded = loaded or load_stage(
                self.files, share.start, share.end, self.config.dtype, progress, share.slice
            )
            if loaded.slicing is not None and group is not None:
                loaded.slicing.join(group)
            family = family_of(self.files.config)
            stage = Stage(
                loaded.model,
                loaded.anatomy,
                share.start,
                share.end,
                batches=family not in UNBATCHED,
                pads=family not in UNPADDED,
            )
            if self.tokenizer is not None:
                self.tokenizer.check_vocabulary(stage.vocab_size)
            kv_room = KvRoom(stage.kv_cost(), self._kv_budget_bytes(loaded.weights_bytes))
            _check_room(kv_room)
        grammars = Grammars(
            self.files.folder,
            self.files.config,
            stage.vocab_size,
            self.config.trust_remote_code,
        )
        return Rank(
            stage=stage,
            transport=Transport(self.world, self.layout.stages),
            samplers=Samplers(stage.vocab_size, grammars.matcher),
            grammars=grammars,
            kv_room=kv_room,
            weights_bytes=loaded.weights_bytes,
            load_s=time.perf_counter() - start,
            slice_=share.slice,
        )

    def leader(
        self,
        rank: Rank,
        reports: list[Report],
        batching: Batching,
        max_queue: int = 1024,
        reuses: bool = False,
    ) -> Leader:
        """The leader's program over `rank`, by all ranks' reports after loading.

        With `reuses`, caches of sequences that are over are kept for others that begin alike.
        """
        slots = rank.stage.slots
        if not slots.can_batch:
            batching = replace(batching, max_sequences=1)
        batching = replace(batching, pads=slots.can_pad)
        holding = reports[: len(self.layout.ranks)]
        rooms = [KvRoom(r.kv_cost, r.kv_budget_bytes) for r in holding]
        scheduler = Scheduler(
            batching,
            KvLedger(rooms, slack=batching.prefill_chunk),
            num_stages=len(self.layout.stages),
            max_queue=max_queue,
            reuse=Reuse(reuses and slots.can_batch, slots.trim_limit),
        )
        return Leader(rank, scheduler)

    def case(self, workload: Workload, is_fresh: bool = False) -> Case | None:
        """The leader's means to predict what this layout does. Every rank must ask at once.

        Links are measured, and machines unless their speeds are remembered and need not be fresh.
        """
        machines = measured(self.world, self.layout.machines, self.layout.costs, is_fresh)
        links = measure_links(self.world).for_placement()
        costs, counted = self.layout.costs, self.layout.counted
        sizes = {len(ranks) for ranks in self.layout.stages} - {1}
        sums = measure_sums(self.world, sorted(sizes), None if costs is None else costs.dtype)
        if counted is None:
            return None
        return case_of(self.world, self.config, counted, machines, links, workload, sums)

    def reports(self, rank: Rank | Spare) -> list[Report]:
        """Every rank's account, on every rank: in the order of the stages, and then the spares'."""
        own = rank.report(self.world.rank, self.world.host)
        by_rank = [expect(message, Report) for message in self.world.control.all_gather(own)]
        ranks = self.layout.ranks
        spares = [report for report in by_rank if report.rank not in ranks]
        return [*(by_rank[number] for number in ranks), *spares]

    def _told(self, progress: Progress) -> Progress:
        """`progress`, of which those who watch over this rank hear, too."""
        pulse = self.world.pulse

        def told(done_bytes: int, total_bytes: int) -> None:
            if done_bytes < total_bytes:
                pulse.loading(done_bytes)
            else:
                pulse.loaded()
            progress(done_bytes, total_bytes)

        return told

    def _kv_budget_bytes(self, weights_bytes: int) -> int:
        if self.config.kv_memory_gb is not None:
            return int(self.config.kv_memory_gb * 1e9)
        now = available_bytes() // self.world.hosts.count(self.world.host)
        within = self.layout.machines[self.world.rank].usable_bytes - weights_bytes
        return int(_KV_SHARE * max(0, min(now, within)))


@contextmanager
def open_session(
    config: RunConfig, blas: str, met: Callable[[], None] = lambda: None
) -> Iterator[Session]:
    """Join the world, find `config.model` and check that all ranks can run it together.

    `met` is called when this rank watches over the others, or is watched over by the first.
    Raises AgreedError, the same on every rank, if any rank cannot.
    """
    with ExitStack() as stack:
        world = stack.enter_context(
            join(config.fabric, config.jaccl_devices, config.heartbeat_timeout_s)
        )
        met()
        files = stack.enter_context(found_model(world, config, _say))
        tokenizer = None
        with world.agreement():
            if world.is_leader:
                tokenizer = Tokenizer(files.folder, files.config, config.trust_remote_code)
        facts = _facts(config, world, files, blas)
        world.compare(facts)
        layout = lay_out(world, config, files, _say)
        yield Session(world, config, files, tokenizer, facts, layout)


def _say(line: str) -> None:
    print(f"mlx-dist: {line}", file=sys.stderr, flush=True)


def _check_room(room: KvRoom) -> None:
    if not KvLedger([room], slack=0).fits([[_LEAST_TOKENS]], None):
        raise ConfigError(
            f"{room.budget_bytes / 1e9:.4f} GB of KV memory do not hold even a short sequence; "
            "give --kv-memory-gb more, or use a smaller model"
        )


def settings(config: RunConfig) -> dict[str, str]:
    """What decides how numbers come out on this host, beside versions and the model."""
    device = mx.default_device().type.name
    facts = {"device": device, "--dtype": str(config.dtype)}
    if device == "cpu":
        # With a compiler MLX fuses kernels, which round differently in the last bit.
        facts["C++ compiler"] = "present" if shutil.which("g++") else "absent"
    for name, value in os.environ.items():
        is_of_mlx = name.startswith("MLX_") and not name.startswith("MLX_DIST_")
        if name == _SHARED_VARIABLE or (is_of_mlx and name not in LOCAL_VARIABLES):
            facts[name] = value
    return facts


def _facts(config: RunConfig, world: World, files: ModelFiles, blas: str) -> dict[str, str]:
    """What must be equal on all ranks, by names that mean something in an error."""
    facts = {
        "mlx_dist": mlx_dist.__version__,
        "wire version": str(WIRE_VERSION),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "MPI": world.mpi_wire.version if world.mpi_wire else "none",
        "fabric": world.fabric,
        "model": files.fingerprint(),
        # What ranks measure together depends on it.
        "--batching": config.batching if parse_batching(config.batching) else "measured",
    } | settings(config)
    if facts["device"] == "cpu":
        facts["BLAS"] = blas
    return facts
