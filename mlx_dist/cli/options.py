"""Flags that several commands take, and what becomes of them."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_dist.cluster import launch
from mlx_dist.cluster.blas import preload_blas
from mlx_dist.config import Dtype, Fabric
from mlx_dist.demo import MODEL_DIR
from mlx_dist.errors import ConfigError

DEMO = str(MODEL_DIR)

Model = Annotated[str, typer.Option(help="A model's folder or hub id.")]
NumRanks = Annotated[
    int | None, typer.Option("-n", "--ranks", help="Start this many ranks under mpirun.")
]
Hostfile = Annotated[Path | None, typer.Option(help="mpirun's list of hosts, used with -n.")]
Layers = Annotated[str | None, typer.Option(help="Layers of each rank, as in 3,1,2. Even if left.")]
FabricOption = Annotated[Fabric, typer.Option("--fabric", help="What moves arrays.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Convert the weights to this.")]
PrefillChunk = Annotated[int, typer.Option(help="Most prompt tokens in one step.")]
JacclDevices = Annotated[Path | None, typer.Option(help="Device matrix for --fabric jaccl.")]
KvMemory = Annotated[float | None, typer.Option(help="Memory for sequences on each rank, in GB.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the tokenizer.")
]
Batching = Annotated[
    str,
    typer.Option(help="auto, measure, or fixed:M,B,C: microbatches, sequences of each, chunk."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def become_ranks(num_ranks: int | None, hostfile: Path | None) -> str:
    """Start the ranks that are asked for, or be one; answer which BLAS it multiplies with."""
    if not launch.under_a_launcher():
        if num_ranks is not None and num_ranks != 1:
            launch.relaunch(num_ranks, hostfile, sys.argv[1:])
        if hostfile is not None:
            raise ConfigError("--hostfile goes with -n of 2 or more; say how many ranks to start")
    elif num_ranks is not None and num_ranks != launch.launched_size():
        raise ConfigError(
            f"-n {num_ranks} under a launcher that started {launch.launched_size()} ranks; "
            "leave -n out"
        )
    return preload_blas(launch.threads_per_rank())


def new_seed(seed: int | None) -> int:
    return secrets.randbits(63) if seed is None else seed


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
