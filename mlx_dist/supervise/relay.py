"""The listening side of a supervised server: passes requests to the ranks' shim, and answers back.

What it may be asked is decided here by the shim's own guard, so that nothing waits for ranks that
they would refuse; all else is theirs. A generation outlives its ranks (`exchange.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_dist.serve.failures import ApiError, not_ready
from mlx_dist.serve.guard import Guard
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.settings import GENERATION_PATHS, HttpConfig
from mlx_dist.supervise.exchange import (
    Exchange,
    Lost,
    Times,
    headers_back,
    headers_on,
    target_of,
    until_gone,
)
from mlx_dist.supervise.gate import Gate, Upstream

if TYPE_CHECKING:
    from mlx_dist.serve.stats import Stats

_STARTING = "the server is starting; its log says more"


def relay_app(gate: Gate, config: HttpConfig, resume_s: float) -> ASGIApp:
    """The relay as an ASGI application, with the guard and the CORS headers of the shim."""
    times = Times(resume_s, config.keep_alive_s)
    # What is refused here, the shim does not count.
    app: ASGIApp = Guard(_Relay(gate, times), config, Metrics(_no_stats))
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
        )
    return app


def _no_stats() -> Stats:
    raise AssertionError("the relay has no route for metrics")


class _Relay:
    def __init__(self, gate: Gate, times: Times) -> None:
        self._gate = gate
        self._times = times

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await error.response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, path = self._gate, scope["path"]
        if path == "/health" and scope["method"] == "GET":
            health = Response(msgspec.json.encode({"status": "ok"}), media_type="application/json")
            await health(scope, receive, send)
            return
        if gate.is_draining:
            raise not_ready("the server is draining")
        if not gate.has_served:
            raise not_ready(_STARTING)
        body = await _body(receive)
        gate.enter()
        try:
            if path in GENERATION_PATHS and scope["method"] == "POST":
                answering = Exchange(gate, self._times, scope, body, send).run()
            else:
                answering = self._pass_on(scope, body, send)
            await until_gone(asyncio.create_task(answering), asyncio.create_task(_gone(receive)))
        finally:
            gate.leave()

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        """Any other route: one question, one answer, and 503 while there are no ranks."""
        upstream = self._gate.upstream
        if upstream is None:
            raise not_ready("the ranks are being started again")
        try:
            await _plainly(upstream, scope, body, send)
        except Lost:
            raise not_ready("the ranks have just ended, and are started again") from None


async def _plainly(upstream: Upstream, scope: Scope, body: bytes, send: Send) -> None:
    answer = await upstream.pool.request(
        scope["method"],
        upstream.url(target_of(scope)),
        headers=headers_on(scope),
        content=body,
    )
    headers = headers_back(answer.headers)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.content})


async def _body(receive: Receive) -> bytes:
    """The whole body, which for a POST the guard has read and measured; else there is none."""
    message: Message = await receive()
    return message.get("body", b"") if not message.get("more_body", False) else b""


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
