"""`mlx-dist chat`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.flags import flag_of
from mlx_dist.cli.options import Run, new_seed, runs_model
from mlx_dist.messages import Sampling
from mlx_dist.params import Params


@app.command()
@runs_model("kv_memory_gb", "prefill_chunk", "trust_remote_code")
def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
) -> None:
    """Talk to the model in the terminal."""
    config = replace(run.config, batching=f"fixed:1,1,{run.config.prefill_chunk}")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=new_seed(seed))
    params = Params(max_tokens, sampling)
    params.check(flag_of)
    blas = run.become_ranks()

    from mlx_dist.chat import run_chat

    run_chat(config, blas, system, params)
