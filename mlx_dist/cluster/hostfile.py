"""mpirun's hostfile: which hosts it names, and how one is written. Knows no ssh and no MPI."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_dist.errors import ConfigError


def read_hosts(hostfile: Path) -> tuple[str, ...]:
    """The hosts of `hostfile`, each once, in its order. mpirun starts a daemon on every one.

    Raises ConfigError if it cannot be read or names none.
    """
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {hostfile} cannot be read: {error}") from None
    words = [line.partition("#")[0].split() for line in lines]
    hosts = tuple(dict.fromkeys(line[0] for line in words if line))
    if not hosts:
        raise ConfigError(f"--hostfile {hostfile} names no host; see hostfile.txt for an example")
    require_names(hosts)
    return hosts


def read_slots(hostfile: Path) -> dict[str, int]:
    """The number of ranks that each host of `hostfile` takes, 1 where it does not say.

    Raises ConfigError as `read_hosts` does.
    """
    slots = dict.fromkeys(read_hosts(hostfile), 0)
    for line in hostfile.read_text(encoding="utf-8").splitlines():
        if words := line.partition("#")[0].split():
            told = [word.removeprefix("slots=") for word in words if word.startswith("slots=")]
            slots[words[0]] += int(told[0]) if told and told[0].isdecimal() else 1
    return slots


def require_names(hosts: Sequence[str]) -> None:
    """Raise ConfigError for what is no host's name. ssh would take one with a dash for a flag."""
    for host in hosts:
        if not host.isprintable() or host.startswith("-") or len(host.split()) != 1:
            raise ConfigError(
                f"{host!r} is no host; write a name or an address, as in mini-2.local"
            )


def hostfile_of(hosts: Sequence[str]) -> str:
    """The text of a hostfile with a rank on each of `hosts`."""
    lines = [
        "# The hosts, one rank each. The first, the leader, is where mlx-dist is started.",
        "# It must reach the others by ssh without a password.",
        *slot_lines(dict.fromkeys(hosts, 1)),
    ]
    return "\n".join(lines) + "\n"


def slot_lines(slots: Mapping[str, int]) -> list[str]:
    """The lines of a hostfile that give each host its number of ranks."""
    return [f"{host} slots={num_ranks}" for host, num_ranks in slots.items()]


def is_this_machine(host: str) -> bool:
    """Whether `host`, as a hostfile has it, is where this process runs."""
    name = host.rpartition("@")[2]
    own = socket.gethostname()
    if name.lower() in ("localhost", own.lower(), own.partition(".")[0].lower()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    """Whether a socket can be bound to `address`, which only a host's own ones allow."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
