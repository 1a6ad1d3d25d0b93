"""Settings that all ranks share, checked once. Knows no arrays and no MPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from mlx_dist.errors import ConfigError, PlacementError

# The default: how long a rank may be silent.
HEARTBEAT_TIMEOUT_S = 5.0


class Fabric(StrEnum):
    """The `mlx.distributed` backend that moves arrays."""

    auto = "auto"
    mpi = "mpi"
    ring = "ring"
    jaccl = "jaccl"


class Dtype(StrEnum):
    """What the weights are converted to while loading; `auto` keeps what the files have."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Split(StrEnum):
    """How the model is cut where no counts are given: by what the machines can do, or evenly."""

    auto = "auto"
    even = "even"


class Parallel(StrEnum):
    """How ranks share the model: each some layers, all a slice of every layer, or as predicted."""

    pipeline = "pipeline"
    tensor = "tensor"
    auto = "auto"


class Objective(StrEnum):
    """What the cut is best for: the time of a single stream, or the slowest stage of many."""

    latency = "latency"
    throughput = "throughput"


class Weights(StrEnum):
    """Where a rank's weights come from: its own files, or the leader where it has none."""

    own = "own"
    leader = "leader"


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What a run of the program is given, the same on every rank.

    `layers` holds the number of layers of each stage, or how they are found: for `optimize`, and
    with `leave_out` perhaps none for a slow machine. `parallel` may be a number: stages are then
    tensor groups of so many ranks, and `slices` how large their slices are to each other, one
    number for each rank, or how that is found. `memory_gb` is the most that a rank may use,
    by host name, or "" for all others. With `weights` of the leader, ranks that lack the model are
    sent their part. `prefill_chunk` is the largest number of prompt tokens in one step.
    `kv_memory_gb` is what sequences may fill on each rank, or None for a share of what is free.
    `batching` is "auto", "measure" or "fixed:MICROBATCHES,SEQUENCES,CHUNK". At most `max_queue`
    requests wait. With `reuse_prefixes` caches are kept for prompts that begin like earlier ones.
    Code that comes with a tokenizer runs only with `trust_remote_code`. A rank that is silent for
    `heartbeat_timeout_s` ends the job.
    """

    model: str
    layers: tuple[int, ...] | Split = Split.auto
    fabric: Fabric = Fabric.auto
    dtype: Dtype = Dtype.auto
    prefill_chunk: int = 512
    jaccl_devices: Path | None = None
    kv_memory_gb: float | None = None
    batching: str = "auto"
    max_queue: int = 1024
    reuse_prefixes: bool = True
    trust_remote_code: bool = False
    optimize: Objective = Objective.latency
    leave_out: bool = False
    memory_gb: Mapping[str, float] = field(default_factory=dict)
    weights: Weights = Weights.own
    parallel: Parallel | int = Parallel.pipeline
    slices: tuple[int, ...] | Split = Split.auto
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--model is empty; name a folder or a hub id")
        if self.prefill_chunk < 1:
            raise ConfigError(f"--prefill-chunk is {self.prefill_chunk}; use 1 or more")
        if self.max_queue < 1:
            raise ConfigError(f"--max-queue is {self.max_queue}; use 1 or more")
        if self.kv_memory_gb is not None and not 0 < self.kv_memory_gb < 1e6:
            raise ConfigError(f"--kv-memory-gb is {self.kv_memory_gb}; use gigabytes above 0")
        for host, gigabytes in self.memory_gb.items():
            if not 0 < gigabytes < 1e6:
                spelled = f"{host}={gigabytes:g}" if host else f"{gigabytes:g}"
                raise ConfigError(f"--memory-gb is {spelled}; use gigabytes above 0")
        if isinstance(self.slices, tuple) and min(self.slices, default=0) < 1:
            spelled = ",".join(map(str, self.slices))
            raise ConfigError(f"--slices {spelled} gives a rank nothing; use numbers of 1 or more")
        if not 0.5 <= self.heartbeat_timeout_s <= 3600:
            raise ConfigError(
                f"--heartbeat-timeout-s is {self.heartbeat_timeout_s:g}; use 0.5 to 3600"
            )
        if self.fabric is Fabric.jaccl and self.jaccl_devices is None:
            raise ConfigError(
                "--fabric jaccl needs --jaccl-devices FILE, the JSON matrix of RDMA devices "
                "that `mlx.distributed_config` writes"
            )


def parse_layers(text: str) -> tuple[int, ...] | Split:
    """The counts in "3,1,2", or the way in "auto" or "even". Raises PlacementError for others."""
    if text in list(Split):
        return Split(text)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PlacementError(
            f"--layers {text!r} is none of auto, even and a list of counts, one per rank, "
            "as in 3,1,2"
        ) from None


def parse_parallel(text: str) -> Parallel | int:
    """The way in "pipeline", "tensor" or "auto", or the number in "tensor=2".

    Raises ConfigError for others.
    """
    if text in list(Parallel):
        return Parallel(text)
    name, _, size = text.partition("=")
    if name != Parallel.tensor or not size.isdecimal() or int(size) < 2:
        raise ConfigError(
            f"--parallel {text!r} is none of pipeline, tensor, auto, and tensor=N for groups of N "
            "ranks, 2 or more"
        )
    return int(size)


def parse_slices(text: str) -> tuple[int, ...] | Split:
    """The numbers in "2,1,1", or the way in "auto" or "even". Raises ConfigError for others."""
    if text in list(Split):
        return Split(text)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--slices {text!r} is none of auto, even and a list of sizes, one per rank, as in "
            "2,1,1"
        ) from None


def parse_memory(texts: Sequence[str]) -> dict[str, float]:
    """The gigabytes in "8", for every host, or in "HOST=8". Raises ConfigError for others."""
    limits = {}
    for text in texts:
        host, _, gigabytes = text.rpartition("=")
        try:
            limits[host] = float(gigabytes)
        except ValueError:
            raise ConfigError(
                f"--memory-gb {text!r} is neither gigabytes, as in 12.5, nor HOST=GIGABYTES"
            ) from None
    return limits
