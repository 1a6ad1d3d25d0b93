"""`mlx-dist config`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlx_dist.cli.app import app
from mlx_dist.cli.flags import Flag, Origin, Sources, as_text, commands_in, flags_of
from mlx_dist.cli.options import AsJson
from mlx_dist.cli.settings import Settings
from mlx_dist.errors import ConfigError

_SHOWN = "serve"


@dataclass(frozen=True, slots=True)
class _Value:
    """What a flag comes to. `source` is the variable's or the file's name."""

    key: str
    value: Any
    origin: Origin
    source: str | None


@app.command(context_settings={"ignore_unknown_options": True})
def config(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND] [FLAGS]", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the values that a command's flags would have, and where each comes from.

    COMMAND is serve if left out, and is not run.
    """
    program = context.parent
    assert program is not None and isinstance(program.command, TyperGroup)
    name, arguments = _named(program.command, list(command or ()))
    values = list(_values(program, name, arguments))
    if as_json:
        from mlx_dist import display

        rows = {
            each.key: {"value": each.value, "origin": each.origin, "source": each.source}
            for each in values
        }
        display.print_json({"command": name, "file": _file(program), "values": rows})
        return
    cells = [(f"--{each.key}", _as_cell(each.value), _as_words(each)) for each in values]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    for key, value, origin in cells:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}")


def _named(program: TyperGroup, words: list[str]) -> tuple[str, list[str]]:
    """The command that `words` begin with, and the rest. Raises ConfigError if it is none."""
    names = {name for name, _ in commands_in(program)}
    for length in (2, 1):
        if (name := " ".join(words[:length])) in names:
            return name, words[length:]
    if words and not words[0].startswith("-"):
        raise ConfigError(f"{words[0]} is no command; use one of {', '.join(sorted(names))}")
    return _SHOWN, words


def _values(program: Any, name: str, arguments: list[str]) -> Iterator[_Value]:
    command = dict(commands_in(program.command))[name]
    for parameter in command.params:
        # What is missing is shown as such.
        parameter.required = False
    said = program.default_map
    for word in name.split(" "):
        said = said[word]
    context = command.make_context(name, arguments, parent=program, default_map=said)
    for flag in flags_of(command).values():
        value = context.params[flag.name]
        if flag.is_secret and value is not None:
            value = "set"
        elif isinstance(value, Path | Enum):
            value = as_text(value)
        yield _Value(
            key=flag.key,
            value=value,
            origin=flag.origin(context),
            source=_source(program, flag, context),
        )


def _source(program: Any, flag: Flag, context: Sources) -> str | None:
    match flag.origin(context):
        case Origin.environment:
            return flag.variable
        case Origin.file:
            return _file(program)
    return None


def _file(program: Any) -> str | None:
    settings: Settings = program.obj
    return str(settings.path) if settings.path else None


def _as_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_words(value: _Value) -> str:
    return f"{value.origin} {value.source or ''}".strip()
