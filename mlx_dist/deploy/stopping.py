"""`mlx-dist cluster down`: ending a server, and whatever is left of it on any host."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from mlx_dist.cluster.state import ServerRecord, StateFolder
from mlx_dist.cluster.sweeping import sweep

Say = Callable[[str], None]

_LOOK_EVERY_S = 0.1
# What mpirun needs to end its ranks, and the system to end what is killed.
_TERMINATES_S = 5.0


def run_down(state: StateFolder, timeout_s: float, say: Say) -> bool:
    """Stop the server of `state`; whether nothing of it is left on any host.

    It may finish what is under way for `timeout_s`. Raises LaunchError if another command is at
    work there.
    """
    with state.lock():
        record = state.read()
        if record is None:
            say(f"not running: nothing was started in {state.path}")
            return True
        if record.is_running:
            _end(record, state, timeout_s, say)
        else:
            say("not running; looking for what is left of it")
        if clean_up(state, record, say):
            return False
        say("stopped; nothing is left on any host")
        return True


def clean_up(state: StateFolder, record: ServerRecord, say: Say) -> list[str]:
    """End what is left of a server that is over, and forget it; hosts where something may be left.

    These are remembered for the next time.
    """
    found = sweep(record.job, record.hosts)
    for host, number in found.killed.items():
        say(f"{host}: killed {number} process{'es' if number > 1 else ''} that had stayed")
    for host, fault in found.faults.items():
        say(f"error: {host}: {fault}; see there what is left, or do this again once it answers")
    if found.faults:
        state.write(msgspec.structs.replace(record, pid=None, hosts=list(found.faults)))
    else:
        state.forget()
    return list(found.faults)


def _end(record: ServerRecord, state: StateFolder, timeout_s: float, say: Say) -> None:
    """End the server's process: in order, or else by force."""
    pid = record.pid
    assert pid is not None
    # Before it serves, there is nothing to drain and nobody who would hear of it.
    if record.url or state.served_url():
        say(f"draining, for up to {timeout_s:g} s")
        _send(pid, signal.SIGUSR1)
        if _has_ended(record, timeout_s):
            return
        say(f"it has not ended within {timeout_s:g} s; ending what is under way")
    for number in (signal.SIGTERM, signal.SIGKILL):
        _send(pid, number)
        if _has_ended(record, _TERMINATES_S):
            return


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _has_ended(record: ServerRecord, timeout_s: float) -> bool:
    """Whether the server's process ends within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while record.is_running:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
    return True
