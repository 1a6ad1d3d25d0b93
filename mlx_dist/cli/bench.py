"""`mlx-dist bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import (
    DEMO,
    AsJson,
    DtypeOption,
    FabricOption,
    Hostfile,
    JacclDevices,
    Layers,
    Model,
    NumRanks,
    PrefillChunk,
    become_ranks,
)
from mlx_dist.config import Dtype, Fabric, RunConfig, parse_layers
from mlx_dist.errors import ConfigError


@app.command()
def bench(
    model: Model = DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    prompt_tokens: Annotated[int, typer.Option("-p", help="Length of the random prompt.")] = 128,
    generation_tokens: Annotated[int, typer.Option("-g", help="Tokens to generate.")] = 64,
    num_trials: Annotated[int, typer.Option("-r", help="Measured repetitions.")] = 3,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 512,
    jaccl_devices: JacclDevices = None,
    as_json: AsJson = False,
) -> None:
    """Measure prompt and generation speed on random tokens."""
    config = RunConfig(model, parse_layers(layers), fabric, dtype, prefill_chunk, jaccl_devices)
    least = {"-p": (prompt_tokens, 1), "-g": (generation_tokens, 2), "-r": (num_trials, 1)}
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise ConfigError(f"{flag} is {value}; use {minimum} or more")
    blas = become_ranks(num_ranks, hostfile)

    from mlx_dist.bench import run_bench

    run_bench(config, blas, prompt_tokens, generation_tokens, num_trials, as_json)
