"""Stands before every route: who may ask, how much may come in, and whether there is room.

Plain ASGI, knows no model.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_dist.errors import MlxDistError
from mlx_dist.serve.failures import ApiError, as_api_error
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.settings import HttpConfig, is_ip, is_loopback, is_wildcard

# A name, an IPv4 address, or an IPv6 address in brackets; then, perhaps, a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::[0-9]{1,5})?", re.ASCII)
_OPEN_PATH = "/health"


class _ClientGoneError(Exception):
    """The client went before its request was complete."""


class Guard:
    """Refuses requests that must not reach a route; reads the body of those that may.

    Web pages of other sites can send requests to a loopback address from a browser on this
    machine. The Host check stops those that had a name of their own point here (DNS rebinding),
    the Origin and Content-Type checks those that did not.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._hosts = {name.lower() for name in (config.host, *config.allowed_hosts)}
        self._key = None if config.api_key is None else config.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        headers = Headers(scope=scope)
        is_unread = _has_body(headers)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_response(message["status"])
                if is_unread:  # What has not come yet would be read to its end, and thrown away.
                    closing = [*message["headers"], (b"connection", b"close")]
                    message = {**message, "headers": closing}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "POST":
                receive = _replay(await self._read(receive), receive)
                is_unread = False
        except ApiError as error:
            await error.response(scope, receive, counted)
        except _ClientGoneError:
            pass
        else:
            await self._app(scope, receive, counted)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError if the request is not to be answered, whatever its body says."""
        num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > self._config.max_header_bytes:
            most = self._config.max_header_bytes
            raise ApiError(431, f"the headers have {num_bytes} bytes; the server takes {most}")
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy in front may go by the other of the two, and take the body for a request.
            raise ApiError(400, "the request has both a Content-Length and a Transfer-Encoding")
        self._check_host(headers.get("host", ""))
        self._check_origin(scope, headers)
        if self._key is not None and scope["path"] != _OPEN_PATH:
            self._check_key(headers.get("authorization", ""))
        if scope["method"] == "POST":
            self._check_content(headers)

    def _check_host(self, host: str) -> None:
        match = _HOST.fullmatch(host)
        name = (match[1] or match[2]).lower() if match else ""
        is_known = is_loopback(name) or name in self._hosts or "*" in self._hosts
        # No name can be made to point at an address that the client has written itself.
        if not (is_known or (is_wildcard(self._config.host) and is_ip(name))):
            raise ApiError(
                403,
                f"the Host header {host[:100]!r} is not served; start with --allowed-host",
                code="host_not_allowed",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin = headers.get("origin")
        allowed = self._config.cors_origins
        if origin is None or origin in allowed or "*" in allowed:
            return
        if origin.lower() != f"{scope['scheme']}://{headers['host']}".lower():
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not call; start with --cors-origin",
                code="origin_not_allowed",
            )

    def _check_key(self, authorization: str) -> None:
        scheme, _, key = authorization.partition(" ")
        assert self._key is not None
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if scheme.lower() == "bearer" and is_right:
            return
        fault = "is wrong" if authorization else "is missing"
        raise ApiError(
            401,
            f"the API key {fault}; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_content(self, headers: Headers) -> None:
        if not _has_body(headers):
            return  # Whatever the route makes of nothing.
        kind, _, options = headers.get("content-type", "").partition(";")
        if kind.strip().lower() != "application/json":
            raise ApiError(415, "the body must have content-type application/json")
        charset = options.partition("charset=")[2].strip(' "').lower()
        if charset not in ("", "utf-8", "utf8"):
            raise ApiError(415, f"the body must be UTF-8, not {charset[:20]}")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._config.max_body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        num_bytes = 0
        timeout_s = self._config.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGoneError
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > self._config.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            reason = f"the body took longer than {timeout_s:g} s to arrive"
            raise ApiError(408, reason) from None

    def _too_large(self) -> ApiError:
        most = self._config.max_body_bytes
        return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


class Turnstile:
    """Refuses POSTs to `paths` while `check` raises MlxDistError, whatever their bodies say.

    Under a load that is too much, those who are served must not wait for what becomes of the rest:
    here a refusal costs a fraction of what reading the request would.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str], check: Callable[[], None]) -> None:
        self._app = app
        self._paths = paths
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            try:
                self._check()
            except MlxDistError as error:
                await as_api_error(error).response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` after `body` has been read from it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
