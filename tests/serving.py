"""A real server for tests: mlx-dist serve under a real mpirun, drained at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

_UP_S = 60
_DOWN_S = 20


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]

    def client(self, **options: Any) -> openai.OpenAI:
        """The real client, which does not try again what fails."""
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return openai.OpenAI(**(defaults | {"timeout": 60} | options))

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            body = response.read().decode()
        return json.loads(body) if body.startswith(("{", "[")) else body

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/cluster")["stats"]
        return found

    def settled(self, timeout_s: float = 15) -> dict[str, Any]:
        """The numbers once nothing is under way and every rank has said so."""
        deadline = time.monotonic() + timeout_s
        while True:
            stats = self.stats
            if not stats["num_waiting"] + stats["num_active"] + sum(stats["rank_slots"]):
                return stats
            assert time.monotonic() < deadline, f"never settled: {stats}"
            time.sleep(0.1)


@contextmanager
def serving(
    *arguments: str | Path,
    num_ranks: int = 1,
    command: list[str] | None = None,
    ends_with: int = 0,
    **env: str,
) -> Iterator[Server]:
    """Run `mlx-dist serve ARGUMENTS` on `num_ranks` ranks at a free port, or `command`.

    At the end it must drain and end with code 0, or end by itself with another.
    """
    if command is None:
        command = [sys.executable, "-m", "mlx_dist", "serve", "--port", "0", *map(str, arguments)]
        if num_ranks > 1:
            command += ["-n", str(num_ranks)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log: list[str] = []
    reading = threading.Thread(target=_read, args=(process, log), daemon=True)
    reading.start()
    try:
        yield Server(_wait_until_up(process, log), process, log)
        if ends_with == 0:
            process.send_signal(signal.SIGUSR1)
        code = process.wait(_DOWN_S)
        assert code == ends_with, f"ended with {code}:\n{''.join(log)}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reading.join()


def _read(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:  # One by one: the log is read meanwhile.
            log += [line]


def _wait_until_up(process: subprocess.Popen[str], log: list[str]) -> str:
    """The server's URL, once it has said it."""
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in list(log):
            if " is served at http://" in line:
                return line.rsplit(maxsplit=1)[1].strip("\0")
        time.sleep(0.05)
    raise AssertionError(f"not up after {_UP_S} s:\n{''.join(log)}")
