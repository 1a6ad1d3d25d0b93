"""`mlx-dist plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import AsJson, Run, runs_model
from mlx_dist.cluster import launch
from mlx_dist.errors import ConfigError

_MOST_TOKENS = 1 << 24
_MOST_STREAMS = 4096
_BITS = range(2, 9)


@app.command()
@runs_model()
def plan(
    run: Run,
    machines: Annotated[
        Path | None, typer.Option(help="TOML file of machines that need not be there.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="As if the weights were quantized to so many.")
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option("--context", help="Most tokens of a sequence. 4096, or the model's if fewer."),
    ] = None,
    streams: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="A prompt's length; may repeat. 128 and 2048.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict who would hold what and how fast that would be, for a file's machines or for ranks.

    Nothing of the model is loaded; a folder with a config.json is enough.
    """
    if bits is not None and bits not in _BITS:
        raise ConfigError(f"--bits is {bits}; use {_BITS[0]} to {_BITS[-1]}")
    counts = {"--context": (context_tokens, _MOST_TOKENS), "--streams": (streams, _MOST_STREAMS)}
    counts |= {f"--prompt-tokens {n}": (n, _MOST_TOKENS) for n in prompt_tokens or ()}
    for flag, (value, most) in counts.items():
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{flag} is {value}; use 1 to {most}")
    if machines is None:
        if run.ranks is None and not launch.under_a_launcher():
            raise ConfigError(
                "there is nothing to plan for; give --machines FILE.toml, or -n N for so many ranks"
            )
        run.become_ranks()
    elif launch.under_a_launcher() or run.is_given("ranks"):
        raise ConfigError(
            "--machines is about other machines than these ranks'; start without -n and mpirun"
        )
    elif run.is_given("memory_gb"):
        raise ConfigError("--memory-gb is for ranks; write usable_gb into the file of --machines")

    from mlx_dist.plan import Asked, run_plan

    asked = Asked(machines, bits, context_tokens, streams, tuple(prompt_tokens or ()))
    run_plan(run.config, asked, as_json)
