"""`mlx-dist serve`: a model on all ranks behind the HTTP shim of the first."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from mlx_dist import display
from mlx_dist.cluster import launch
from mlx_dist.config import RunConfig
from mlx_dist.serve.http import HttpServer
from mlx_dist.serve.llm import LLM
from mlx_dist.serve.settings import HttpConfig


def run_server(config: RunConfig, http: HttpConfig, blas: str) -> None:
    """The program of every rank, until it is drained.

    SIGUSR1, which mpirun hands on to every rank, drains: what is under way is finished, and new
    requests are refused. A server of one rank drains at SIGINT and SIGTERM, too.
    Raises AgreedError on all ranks if any cannot take part.
    """
    # Ends a process by default; only the first rank has something to do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with display.progress_bar("loading", launch.is_first_rank(), in_bytes=True) as progress:
        llm = LLM(config, blas=blas, progress=progress)
    with llm:
        server = HttpServer(llm, http)
        server.start()
        host, port = server.address
        print(
            f"mlx-dist: {llm.name} is served at http://{host}:{port}", file=sys.stderr, flush=True
        )
        _drain_on_signal(llm, launch.launched_size() == 1)
        llm.run()
        print("mlx-dist: drained", file=sys.stderr, flush=True)
        server.stop()


def _drain_on_signal(llm: LLM, is_alone: bool) -> None:
    def drain(number: int, _frame: FrameType | None) -> None:
        # In another thread: this one may be in the middle of a turn and hold its lock.
        threading.Thread(target=llm.drain).start()
        signal.signal(number, signal.SIG_DFL)

    # Under mpirun, SIGINT and SIGTERM leave a quarter of a second.
    for number in (signal.SIGUSR1, *((signal.SIGINT, signal.SIGTERM) if is_alone else ())):
        signal.signal(number, drain)
