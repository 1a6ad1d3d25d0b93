"""From a configuration to ranks that are ready: meet, compare, load.

Every step is one that all ranks take together and that fails on all of them if it fails on one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import mlx.core as mx

import mlx_dist
from mlx_dist.cluster import placement
from mlx_dist.cluster.launch import LOCAL_VARIABLES
from mlx_dist.cluster.memory import available_bytes, peak_rss_bytes
from mlx_dist.cluster.world import World, join
from mlx_dist.config import RunConfig
from mlx_dist.engine.admission import Reuse
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.program import Leader, Rank
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.text import Tokenizer
from mlx_dist.engine.transport import Transport
from mlx_dist.errors import ConfigError
from mlx_dist.messages import WIRE_VERSION, Report, expect
from mlx_dist.model.families import family_of
from mlx_dist.model.files import ModelFiles, find_model
from mlx_dist.model.grammar import Grammars
from mlx_dist.model.sampling import Samplers
from mlx_dist.model.stage import Stage
from mlx_dist.model.verdicts import UNBATCHED, UNPADDED
from mlx_dist.model.weights import load_stage

# What these name is a rank's own; any other MLX_ variable must be equal everywhere.
_OWN_VARIABLES = LOCAL_VARIABLES | {
    "MLX_DIST_API_KEY",
    "MLX_DIST_TERMINAL_WIDTH",
    "MLX_DIST_TRACE",
}
# Of the memory that is free once the weights are in, what sequences may fill.
_KV_SHARE = 0.6
_LEAST_TOKENS = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Session:
    """A rank that has met the others and found the model.

    `tokenizer` is the leader's. `facts` are equal on all ranks.
    """

    world: World
    config: RunConfig
    files: ModelFiles
    tokenizer: Tokenizer | None
    facts: dict[str, str]

    def load(self, progress: Progress = lambda _done, _total: None) -> Rank:
        """Read this rank's part of the model. `progress` hears of (bytes read, bytes in all).

        Raises AgreedError, the same on every rank, if any rank cannot.
        """
        start = time.perf_counter()
        with self.world.agreement():
            loaded = load_stage(self.files, self._cut, self.config.dtype, progress)
            family = family_of(self.files.config)
            stage = Stage(
                loaded.model,
                loaded.anatomy,
                *self._cut(loaded.anatomy.num_layers),
                batches=family not in UNBATCHED,
                pads=family not in UNPADDED,
            )
            if self.tokenizer is not None:
                self.tokenizer.check_vocabulary(stage.vocab_size)
            kv_room = KvRoom(stage.kv_cost(), self._kv_budget_bytes())
            _check_room(kv_room)
        grammars = Grammars(
            self.files.folder,
            self.files.config,
            stage.vocab_size,
            self.config.trust_remote_code,
        )
        return Rank(
            stage=stage,
            transport=Transport(self.world),
            samplers=Samplers(stage.vocab_size, grammars.matcher),
            grammars=grammars,
            kv_room=kv_room,
            weights_bytes=loaded.weights_bytes,
            load_s=time.perf_counter() - start,
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
        rooms = [KvRoom(report.kv_cost, report.kv_budget_bytes) for report in reports]
        scheduler = Scheduler(
            batching,
            KvLedger(rooms, slack=batching.prefill_chunk),
            num_stages=len(reports),
            max_queue=max_queue,
            reuse=Reuse(reuses and slots.can_batch, slots.trim_limit),
        )
        return Leader(rank, scheduler)

    def reports(self, rank: Rank) -> list[Report]:
        """Every rank's account of itself, in rank order, on every rank."""
        report = Report(
            rank=self.world.rank,
            host=self.world.host,
            layers=(rank.stage.start, rank.stage.end),
            weights_bytes=rank.weights_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            load_s=rank.load_s,
            kv_cost=rank.kv_room.cost,
            kv_budget_bytes=rank.kv_room.budget_bytes,
            busy_s=rank.busy_s,
            sent_bytes=rank.transport.sent_bytes,
        )
        return [expect(message, Report) for message in self.world.control.all_gather(report)]

    def _kv_budget_bytes(self) -> int:
        if self.config.kv_memory_gb is not None:
            return int(self.config.kv_memory_gb * 1e9)
        ranks_here = self.world.hosts.count(self.world.host)
        return int(_KV_SHARE * available_bytes() / ranks_here)

    def _cut(self, num_layers: int) -> tuple[int, int]:
        return placement.cut(num_layers, self.world.size, self.config.layers)[self.world.rank]


@contextmanager
def open_session(config: RunConfig, blas: str) -> Iterator[Session]:
    """Join the world, find `config.model` and check that all ranks can run it together.

    Raises AgreedError, the same on every rank, if any rank cannot.
    """
    with join(config.fabric, config.jaccl_devices) as world:
        with world.agreement():
            files = find_model(config.model)
            tokenizer = None
            if world.is_leader:
                tokenizer = Tokenizer(files.folder, files.config, config.trust_remote_code)
        facts = _facts(config, world, files, blas)
        world.compare(facts)
        yield Session(world, config, files, tokenizer, facts)


def _check_room(room: KvRoom) -> None:
    if not KvLedger([room], slack=0).fits([[_LEAST_TOKENS]], None):
        raise ConfigError(
            f"{room.budget_bytes / 1e9:.4f} GB of KV memory do not hold even a short sequence; "
            "give --kv-memory-gb more, or use a smaller model"
        )


def _facts(config: RunConfig, world: World, files: ModelFiles, blas: str) -> dict[str, str]:
    """What must be equal on all ranks, by names that mean something in an error."""
    device = mx.default_device().type.name
    facts = {
        "mlx_dist": mlx_dist.__version__,
        "wire version": str(WIRE_VERSION),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "MPI": world.mpi_wire.version if world.mpi_wire else "none",
        "fabric": world.fabric,
        "device": device,
        "model": files.fingerprint(),
        "--dtype": config.dtype,
        "--layers": ",".join(map(str, config.layers)) if config.layers else "even",
    }
    if device == "cpu":
        facts["BLAS"] = blas
        # With a compiler MLX fuses kernels, which round differently in the last bit.
        facts["C++ compiler"] = "present" if shutil.which("g++") else "absent"
    facts |= {
        name: value
        for name, value in os.environ.items()
        if name.startswith("MLX_") and name not in _OWN_VARIABLES
    }
    return facts
