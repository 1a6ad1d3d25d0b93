"""The command line's frame: `mlx-dist` itself, which the modules beside this one give commands.

Importing this package imports neither MLX nor MPI, so that `-n 3` can become mpirun at once and a
rank can open its BLAS first.
"""

from __future__ import annotations

from typing import Annotated

import typer

import mlx_dist

app = typer.Typer(
    help="One language model on 2 to 8 machines: an MPI program for Apple's MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(mlx_dist.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass
