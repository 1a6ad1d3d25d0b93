"""`mlx-dist bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import AsJson, Run, runs_model
from mlx_dist.errors import ConfigError


@app.command()
@runs_model("prefill_chunk")
def bench(
    run: Run,
    prompt_tokens: Annotated[
        int, typer.Option("-p", "--prompt-tokens", help="Length of the random prompt.")
    ] = 128,
    generation_tokens: Annotated[
        int, typer.Option("-g", "--generation-tokens", help="Tokens to generate.")
    ] = 64,
    streams: Annotated[int, typer.Option("--streams", help="Prompts at once.")] = 1,
    trials: Annotated[int, typer.Option("-r", "--trials", help="Measured repetitions.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure prompt and generation speed on random tokens."""
    least = {
        "-p": (prompt_tokens, 1),
        "-g": (generation_tokens, 2),
        "-r": (trials, 1),
        "--streams": (streams, 1),
    }
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise ConfigError(f"{flag} is {value}; use {minimum} or more")
    blas = run.become_ranks()

    from mlx_dist.bench import Load, run_bench

    load = Load(prompt_tokens, generation_tokens, streams, trials)
    run_bench(run.config, blas, load, as_json)
