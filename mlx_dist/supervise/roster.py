"""Which hosts the ranks run on now: all, or those that answer. Pure, but for reading a hostfile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_dist.cluster.hostfile import read_slots, slot_lines

_HERE = "localhost"


@dataclass(frozen=True, slots=True)
class Roster:
    """The hosts that were asked for, with the ranks that each takes, the leader first.

    `num_ranks` were asked for in all; `away` are hosts that do not answer.
    """

    num_ranks: int
    slots: Mapping[str, int]
    away: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(self.slots)

    @property
    def present(self) -> dict[str, int]:
        """The hosts that are not away, with their ranks."""
        return {host: num for host, num in self.slots.items() if host not in self.away}

    @property
    def num_present(self) -> int:
        """The number of ranks to start: fewer where too few hosts are left."""
        if not self.away:
            # mpirun knows better what a host takes of which the file does not say it.
            return self.num_ranks
        return min(self.num_ranks, sum(self.present.values()))

    def without(self, away: Sequence[str]) -> Roster:
        """The same with these hosts away, and the others back. The leader is where this runs."""
        return replace(self, away=tuple(host for host in self.hosts[1:] if host in away))

    def hostfile_text(self) -> str:
        """mpirun's hostfile of the hosts that are present."""
        return "\n".join(slot_lines(self.present)) + "\n"


def roster_of(num_ranks: int | None, hostfile: Path | None) -> Roster:
    """What the flags of the same names ask for. Raises ConfigError if the file cannot be read."""
    if num_ranks in (None, 1) or hostfile is None:
        return Roster(num_ranks or 1, {_HERE: num_ranks or 1})
    assert num_ranks is not None
    return Roster(num_ranks, read_slots(hostfile))


def without_limits_of(arguments: Sequence[str], away: Sequence[str]) -> list[str]:
    """`arguments` without memory limits of hosts that are away: ranks refuse names they miss."""
    names = {name for host in away for name in (host, host.rpartition("@")[2])}
    names |= {name.partition(".")[0] for name in names}
    flag = "--memory-gb="
    return [
        argument
        for argument in arguments
        if not (argument.startswith(flag) and argument[len(flag) :].rpartition("=")[0] in names)
    ]
