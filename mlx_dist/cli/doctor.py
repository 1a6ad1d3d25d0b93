"""`mlx-dist doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import AsJson, Run, runs_model
from mlx_dist.serve.settings import HttpConfig

_HTTP = HttpConfig()


@app.command()
@runs_model("kv_memory_gb", "trust_remote_code", prefill_chunk=256)
def doctor(
    run: Run,
    host: Annotated[str, typer.Option(help="Address that a server would listen on.")] = _HTTP.host,
    port: Annotated[int, typer.Option(help="Port that a server would listen on.")] = _HTTP.port,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare samples of the model's files only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with hosts, network or model. Exit code 1 if something is."""
    HttpConfig(port=port)  # Refuses what is no port.
    blas = run.become_ranks()

    from mlx_dist.doctor import run_doctor

    if not run_doctor(run.config, blas, host, port, quick, as_json):
        sys.exit(1)
