"""What is known of a command's flags: their names in a file and in the environment, their kinds,
where a value came from, and the arguments that say it again.

Reads what typer makes of the commands; knows no command by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import NoneType
from typing import Annotated, Any, Protocol, get_args, get_origin

from typer.core import TyperGroup, TyperOption

PREFIX = "MLX_DIST"


class Origin(StrEnum):
    """Where a value came from. Of these, the first that has one wins."""

    flag = "flag"
    environment = "environment"
    file = "file"
    default = "default"


# click's names for them.
_ORIGINS = {
    "COMMANDLINE": Origin.flag,
    "ENVIRONMENT": Origin.environment,
    "DEFAULT_MAP": Origin.file,
    "DEFAULT": Origin.default,
}


class Sources(Protocol):
    """The part of a command's context that tells where its values came from."""

    def get_parameter_source(self, name: str) -> Enum | None: ...


class MayBePath:
    """Marks, in an annotation, a text that may be a path and need not be one."""


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of a command. `kind` is the type of its value, or of each if it may repeat."""

    option: TyperOption
    kind: type[Any]
    may_be_path: bool

    @property
    def name(self) -> str:
        """The command's parameter that it fills."""
        return self.option.name

    @property
    def key(self) -> str:
        """Its long name without dashes, as a file has it."""
        return self._long_name(self.option.opts).removeprefix("--")

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"{PREFIX}_{self.key.replace('-', '_').upper()}"

    @property
    def repeats(self) -> bool:
        return self.option.multiple

    @property
    def is_secret(self) -> bool:
        """Whether its value may neither be shown nor stand in a command line."""
        return self.option.hide_input

    def origin(self, context: Sources) -> Origin:
        """Where its value in `context` came from."""
        source = context.get_parameter_source(self.name)
        return _ORIGINS[source.name] if source else Origin.default

    def spelled(self, value: Any) -> list[str]:
        """The arguments that set it to `value`; none for what no argument can say, as None."""
        if value is None:
            return []
        if self.kind is bool:
            names = self.option.opts if value else self.option.secondary_opts
            return [self._long_name(names)] if names else []
        # In one argument each: a value may begin with a dash.
        return [f"--{self.key}={as_text(each)}" for each in (value if self.repeats else [value])]

    def _long_name(self, names: list[str]) -> str:
        long_names = [name for name in names if name.startswith("--")]
        assert long_names, f"{self.name} needs a flag that begins with --"
        return long_names[0]


def as_text(value: Any) -> str:
    """A value as a command line has it."""
    return str(value.value if isinstance(value, Enum) else value)


def flag_of(name: str) -> str:
    """The flag of a parameter: `--top-p` of top_p."""
    return "--" + name.replace("_", "-")


def commands_in(group: TyperGroup) -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by the words that name it, as in ("cluster up", command)."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from ((f"{name} {inner}", one) for inner, one in commands_in(command))
        else:
            yield name, command


def flags_of(command: Any) -> dict[str, Flag]:
    """The flags of a command, by their keys, in the order of its help."""
    parameters = inspect.signature(command.callback, eval_str=True).parameters
    flags = [
        Flag(option, *_kind(parameters[option.name].annotation))
        for option in command.params
        if isinstance(option, TyperOption)
    ]
    return {flag.key: flag for flag in flags}


def _kind(annotation: Any) -> tuple[type[Any], bool]:
    """(str, False) for `Annotated[list[str] | None, Option()]`: the type, and is it MayBePath."""
    marks: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
    while inner := [part for part in get_args(annotation) if part is not NoneType]:
        [annotation] = inner
    return annotation, MayBePath in marks
