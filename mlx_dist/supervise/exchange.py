"""One client's generation: asked of whichever ranks serve, until the client has all of its answer.

The same request with the same id, time and seed has the same answer, so it may be asked again: what
the client has been sent already is dropped (`transcript.py`). Knows HTTP; no processes.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace

import httpcore2
import msgspec
from starlette.types import Scope, Send

from mlx_dist.serve.failures import ApiError, not_ready
from mlx_dist.serve.relayed import PREFIX, Headers, Relayed
from mlx_dist.supervise.gate import Gate, Upstream
from mlx_dist.supervise.transcript import DivergedError, Transcript

_KEEP_ALIVE = b": keep-alive\n\n"
_EVENTS = b"text/event-stream"
# What the shim says when it ends, and when there is no more room.
_NOT_READY = ("not_ready", "ending")
# What breaks off an answer is noticed otherwise within this, if it is the end of the ranks.
_FALLS_WITHIN_S = 3.0
_BUSY_S = 0.5
# A request that was there each time the ranks failed may be what fails them.
_MOST_FAILURES = 3
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding")
) | {b"upgrade", b"expect"}
# Made here, by uvicorn or for CORS.
_OURS = frozenset({b"date", b"server", b"vary"})

Lost = (httpcore2.NetworkError, httpcore2.ProtocolError)


@dataclass(frozen=True, slots=True)
class Times:
    """How long an answer may break off, and how often a stream hears something meanwhile."""

    resume_s: float
    keep_alive_s: float


@dataclass(frozen=True, slots=True)
class _Held:
    """An answer that is kept back: the ranks may be ending, and others give a better one."""

    status: int
    headers: Headers
    body: bytes

    @property
    def is_not_ready(self) -> bool:
        return _code_in(self.body) in _NOT_READY


class Exchange:
    """The request of `scope` and `body`, from when it is taken to the end of its answer."""

    def __init__(self, gate: Gate, times: Times, scope: Scope, body: bytes, send: Send) -> None:
        self._gate = gate
        self._times = times
        self._scope = scope
        self._body = body
        self._send = send
        self._relayed = Relayed(secrets.token_hex(12), int(time.time()), secrets.randbits(63))
        self._transcript = Transcript()
        self._has_status = False
        self._sent_at_s = self._asked_again_until_s = 0.0
        self._num_failures = 0

    async def run(self) -> None:
        """Answer the client. Raises ApiError if it was sent nothing and there is no answer."""
        self._asked_again_until_s = time.monotonic() + self._times.resume_s
        try:
            while not await self._is_answered():
                pass
        except ApiError as error:
            if not self._has_status:
                raise
            await self._end(_event(error.body))

    async def _is_answered(self) -> bool:
        """Ask once more; whether the client has its answer now."""
        upstream = await self._upstream()
        held = None
        try:
            held = await self._ask(upstream)
            if held is None:
                return True
        except Lost:
            pass
        except DivergedError:
            raise _diverged() from None
        may_fall = held is None or held.is_not_ready
        if not (may_fall and await self._gate.falls(upstream, _FALLS_WITHIN_S)) and held:
            if self._num_failures == 0:
                await self._give(held)
                return True
            # Others were sooner with the ranks that have just come up.
            await self._wait(_BUSY_S)
            return False
        self._num_failures += 1
        if self._num_failures > _MOST_FAILURES:
            raise not_ready(f"the ranks failed {_MOST_FAILURES} times under this request")
        self._asked_again_until_s = time.monotonic() + self._times.resume_s
        return False

    async def _upstream(self) -> Upstream:
        """The shim to ask, once there is one."""
        while (upstream := self._gate.upstream) is None:
            if self._gate.is_over:
                raise not_ready("the server ended before the answer")
            await self._wait(self._times.keep_alive_s)
        return upstream

    async def _wait(self, patience_s: float) -> None:
        """Wait for news of the ranks. Raises ApiError if it has taken too long."""
        left_s = self._asked_again_until_s - time.monotonic()
        if left_s <= 0:
            raise not_ready(
                f"the answer broke off and could not go on within {self._times.resume_s:g} s"
            )
        await self._gate.change(min(patience_s, left_s))
        await self._keep_alive()

    async def _ask(self, upstream: Upstream) -> _Held | None:
        """Ask this shim; what is held back of its answer, or None if the client has all of it."""
        relayed = replace(self._relayed, tokens=self._transcript.tokens)
        self._transcript.rewind()
        stamp, body = relayed.stamp(upstream.secret, self._body)
        async with upstream.pool.stream(
            "POST",
            upstream.url(target_of(self._scope)),
            headers=headers_on(self._scope) + stamp,
            content=body,
        ) as answer:
            headers = headers_back(answer.headers)
            if dict(headers).get(b"content-type", b"").startswith(_EVENTS):
                return await self._stream(answer, headers)
            held = _Held(answer.status, headers, await answer.aread())
        if held.is_not_ready or (held.status == 429 and self._num_failures):
            return held
        await self._give(held)
        return None

    async def _stream(self, answer: httpcore2.Response, headers: Headers) -> _Held | None:
        transcript = self._transcript
        if not self._has_status:
            self._has_status = True
            self._sent_at_s = time.monotonic()
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in answer.aiter_stream():
            if new := transcript.feed(data):
                await self._pass(new)
            else:
                await self._keep_alive()
        if transcript.is_done:
            await self._end(b"")
            return None
        if transcript.error is None:
            raise httpcore2.RemoteProtocolError("the stream has no end")
        held = _Held(200, headers, transcript.error)
        if held.is_not_ready:
            return held
        await self._end(transcript.error)
        return None

    async def _give(self, held: _Held) -> None:
        """Send what was held back, or was the whole answer."""
        if not self._has_status:
            start = {"type": "http.response.start", "status": held.status, "headers": held.headers}
            await self._send(start)
            await self._end(held.body)
        else:
            await self._end(held.body if held.status == 200 else _event(held.body))

    async def _pass(self, events: bytes) -> None:
        self._sent_at_s = time.monotonic()
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def _keep_alive(self) -> None:
        """A comment, if the client has a stream and has heard nothing for long."""
        is_due = time.monotonic() - self._sent_at_s >= self._times.keep_alive_s
        if self._has_status and is_due:
            await self._pass(_KEEP_ALIVE)

    async def _end(self, rest: bytes) -> None:
        await self._send({"type": "http.response.body", "body": rest})


def target_of(scope: Scope) -> bytes:
    """The request's path and query as they came."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


def headers_on(scope: Scope) -> Headers:
    """The client's headers, to go on to the shim."""
    return [
        (name, value)
        for name, value in scope["headers"]
        if name not in _HOP_BY_HOP and name != b"content-length" and not name.startswith(PREFIX)
    ]


def headers_back(headers: Headers) -> Headers:
    """The shim's headers, to go back to the client."""
    lower = [(name.lower(), value) for name, value in headers]
    return [
        (name, value)
        for name, value in lower
        if name not in _HOP_BY_HOP | _OURS and not name.startswith(b"access-control-")
    ]


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _code_in(body: bytes) -> str | None:
    """The code of an error, alone or as an event."""
    try:
        code = msgspec.json.decode(body.removeprefix(b"data: "))["error"]["code"]
    except (msgspec.MsgspecError, LookupError, TypeError):
        return None
    return code if isinstance(code, str) else None


def _diverged() -> ApiError:
    message = (
        "the answer broke off and could not be told again: two candidates for a token were equally "
        "likely"
    )
    return ApiError(500, message, code="not_reproducible")


async def until_gone(answering: asyncio.Task[None], gone: asyncio.Task[None]) -> None:
    """Wait for the answer, or cancel it when the client has gone."""
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        for task in (answering, gone):
            task.cancel()
        await asyncio.gather(answering, gone, return_exceptions=True)
