"""uvicorn as it is used here: its settings, its HTTP with limits, and the socket it listens on.

Knows no routes and no engine: the shim and the relay before it both stand on this.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import resource
import socket
from typing import Literal

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_dist.errors import ConfigError
from mlx_dist.serve.failures import not_ready
from mlx_dist.serve.settings import HttpConfig

_BACKLOG = 2048
# Longer than clients keep unused connections, so that none is closed under a request's feet.
_IDLE_CONNECTION_S = 65
# For answers that are ended to say so, if their clients read.
_LAST_WORDS_S = 2
# For what the rest of the process has open.
_OTHER_FILES = 256


def uvicorn_config(
    app: ASGIApp, config: HttpConfig, *, lifespan: Literal["on", "off"], spare_header_bytes: int = 0
) -> uvicorn.Config:
    """uvicorn serving `app`. Headers may take `spare_header_bytes` more than a client's may."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=_protocol(config),
        ws="none",
        lifespan=lifespan,
        log_config=LOGGING_CONFIG if config.access_log else None,
        log_level="info" if config.access_log else "error",
        access_log=config.access_log,
        use_colors=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(config.stop_timeout_s) + _LAST_WORDS_S,
        h11_max_incomplete_event_size=config.max_header_bytes + spare_header_bytes,
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


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError if it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "another program listens there; end it or choose another --port"
        else:
            remedy = "choose another --host or --port"
        fault = f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}"
        raise ConfigError(f"{fault}; {remedy}") from None
    # asyncio leaves it off for sockets that do not name their protocol, and then each part of an
    # answer after the first waits up to 40 ms for the client to acknowledge the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def allow_files(num_connections: int) -> None:
    """Every connection is an open file, and macOS allows a process 256 of them unless asked."""
    num_files = num_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        num_files = min(num_files, hard)
    if soft != resource.RLIM_INFINITY and soft < num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
