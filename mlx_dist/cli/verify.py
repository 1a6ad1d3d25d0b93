"""`mlx-dist verify`."""

from __future__ import annotations

import sys
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
    flag,
)
from mlx_dist.config import Dtype, Fabric, RunConfig, parse_layers
from mlx_dist.params import Params


@app.command()
def verify(
    model: Model = DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to compare on; may repeat.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 8,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 16,
    jaccl_devices: JacclDevices = None,
    as_json: AsJson = False,
) -> None:
    """Compare the placement with one process, layer by layer. Exit code 1 if they differ."""
    config = RunConfig(model, parse_layers(layers), fabric, dtype, prefill_chunk, jaccl_devices)
    Params(max_tokens).check(flag)
    blas = become_ranks(num_ranks, hostfile)

    from mlx_dist.verify import run_verify

    if not run_verify(config, blas, prompt, max_tokens, as_json):
        sys.exit(1)
