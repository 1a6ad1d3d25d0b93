"""`mlx-dist verify`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.flags import flag_of
from mlx_dist.cli.options import AsJson, Run, runs_model
from mlx_dist.params import Params


@app.command()
@runs_model(prefill_chunk=16)
def verify(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to compare on; may repeat.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Compare the placement with one process, layer by layer. Exit code 1 if they differ."""
    Params(max_tokens).check(flag_of)
    blas = run.become_ranks()

    from mlx_dist.verify import run_verify

    if not run_verify(run.config, blas, prompt, max_tokens, as_json):
        sys.exit(1)
