"""`mlx-dist cluster up`: starting a server that outlives the command, and seeing it come up."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from mlx_dist import display
from mlx_dist.cluster import jobs
from mlx_dist.cluster.remote import python
from mlx_dist.cluster.state import ServerRecord, StateFolder, url_in
from mlx_dist.deploy.checks import require_hosts, require_leader_here
from mlx_dist.deploy.logs import errors_in, follow
from mlx_dist.deploy.stopping import Say, clean_up
from mlx_dist.errors import LaunchError

# A log is no terminal.
_NOT_FOR_IT = "MLX_DIST_TERMINAL_WIDTH"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be started: `mlx-dist serve --supervise ARGUMENTS`, with these variables, over
    `hosts`."""

    hosts: Sequence[str]
    arguments: Sequence[str]
    variables: Mapping[str, str]


def run_up(state: StateFolder, order: Order, timeout_s: float, say: Say) -> str:
    """Start a server and wait until it serves; where it does.

    Raises LaunchError if one runs already, a host cannot take part, or it is not up within
    `timeout_s`; then nothing of it is left.
    """
    with state.lock():
        record, process = _start(state, order, say)
    try:
        url = _wait_until_up(state, process, timeout_s)
    except KeyboardInterrupt:
        say(f"it goes on starting; `mlx-dist cluster down` stops it. Its log: {state.log}")
        raise
    with state.lock():
        if url is not None:
            state.write(msgspec.structs.replace(record, url=url))
            return url
        code = process.poll()
        if code is None:
            process.kill()
            process.wait()
        # `down` may have been here meanwhile.
        if state.read() == record:
            clean_up(state, record, say)
    if code is None:
        raise LaunchError(
            f"the server was not up within {timeout_s:g} s and was ended; give --timeout-s more, "
            f"or see {state.log}"
        )
    reason = "; ".join(errors_in(state.log)) or "its last words are above"
    raise LaunchError(
        f"the server ended with code {code} before it was up: {reason}; its log is {state.log}"
    )


def _start(
    state: StateFolder, order: Order, say: Say
) -> tuple[ServerRecord, subprocess.Popen[bytes]]:
    before = state.read()
    if before is not None and before.is_running:
        raise LaunchError(
            f"a server runs already, process {before.pid}"
            + (f", at {before.url}" if before.url else "")
            + "; stop it with `mlx-dist cluster down`, or give this one another --name"
        )
    require_leader_here(order.hosts)
    require_hosts(order.hosts)
    if before is not None:
        say("a server that was started before is over; looking for what is left of it")
        # A new record would forget the job that may be left there.
        if clean_up(state, before, say):
            raise LaunchError(
                "see the lines above; `mlx-dist cluster down` tries again, or give another --name"
            )
    state.rotate_log()
    job = secrets.token_hex(8)
    record = ServerRecord(job, None, time.time(), list(order.hosts), list(order.arguments))
    # Before anything runs: whatever happens now, `down` finds it.
    state.write(record)
    variables = {name: value for name, value in os.environ.items() if name != _NOT_FOR_IT}
    # On the command line, too, for where a process's variables cannot be seen.
    command = [python(), "-X", f"{jobs.OPTION}={job}", "-m", "mlx_dist", "serve", "--supervise"]
    with state.log.open("ab") as log:
        process = subprocess.Popen(
            [*command, *order.arguments],
            env=variables | dict(order.variables) | dict.fromkeys(jobs.VARIABLES, job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # A terminal that closes or a Ctrl-C must not reach it.
            start_new_session=True,
        )
    record = msgspec.structs.replace(record, pid=process.pid)
    state.write(record)
    return record, process


def _wait_until_up(
    state: StateFolder, process: subprocess.Popen[bytes], timeout_s: float
) -> str | None:
    """Show the log until it says where the server answers; None if it ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    screen = display.console()
    with screen.status(f"starting; its log is {state.log}"):
        lines = follow(
            state.log,
            None,
            lambda: process.poll() is not None or time.monotonic() > deadline,
        )
        for line in lines:
            screen.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
            if url := url_in(line):
                return url
    return None
