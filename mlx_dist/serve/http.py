"""The HTTP shim: OpenAI's API over an LLM, in a thread of the leader. No other rank has a port.

A request passes `guard.py` (may it come in), `body.py` and `protocol.py` (what it says), `jobs.py`
(what that asks of the engine), `choices.py` (the generations) and `streaming.py` (the answer);
`routes.py` ties them together. This module knows threads and that there is a socket, and no routes.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from mlx_dist.cluster.ending import LAST_WORDS_S
from mlx_dist.serve.choices import Desk
from mlx_dist.serve.failures import ending, not_ready
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.relayed import MOST_HEADER_BYTES, RelayDoor
from mlx_dist.serve.routes import make_app
from mlx_dist.serve.settings import LOOPBACK, HttpConfig
from mlx_dist.serve.sockets import allow_files, listen, uvicorn_config
from mlx_dist.serve.streaming import Shim

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

_POLL_S = 0.005


class HttpServer:
    """Serves `llm` from `start` to `stop`. The thread ends with the process, stopped or not."""

    def __init__(self, llm: LLM, config: HttpConfig, relay_secret: str | None = None) -> None:
        """With a `relay_secret`, listens for a relay on this machine, at a free port."""
        self._config = config
        self._is_behind_relay = relay_secret is not None
        self._desk = Desk()
        shim = Shim(llm, config, Metrics(llm.stats), self._desk)
        app: ASGIApp = make_app(shim)
        if relay_secret is not None:
            app = RelayDoor(app, relay_secret)
        spare_bytes = MOST_HEADER_BYTES if self._is_behind_relay else 0
        self._server = uvicorn.Server(
            uvicorn_config(app, config, lifespan="on", spare_header_bytes=spare_bytes)
        )
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
        allow_files(self._config.max_connections)
        config = self._config
        # Whom it answers is the same behind a relay, which listens where it was asked to.
        at = (LOOPBACK, 0) if self._is_behind_relay else (config.host, config.port)
        self._socket = listen(*at)
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
            self._desk.close(not_ready("the server is stopping"))
            self._thread.join()

    def end_now(self) -> None:
        """Answer what is open with an error, from any thread of a process that is about to end."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        self._desk.close(ending())
        while self._server.server_state.tasks and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
