"""The HTTP shim: OpenAI's API over an LLM, in a thread of the leader. No other rank has a port.

A request passes `guard.py` (may it come in), `body.py` and `protocol.py` (what it says), `jobs.py`
(what that asks of the engine), `choices.py` (the generations) and `streaming.py` (the answer);
`routes.py` ties them together. This module knows sockets and threads, and no routes.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import resource
import socket
import threading
import time
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_dist.errors import ConfigError
from mlx_dist.serve.choices import Desk
from mlx_dist.serve.failures import not_ready
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.routes import make_app
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.streaming import Shim

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

_BACKLOG = 2048
# Longer than clients keep unused connections, so that none is closed under a request's feet.
_IDLE_CONNECTION_S = 65
_POLL_S = 0.005
# For answers that are ended to say so, if their clients read.
_LAST_WORDS_S = 2
# For what the rest of the process has open.
_OTHER_FILES = 256


class HttpServer:
    """Serves `llm` from `start` to `stop`. The thread ends with the process, stopped or not."""

    def __init__(self, llm: LLM, config: HttpConfig) -> None:
        self._config = config
        self._desk = Desk()
        shim = Shim(llm, config, Metrics(llm.stats), self._desk)
        self._server = uvicorn.Server(_uvicorn_config(shim))
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that are listened on. Valid between `start` and `stop`."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Returns when connections are answered. Raises ConfigError if the port is not free."""
        _allow_files(self._config.max_connections + _OTHER_FILES)
        self._socket = _listen(self._config.host, self._config.port)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Take no more connections; end the answers that are not done in `stop_timeout_s`."""
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join(self._config.stop_timeout_s)
            self._desk.close()
            self._thread.join()


def _uvicorn_config(shim: Shim) -> uvicorn.Config:
    config = shim.config
    return uvicorn.Config(
        make_app(shim),
        loop="asyncio",
        http=_protocol(config),
        ws="none",
        lifespan="on",
        log_config=LOGGING_CONFIG if config.access_log else None,
        log_level="info" if config.access_log else "error",
        access_log=config.access_log,
        use_colors=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(config.stop_timeout_s) + _LAST_WORDS_S,
        h11_max_incomplete_event_size=config.max_header_bytes,
    )


def _protocol(config: HttpConfig) -> type[H11Protocol]:
    """uvicorn's HTTP, with limits of connections and of the time that headers take to arrive."""
    full = not_ready(f"there are more than {config.max_connections} connections")
    full.headers["connection"] = "close"

    class LimitedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > config.max_connections:
                self.app = full.response
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self.timer is None:
                self.timer = self.loop.call_later(
                    config.body_timeout_s, self.timeout_keep_alive_handler
                )

        def _unwatch(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return LimitedProtocol


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "another program listens there; end it or choose another --port"
        else:
            remedy = "choose another --host or --port"
        fault = f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}"
        raise ConfigError(f"{fault}; {remedy}") from None


def _allow_files(num_files: int) -> None:
    """Every connection is an open file, and macOS allows a process 256 of them unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        num_files = min(num_files, hard)
    if soft != resource.RLIM_INFINITY and soft < num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
