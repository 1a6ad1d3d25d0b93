"""Starts and ends the servers that are compared, each with the same model, BLAS and threads.

Knows their command lines and processes; knows no load.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Endpoint, first_model, get

HOST = "127.0.0.1"
_START_TIMEOUT_S = 120
_END_TIMEOUT_S = 10

# mlx-lm's own server behind the same BLAS that mlx-dist opens. Its listen queue of 5 overflows when
# many clients connect at once: connections are then reset, or hang for a minute.
_MLX_LM = """
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
import socketserver
socketserver.TCPServer.request_queue_size = {listen_queue}
from mlx_lm.server import main
main()
"""
_STOCK_LISTEN_QUEUE, _LONG_LISTEN_QUEUE = 5, 1024


class ServerError(Exception):
    """A server that did not start, with the end of its log."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a server is started with."""

    model: Path
    port: int
    scratch: Path
    has_stock_listen_queue: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A server to compare: what starts it, and the path that answers 200 once it is up."""

    name: str
    title: str
    command: Callable[[Start], list[str]]
    ready_path: str
    model: str | None = None  # None: ask the server.


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is up."""

    endpoint: Endpoint
    pid: int

    def rank_pids(self) -> list[int]:
        """The process of each rank, by rank; of a server without ranks, its one process."""
        ranks: dict[int, int] = {}
        # A rank's own children carry its variables too, and come after it.
        for pid in [self.pid, *descendants(self.pid)]:
            if (rank := _rank_of(pid)) is not None:
                ranks.setdefault(rank, pid)
        return [ranks[rank] for rank in sorted(ranks)] or [self.pid]


def ours(num_ranks: int, *options: str) -> Callable[[Start], list[str]]:
    def command(start: Start) -> list[str]:
        arguments = ["serve", "-n", str(num_ranks), "--model", str(start.model)]
        arguments += ["--port", str(start.port), *options]
        return [sys.executable, "-m", "mlx_dist", *arguments]

    return command


def _mlx_lm(*options: str) -> Callable[[Start], list[str]]:
    def command(start: Start) -> list[str]:
        queue = _STOCK_LISTEN_QUEUE if start.has_stock_listen_queue else _LONG_LISTEN_QUEUE
        arguments = ["--model", str(start.model), "--port", str(start.port)]
        arguments += ["--log-level", "WARNING", *options]
        return [sys.executable, "-c", _MLX_LM.format(listen_queue=queue), *arguments]

    return command


def _launched(*options: str) -> Callable[[Start], list[str]]:
    def command(start: Start) -> list[str]:
        launch = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring", "-n", "2"]
        launch += ["--starting-port", str(free_port())]
        return [*launch, "--", *_mlx_lm(*options)(start)]

    return command


def _direct(*options: str) -> Callable[[Start], list[str]]:
    """What mlx.launch does, without it: it spins while it waits for output, at a core's cost."""

    def command(start: Start) -> list[str]:
        hostfile = start.scratch / f"ring-{start.port}.json"
        hostfile.write_text(json.dumps([[f"{HOST}:{free_port()}"] for _ in range(2)]))
        script = 'export MLX_HOSTFILE="$0"; MLX_RANK=1 "$@" & MLX_RANK=0 exec "$@"'
        return ["bash", "-c", script, str(hostfile), *_mlx_lm(*options)(start)]

    return command


def _peer(name: str, how: str, command: Callable[[Start], list[str]]) -> Kind:
    return Kind(name, f"mlx_lm.server, {how}", command, "/health", "default_model")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ours", "mlx-dist serve, 2 ranks", ours(2), "/ready"),
        Kind(
            "ours_tensor",
            "mlx-dist serve, 2 ranks, tensor",
            ours(2, "--parallel", "tensor"),
            "/ready",
        ),
        Kind("ours1", "mlx-dist serve, 1 rank", ours(1), "/ready"),
        _peer("mlx_lm", "one process", _mlx_lm()),
        # By default it decodes 32 at a time.
        _peer("mlx_lm64", "one process, decodes 64", _mlx_lm("--decode-concurrency", "64")),
        _peer("tensor", "2 ranks, tensor, mlx.launch ring", _launched()),
        _peer("pipeline", "2 ranks, pipeline, mlx.launch ring", _launched("--pipeline")),
        _peer("tensor_direct", "2 ranks, tensor, ring without mlx.launch", _direct()),
        _peer(
            "pipeline_direct", "2 ranks, pipeline, ring without mlx.launch", _direct("--pipeline")
        ),
    )
}


def write_model(folder: Path) -> None:
    """Write the benchmark's model, in a process of its own: this one stays without MLX."""
    command = [sys.executable, "-m", "benchmarks.serving_model", str(folder)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(
    kind: Kind, model: Path, scratch: Path, *, has_stock_listen_queue: bool = False
) -> Iterator[Running]:
    """Run a server of `kind` and end it with all it started. Its log goes to `scratch`.

    Python's http.server, behind which the peers stand, listens for 5 connections at once, or with
    `has_stock_listen_queue` false for as many as a load needs.

    Raises ServerError if it does not come up.
    """
    port = free_port()
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    log = scratch / f"{kind.name}-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            kind.command(Start(model, port, scratch, has_stock_listen_queue)),
            env=environment,
            # mlx.launch reads stdin, and spins if that is at its end.
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        asyncio.run(_await_ready(process, kind.ready_path, port, log))
        name = kind.model or asyncio.run(first_model(HOST, port))
        yield Running(Endpoint(HOST, port, name), process.pid)
        if process.poll() is not None:
            raise ServerError(f"it ended with code {process.poll()}:\n{_end_of(log)}")
    except OSError as error:
        raise ServerError(f"{error}; its log ends:\n{_end_of(log)}") from error
    finally:
        _end(process)


async def _await_ready(process: subprocess.Popen[bytes], path: str, port: int, log: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            status, _ = await get(HOST, port, path)
        except OSError:
            status = 0
        if status == 200:
            return
        await asyncio.sleep(0.2)
    raise ServerError(f"it did not come up (exit code {process.poll()}):\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End `process` and its descendants: asked to first, then made to."""
    family = {pid: _start_ticks(pid) for pid in [process.pid, *descendants(process.pid)]}
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    for pid, ticks in family.items():
        # The same start: not another process that has got the number since.
        if ticks is not None and _start_ticks(pid) == ticks:
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started, parents first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += children
        for child in children:
            found += descendants(child)
    return found


def rss_bytes(pid: int) -> int:
    """The resident memory of the process `pid`."""
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def cpu_s(pid: int) -> float:
    """The CPU time that the process `pid` has used, system time included."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _start_ticks(pid: int) -> int | None:
    try:
        return int(_stat(pid)[19])
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _rank_of(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    values = dict(variable.partition(b"=")[::2] for variable in variables)
    rank = values.get(b"OMPI_COMM_WORLD_RANK", values.get(b"MLX_RANK"))
    return None if rank is None else int(rank)
