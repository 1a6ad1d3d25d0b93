"""`mlx-dist chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import (
    DEMO,
    DtypeOption,
    FabricOption,
    Hostfile,
    JacclDevices,
    KvMemory,
    Layers,
    Model,
    NumRanks,
    PrefillChunk,
    Trust,
    become_ranks,
    flag,
    new_seed,
)
from mlx_dist.config import Dtype, Fabric, RunConfig, parse_layers
from mlx_dist.messages import Sampling
from mlx_dist.params import Params


@app.command()
def chat(
    model: Model = DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    kv_memory_gb: KvMemory = None,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 512,
    jaccl_devices: JacclDevices = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the model in the terminal."""
    config = RunConfig(
        model,
        parse_layers(layers),
        fabric,
        dtype,
        prefill_chunk,
        jaccl_devices,
        kv_memory_gb,
        batching=f"fixed:1,1,{prefill_chunk}",
        trust_remote_code=trust_remote_code,
    )
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=new_seed(seed))
    params = Params(max_tokens, sampling)
    params.check(flag)
    blas = become_ranks(num_ranks, hostfile)

    from mlx_dist.chat import run_chat

    run_chat(config, blas, system, params)
