"""The command line's frame: `mlx-dist` itself, which the modules beside this one give commands.

A flag's value is what the command line says, or else its variable, the file, its default. Importing
this package imports neither MLX nor MPI, so that `-n 3` can become mpirun at once and a rank can
open its BLAS first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mlx_dist
from mlx_dist.cli.flags import PREFIX, Origin, commands_in, flags_of
from mlx_dist.cli.settings import FILE, FILE_VARIABLE, Settings
from mlx_dist.errors import ConfigError


class _Program(TyperGroup):
    """The commands, each of which takes MLX_DIST_X for its flag --x."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for _, command in commands_in(self):
            for flag in flags_of(command).values():
                # Said once for all, in the help of `mlx-dist`, but where a command says it itself.
                flag.option.show_envvar = flag.option.envvar is not None
                flag.option.envvar = flag.variable

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            where = _where(error)
            if where is None:
                raise
            raise ConfigError(f"{where}: {error}") from None


def _where(error: typer.BadParameter) -> str | None:
    """Where the wrong value is, if not on the command line: click names the flag all the same."""
    if error.ctx is None:
        return None
    for flag in flags_of(error.ctx.command).values():
        if flag.option is error.param:
            match flag.origin(error.ctx):
                case Origin.environment:
                    return f"{flag.variable} in the environment"
                case Origin.file:
                    return f"{error.ctx.obj.path}: {flag.key}"
    return None


app = typer.Typer(
    cls=_Program,
    help=(
        "One language model on 2 to 8 machines: an MPI program for Apple's MLX.\n\n"
        f"What no flag says, the variable {PREFIX}_FLAG says, or else {FILE}; "
        "see mlx-dist config."
    ),
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
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(envvar=FILE_VARIABLE, help=f"Settings, in place of ./{FILE}."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    assert isinstance(context.command, TyperGroup)
    context.obj = settings = Settings.read(config)
    context.default_map = settings.defaults(context.command)
