"""`mlx-dist.toml`: where it is, what it may say, and what that means for each command.

A key is a flag's long name without dashes. At the top it holds for every command that has the
flag; in the table `[COMMAND]` for that command, over what the top says. The table `[cluster]` is
`mlx-dist cluster`'s own.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from mlx_dist.cli.flags import Flag, commands_in, flags_of
from mlx_dist.errors import ConfigError

FILE = "mlx-dist.toml"
FILE_VARIABLE = "MLX_DIST_CONFIG"
CLUSTER = "cluster"

_EXPECTED: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file says, and its absolute path; nothing, and None, where no file is read."""

    path: Path | None
    document: dict[str, Any]

    @classmethod
    def read(cls, named: Path | None) -> Settings:
        """The settings of the file `named`, or else of the mlx-dist.toml in this folder, if any.

        A variable that is there and empty, which click takes for none, says to read no file.
        Raises ConfigError for a file that cannot be read or is no TOML.
        """
        if named is None and (FILE_VARIABLE in os.environ or not Path(FILE).is_file()):
            return cls(None, {})
        path = (named or Path(FILE)).absolute()
        try:
            return cls(path, tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no TOML: {error}") from None

    def table(self, name: str) -> dict[str, Any]:
        """The table `[name]`, or an empty one. Raises ConfigError if it is something else."""
        found = self.document.get(name, {})
        if isinstance(found, dict):
            return found
        raise ConfigError(f"{self.path}: {name} is no table; write [{name}] above its keys")

    def defaults(self, program: TyperGroup) -> dict[str, Any]:
        """click's default_map for the commands of `program`.

        Raises ConfigError for what no command takes, wherever it stands.
        """
        flags = {name: flags_of(command) for name, command in commands_in(program)}
        tables = {key: value for key, value in self.document.items() if isinstance(value, dict)}
        top = {key: value for key, value in self.document.items() if key not in tables}
        self._check_names(flags, top, tables)
        values = {}
        for command, known in flags.items():
            said = self._values(known, top, "")
            said |= self._values(known, tables.get(command, {}), f" in [{command}]")
            values[command] = said
        return _nested(values)

    def _check_names(
        self, flags: dict[str, dict[str, Flag]], top: dict[str, Any], tables: dict[str, Any]
    ) -> None:
        every = {key for known in flags.values() for key in known}
        for key in top:
            if key not in every:
                hint = _meant(key, {*every, *flags})
                raise ConfigError(f"{self.path}: no command has a flag --{key}{hint}")
        for name, table in tables.items():
            if name == CLUSTER:
                continue
            if name not in flags:
                raise ConfigError(f"{self.path}: [{name}] is no command{_meant(name, {*flags})}")
            for key in table:
                if key not in flags[name]:
                    owners = ", ".join(other for other, known in flags.items() if key in known)
                    hint = f"; it is a flag of {owners}" if owners else _meant(key, {*flags[name]})
                    raise ConfigError(f"{self.path}: {key} in [{name}]: no such flag{hint}")

    def _values(self, flags: dict[str, Flag], table: dict[str, Any], where: str) -> dict[str, Any]:
        """The parameters that `table` fills. Raises ConfigError for a value of the wrong kind."""
        values = {}
        for key, value in table.items():
            if flag := flags.get(key):
                try:
                    values[flag.name] = self._value(flag, value)
                except ValueError as error:
                    raise ConfigError(f"{self.path}: {key}{where} is {error}") from None
        return values

    def _value(self, flag: Flag, value: Any) -> Any:
        if not flag.repeats:
            return self._one(flag, value)
        return [self._one(flag, each) for each in (value if isinstance(value, list) else [value])]

    def _one(self, flag: Flag, value: Any) -> Any:
        """`value` as click takes it. Raises ValueError, which says what it is and should be."""
        kind = flag.kind
        if kind in _EXPECTED:
            # True is an int, and 3 a fine number of gigabytes.
            if type(value) is kind or (kind is float and type(value) is int):
                return value
            raise ValueError(f"{_shown(flag, value)}; write {_EXPECTED[kind]}")
        # A number is as good as its text.
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{_shown(flag, value)}; write a string")
        text = str(value)
        if "\0" in text:
            raise ValueError("a string with a NUL character; no argument can hold one")
        if issubclass(kind, Enum):
            names = [str(each.value) for each in kind]
            if text not in names:
                raise ValueError(f"{_shown(flag, value)}; write one of {', '.join(names)}")
        return self._path(flag, text)

    def _path(self, flag: Flag, text: str) -> str:
        """`text`, and if it is a path, the path from this file's folder."""
        assert self.path is not None
        if not text or not (issubclass(flag.kind, Path) or flag.may_be_path):
            return text
        try:
            path = self.path.parent / Path(text).expanduser()
            # "owner/model" is a path only where there is one.
            if issubclass(flag.kind, Path) or text.startswith((".", "~")) or path.exists():
                return str(path)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{text!r}: {error}") from None
        return text


def _shown(flag: Flag, value: Any) -> str:
    """A wrong value in an error, as the file has it; a secret is not shown."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if flag.is_secret:
        return "not text"
    return repr(value) if isinstance(value, str) else str(value).lower()


def _meant(name: str, known: set[str]) -> str:
    """What was perhaps meant by a name that is none."""
    close = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"cluster": {"up": ...}} of {"cluster up": ...}."""
    nested: dict[str, Any] = {}
    for names, said in values.items():
        *groups, last = names.split(" ")
        level = nested
        for group in groups:
            level = level.setdefault(group, {})
        level[last] = said
    return nested
