"""`mlx-dist doctor`: what is wrong with the hosts, the network or the model, and what to do.

Every check is a step that all ranks take together. Its answers are gathered, so all ranks know
what it found and go on in step, whatever it was; the leader tells.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import msgspec

from mlx_dist import display
from mlx_dist.cluster.world import join
from mlx_dist.config import RunConfig
from mlx_dist.display import Level
from mlx_dist.doctor import fit, hosts, wires
from mlx_dist.doctor.findings import Finding, Subject
from mlx_dist.messages import Outcome

_NAME_WIDTH = 15


def run_doctor(
    config: RunConfig, blas: str, address: str, port: int, is_quick: bool, as_json: bool
) -> bool:
    """The program of every rank; whether nothing failed, on every rank."""
    with join(config.fabric, config.jaccl_devices, config.heartbeat_timeout_s) as world:
        subject = Subject(world, config, blas, address, port, is_quick)
        findings = []
        for finding in chain(wires.check(subject), hosts.check(subject), fit.check(subject)):
            findings.append(finding)
            if world.is_leader and not as_json:
                _show(finding)
        failed = [finding.name for finding in findings if finding.level is Level.fail]
        # The leader's verdict: some findings are its alone.
        verdict = world.control.all_gather(Outcome(", ".join(failed) or None))[world.leader_rank]
    if world.is_leader and as_json:
        display.print_json(
            {"is_fine": not failed, "checks": [_as_object(finding) for finding in findings]}
        )
    return bool(verdict == Outcome())


def _show(finding: Finding) -> None:
    margin = " " * (6 + _NAME_WIDTH)
    print(f"{finding.level:<6}{finding.name:<{_NAME_WIDTH}}{finding.found}")
    for line in finding.details:
        print(f"{margin}{line}")
    if finding.remedy:
        print(f"{margin}-> {finding.remedy}")
    # The next check may take a while.
    print(end="", flush=True)


def _as_object(finding: Finding) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(finding)
    return built
