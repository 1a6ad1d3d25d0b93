"""Processes of a job, by what they are and where they run, as seen from outside of all hosts.

Knows /proc (proc(5)) and nothing of what is run; so it works on Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_RANK = b"OMPI_COMM_WORLD_RANK="
_BY_NAME = {"prterun": "mpirun", "mpirun": "mpirun", "prted": "prted"}


@dataclass(frozen=True, slots=True)
class Process:
    """A process: `role` is as in `deck.py`, or what it is called; `host` is none of the lab's if
    empty. `start` tells it from a later process of the same number."""

    pid: int
    start: int
    host: str
    role: str
    command: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, or is at least frozen: one that waits to be seen off is not."""
        stat = _stat(self.pid)
        return stat is not None and int(stat[19]) == self.start and stat[0] not in "ZX"

    def send(self, number: int) -> None:
        """A signal to it, and to no other."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def __str__(self) -> str:
        return f"{self.host or 'here'}: {self.role}: {self.command[:120]}"


def processes_of(job: str, hosts: dict[str, str]) -> list[Process]:
    """What belongs to `job`, wherever it runs; `hosts` names the process namespaces."""
    return list(_found(job.encode(), hosts, on_hosts_only=False))


def processes_on(hosts: dict[str, str]) -> list[Process]:
    """All that runs on hosts of the lab, but the first process of each."""
    return list(_found(b"", hosts, on_hosts_only=True))


def namespace_of(pid: int) -> str:
    """The process namespace that `pid` is in; empty if it has ended."""
    try:
        return str((_PROC / str(pid) / "ns" / "pid").readlink())
    except OSError:
        return ""


def first_process_of(words: tuple[str, ...]) -> int | None:
    """The youngest process with all of `words` in its command line."""
    found = []
    for pid in _pids():
        command = _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")
        if all(word in command for word in words):
            found.append(pid)
    return max(found, default=None)


def _found(job: bytes, hosts: dict[str, str], on_hosts_only: bool) -> Iterator[Process]:
    ranks: set[int] = set()
    # A rank's own children carry its variables too, and come after it.
    for pid in sorted(_pids()):
        command, environ = _read(pid, "cmdline"), _read(pid, "environ")
        host = hosts.get(namespace_of(pid), "")
        if pid == os.getpid() or (on_hosts_only and not host) or job not in command + environ:
            continue
        stat = _stat(pid)
        if not command or stat is None or stat[0] in "ZX" or b"host.py\0up\0" in command:
            continue
        role = _role(command, environ)
        if role.startswith("rank "):
            role = f"of {role}" if int(role[5:]) in ranks else role
            ranks.add(int(role.rpartition(" ")[2]))
        text = command.replace(b"\0", b" ").decode(errors="replace").strip()
        yield Process(pid, int(stat[19]), host, role, text)


def _role(command: bytes, environ: bytes) -> str:
    for variable in environ.split(b"\0"):
        if variable.startswith(_RANK):
            return f"rank {int(variable.removeprefix(_RANK))}"
    words = command.decode(errors="replace").split("\0")
    name = Path(words[0]).name
    if "--supervise" in words and "host.py" not in command.decode(errors="replace"):
        return "supervisor"
    return _BY_NAME.get(name, name)


def _pids() -> list[int]:
    return [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdecimal()]


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third, the state, on; None if it has ended."""
    text = _read(pid, "stat").decode(errors="replace")
    return text.rpartition(")")[2].split() or None
