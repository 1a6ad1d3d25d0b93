"""`mlx-dist serve`: a model on all ranks behind the HTTP shim of the first."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
from types import FrameType

from mlx_dist import display
from mlx_dist.cluster import launch
from mlx_dist.cluster.supervised import Line, Word, line_to_supervisor
from mlx_dist.config import RunConfig
from mlx_dist.serve.http import HttpServer
from mlx_dist.serve.llm import LLM
from mlx_dist.serve.settings import HttpConfig


def run_server(config: RunConfig, http: HttpConfig, blas: str) -> None:
    """The program of every rank, until it is drained.

    SIGUSR1, which mpirun hands on to every rank, drains: what is under way is finished, and new
    requests are refused. A server of one rank drains at SIGINT and SIGTERM, too.
    Under a supervisor the first rank tells it how it is, and ends with it.
    Raises AgreedError on all ranks if any cannot take part.
    """
    line = line_to_supervisor()
    with line.telling_failures():
        _run(config, http, blas, line)


def _run(config: RunConfig, http: HttpConfig, blas: str, line: Line) -> None:
    # Ends a process by default; only the first rank has something to do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with display.progress_bar("loading", launch.is_first_rank(), in_bytes=True) as progress:
        llm = LLM(config, blas=blas, progress=progress, met=lambda: line.say(Word.met))
    with llm:
        secret = secrets.token_hex(16) if line.is_supervised else None
        server = HttpServer(llm, http, secret)
        server.start()
        llm.before_end(server.end_now)
        host, port = server.address
        _drain_on_signal(llm, launch.launched_size() == 1 and not line.is_supervised)
        if secret is not None:
            line.say(Word.ready, port, secret, llm.name)
        else:
            said = f"mlx-dist: {llm.name} is served at http://{host}:{port}"
            print(said, file=sys.stderr, flush=True)
        llm.run()
        print("mlx-dist: drained", file=sys.stderr, flush=True)
        server.stop()
        line.say(Word.drained)


def _drain_on_signal(llm: LLM, is_alone: bool) -> None:
    def drain(number: int, _frame: FrameType | None) -> None:
        # In another thread: this one may be in the middle of a turn and hold its lock.
        threading.Thread(target=llm.drain).start()
        signal.signal(number, signal.SIG_DFL)

    # Under mpirun, SIGINT and SIGTERM leave no time to drain.
    for number in (signal.SIGUSR1, *((signal.SIGINT, signal.SIGTERM) if is_alone else ())):
        signal.signal(number, drain)
