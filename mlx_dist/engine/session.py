"""From a configuration to ranks that are ready: meet, compare, load.

Every step is one that all ranks take together and that fails on all of them if it fails on one.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

import mlx_dist
from mlx_dist.cluster import placement
from mlx_dist.cluster.launch import LOCAL_VARIABLES
from mlx_dist.cluster.world import World, join
from mlx_dist.config import RunConfig
from mlx_dist.engine.program import Rank
from mlx_dist.engine.text import Tokenizer
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import WIRE_VERSION, Report, expect
from mlx_dist.model.files import ModelFiles, find_model
from mlx_dist.model.stage import Stage
from mlx_dist.model.weights import load_stage

# What these name is a rank's own; any other MLX_ variable must be equal everywhere.
_OWN_VARIABLES = LOCAL_VARIABLES | {"MLX_DIST_TERMINAL_WIDTH", "MLX_DIST_TRACE"}


Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Session:
    """A rank that has met the others and found the model. `tokenizer` is the leader's."""

    world: World
    config: RunConfig
    files: ModelFiles
    tokenizer: Tokenizer | None

    def load(self, progress: Progress = lambda _done, _total: None) -> Rank:
        """Read this rank's part of the model. `progress` hears of (bytes read, bytes in all).

        Raises AgreedError, the same on every rank, if any rank cannot.
        """
        start = time.perf_counter()
        with self.world.agreement():
            loaded = load_stage(self.files, self._cut, self.config.dtype, progress)
            stage = Stage(loaded.model, loaded.anatomy, *self._cut(loaded.anatomy.num_layers))
            if self.tokenizer is not None:
                self.tokenizer.check_vocabulary(stage.vocab_size)
        load_s = time.perf_counter() - start
        return Rank(stage, Transport(self.world), loaded.weights_bytes, load_s)

    def reports(self, rank: Rank) -> list[Report]:
        """Every rank's account of itself, in rank order, on every rank."""
        report = Report(
            rank=self.world.rank,
            host=self.world.host,
            layers=(rank.stage.start, rank.stage.end),
            weights_bytes=rank.weights_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            load_s=rank.load_s,
            busy_s=rank.busy_s,
            sent_bytes=rank.transport.sent_bytes,
        )
        return [expect(message, Report) for message in self.world.control.all_gather(report)]

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
            tokenizer = Tokenizer(files.folder, files.config) if world.is_leader else None
        world.compare(_facts(config, world, files, blas))
        yield Session(world, config, files, tokenizer)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
