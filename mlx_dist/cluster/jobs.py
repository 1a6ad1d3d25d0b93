"""The processes of one job on the host where this runs: finding, watching and ending them.

A job's processes have its id in their command line or environment. Sent to other hosts as text
(`cluster.remote`), so this imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# mpirun hands the first on to the ranks, and puts the second into its daemons' command lines.
VARIABLES = ("MLX_DIST_JOB", "PRTE_MCA_mlx_dist_job")
# For Python's -X, which takes any.
OPTION = "mlx_dist_job"
_LOOK_EVERY_S = 0.05
_KILLED_WITHIN_S = 3.0
WELL, STOPPED = "well", "stopped"
_SHOWN_CHARACTERS = 200


def processes(job: str) -> dict[int, str]:
    """The command lines of the processes of `job`, by process id. This one is none of them."""
    found = _on_linux(job) if sys.platform == "linux" else _by_ps(job, "-A")
    found.pop(os.getpid(), None)
    return found


def runs(pid: int, job: str) -> bool:
    """Whether the process `pid` is one of `job`, and not another that got its number since."""
    if sys.platform == "linux":
        return _command_on_linux(Path("/proc", str(pid)), job) is not None
    return pid in _by_ps(job, "-p", str(pid))


def end(job: str, grace_s: float) -> dict[str, list[str]]:
    """End what is left of `job` after `grace_s`: the command lines that were killed, and stayed."""
    deadline = time.monotonic() + grace_s
    while (left := processes(job)) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    killed = list(left.values())
    deadline = time.monotonic() + _KILLED_WITHIN_S
    while left and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):  # It has just ended, or is another user's.
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_EVERY_S)
        left = processes(job)
    return {"killed": killed, "left": list(left.values())}


def watch(job: str, tick_s: float, lease_s: float) -> None:
    """Until stdin ends, print each `tick_s` WELL, or STOPPED and what was stopped of `job`.

    When nothing has come from stdin for `lease_s`, this host is cut off, and nobody else can end
    what runs of `job` here.
    """
    heard_s = time.monotonic()
    while time.monotonic() - heard_s < lease_s:
        stopped = [command for pid, command in processes(job).items() if _state(pid) == "T"]
        print(f"{STOPPED} {stopped[0]}" if stopped else WELL, flush=True)
        time.sleep(tick_s)
        if select.select([0], [], [], 0)[0]:
            if not os.read(0, 1024):
                return
            heard_s = time.monotonic()
    end(job, 0)


def _state(pid: int) -> str:
    """What `ps` calls a process's state, or nothing for one that has just ended."""
    if sys.platform != "linux":
        command = ["ps", "-o", "state=", "-p", str(pid)]
        return _as_text(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)[:1]
    try:
        # Behind the command's name, which may be anything.
        return Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def _on_linux(job: str) -> dict[int, str]:
    folders = [folder for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    commands = {int(folder.name): _command_on_linux(folder, job) for folder in folders}
    return {pid: command for pid, command in commands.items() if command is not None}


def _command_on_linux(folder: Path, job: str) -> str | None:
    """The command line of a process of `job`, or None for any other."""
    try:
        command = (folder / "cmdline").read_bytes()
        # Of one that has ended and waits to be seen off, both are empty.
        is_found = job.encode() in command + (folder / "environ").read_bytes()
    except OSError:  # It has just ended, or is another user's.
        return None
    return _as_text(command.replace(b"\0", b" ")) if is_found else None


def _by_ps(job: str, *which: str) -> dict[int, str]:
    # -E adds the environment, where the system lets one see it.
    command = ["ps", *which, "-E", "-ww", "-o", "pid=,command="]
    listed = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
    lines = [line.strip().partition(b" ") for line in listed.splitlines() if job.encode() in line]
    return {int(pid): _as_text(command) for pid, _, command in lines}


def _as_text(command: bytes) -> str:
    return command.decode(errors="replace").strip()[:_SHOWN_CHARACTERS]
