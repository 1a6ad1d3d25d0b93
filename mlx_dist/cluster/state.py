"""A server's state folder: which process it is, on which hosts, and what it said.

Knows files and their contents; starts and ends nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mlx_dist.cluster import jobs
from mlx_dist.errors import ConfigError, LaunchError

_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_SERVED = re.compile(r" is served at (http://\S+)")


class ServerRecord(msgspec.Struct, frozen=True):
    """A server that was started. `started_at` is in seconds since 1970.

    `pid` is None if it was about to be started, or is known to be over while something of it is
    perhaps left on `hosts`. `arguments` are those of `mlx-dist serve`. `url` is set once it serves.
    """

    job: str
    pid: int | None
    started_at: float
    hosts: list[str]
    arguments: list[str]
    url: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether the process is there; after a reboot its number may be another's."""
        return self.pid is not None and jobs.runs(self.pid, self.job)


@dataclass(frozen=True, slots=True)
class StateFolder:
    """The folder `path` of one server. It need not exist yet, and is made for its owner alone."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "server.pid"

    @property
    def log(self) -> Path:
        return self.path / "server.log"

    @property
    def previous_log(self) -> Path:
        return self.path / "server.log.1"

    def read(self) -> ServerRecord | None:
        """The server that was started last and not stopped, or None. Raises ConfigError."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=ServerRecord)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.record_path} cannot be read: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.record_path} is damaged ({error}); see on each host that no mlx_dist runs, "
                "then delete it"
            ) from None

    def write(self, record: ServerRecord) -> None:
        """Remember `record` in place of what was there."""
        unfinished = self.record_path.with_suffix(".unfinished")
        with self._writing():
            # Whole or not at all, whenever this is interrupted.
            unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
            unfinished.replace(self.record_path)

    def forget(self) -> None:
        """Nothing is left of the server."""
        with self._writing():
            self.record_path.unlink(missing_ok=True)

    def rotate_log(self) -> None:
        """Make way for a new log; of older ones the last is kept."""
        with self._writing():
            if self.log.exists():
                self.log.replace(self.previous_log)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Raises LaunchError if another process does."""
        with self._writing():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LaunchError(
                    f"another `mlx-dist cluster up` or `down` is at work in {self.path}; "
                    "wait until it is done"
                ) from None
            yield

    def served_url(self) -> str | None:
        """Where the log says that the server answers, or None while it says nothing of it."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as lines:
            for line in lines:
                if url := url_in(line.decode(errors="replace")):
                    return url
        return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"the state folder {self.path} cannot be used: {error.strerror}; "
                "name another with --state-dir"
            ) from None


def url_in(line: str) -> str | None:
    """Where the server answers, if it is this line of its log that says so."""
    found = _SERVED.search(line.replace("\0", ""))
    return found[1] if found else None


def state_folder(folder: Path | None, name: str) -> StateFolder:
    """The state folder of the server called `name`: `folder` if given, or the user's usual place.

    Raises ConfigError for a name that is no file name.
    """
    if folder is not None:
        return StateFolder(folder.expanduser().absolute())
    if not _NAME.fullmatch(name):
        raise ConfigError(f"the name {name!r} is no file name; use letters, digits, - and _")
    if sys.platform == "darwin":
        top = Path.home() / "Library" / "Application Support"
    else:
        top = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return StateFolder(top / "mlx_dist" / name)
