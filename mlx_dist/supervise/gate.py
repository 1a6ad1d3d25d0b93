"""Where requests wait for ranks that serve: opened and shut by the supervisor, asked by the relay.

Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import httpcore2

from mlx_dist.serve.settings import LOOPBACK
from mlx_dist.supervise.connections import Connections

# Longer than what ends a connection from the other side: that one keeps 65 s.
_IDLE_CONNECTION_S = 30.0


@dataclass(frozen=True, slots=True, eq=False)
class Upstream:
    """A shim that serves: where, what it believes a relay by, and connections to it."""

    port: int
    secret: bytes
    pool: httpcore2.AsyncConnectionPool

    @classmethod
    def at(cls, port: int, secret: str) -> Upstream:
        pool = httpcore2.AsyncConnectionPool(
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=_IDLE_CONNECTION_S,
            network_backend=Connections(),
        )
        return cls(port, secret.encode(), pool)

    def url(self, target: bytes) -> httpcore2.URL:
        return httpcore2.URL(
            scheme=b"http", host=LOOPBACK.encode(), port=self.port, target=target or b"/"
        )


class Gate:
    """The shim to ask now, if there is one, and how many requests are not answered yet.

    `on_idle` is called when the last of them is.
    """

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self.upstream: Upstream | None = None
        self.has_served = False
        self.is_draining = False
        self.is_over = False
        self.num_requests = 0
        self._on_idle = on_idle
        self._changed = asyncio.Event()

    def open(self, upstream: Upstream) -> None:
        """The ranks serve there."""
        self.upstream, self.has_served = upstream, True
        self._change()

    def shut(self) -> None:
        """The ranks serve no more; what is under way with them breaks off."""
        self.upstream = None
        self._change()

    def drain(self) -> None:
        """No new requests."""
        self.is_draining = True

    def end(self) -> None:
        """No ranks any more."""
        self.is_over = self.is_draining = True
        self._change()

    def enter(self) -> None:
        self.num_requests += 1

    def leave(self) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._on_idle()

    async def change(self, patience_s: float) -> None:
        """Returns when something has changed, or after `patience_s`."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await changed.wait()

    async def falls(self, upstream: Upstream, within_s: float) -> bool:
        """Whether this shim is shut now, or soon."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while self.upstream is upstream and (left_s := deadline - loop.time()) > 0:
            await self.change(left_s)
        return self.upstream is not upstream

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
