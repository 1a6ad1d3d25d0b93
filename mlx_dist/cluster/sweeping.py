"""Ending what is left of a job, on all of its hosts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dist.cluster import jobs
from mlx_dist.cluster.remote import call_on_all

# Ranks end a moment after mpirun; then they are killed.
GRACE_S = 3.0
SWEEPS_S = 15.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What was found of a job after its end: the number killed, and faults, by host.

    `unreached` are the hosts among those with faults that do not answer at all.
    """

    killed: dict[str, int]
    faults: dict[str, str]
    unreached: tuple[str, ...] = ()


def sweep(
    job: str, hosts: Sequence[str], grace_s: float = GRACE_S, deadline_s: float = SWEEPS_S
) -> Sweep:
    """End every process of `job` on each of `hosts`, after a moment's grace."""
    arguments = {host: {"job": job, "grace_s": grace_s} for host in hosts}
    killed, faults, unreached = {}, {}, []
    for host, answer in call_on_all(jobs, "end", arguments, deadline_s).items():
        said = answer.json()
        if not answer.is_reached:
            unreached.append(host)
        if answer.code != 0 or not isinstance(said, dict):
            faults[host] = answer.fault() or "its Python printed something else"
        elif said["left"]:
            faults[host] = f"{len(said['left'])} processes cannot be killed: {said['left'][0]}"
        if answer.code == 0 and isinstance(said, dict) and said["killed"]:
            killed[host] = len(said["killed"])
    return Sweep(killed, faults, tuple(unreached))
