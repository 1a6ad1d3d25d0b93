"""Reads request bodies as JSON, strictly: UTF-8, no NaN, no halves of surrogate pairs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute

from mlx_dist.serve.failures import ApiError

# More than any request needs. Each takes time, in which the streams wait. Brackets are those in
# strings, too: telling them apart would take as long as what it saves.
_MOST_KEYS = 1024
_MOST_BRACKETS = 200_000


def json_route(max_depth: int) -> type[APIRoute]:
    """Routes that read their bodies with `decode`; FastAPI's own would let NaN pass."""

    class JsonRequest(Request):
        async def json(self) -> Any:
            return decode(await self.body(), max_depth)

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                return await handle(JsonRequest(request.scope, request.receive))

            return handle_json

    return JsonRoute


def decode(body: bytes, max_depth: int) -> Any:
    """The value of `body`.

    Raises ApiError if it is no JSON, nested deeper than `max_depth`, or of too many parts.
    """
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise _refused(f"has more than {_MOST_BRACKETS} opening brackets")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refused(f"is no JSON: {error}") from None
    except RecursionError:
        raise _refused(f"is nested deeper than {max_depth}") from None
    level = [value]
    for _ in range(max_depth + 1):
        objects = [child for child in level if isinstance(child, dict)]
        arrays = [child for child in level if isinstance(child, list)]
        if not objects and not arrays:
            return value
        if any(len(child) > _MOST_KEYS for child in objects):
            raise _refused(f"has an object of more than {_MOST_KEYS} keys")
        level = list(chain(*(child.values() for child in objects), *arrays))
    raise _refused(f"is nested deeper than {max_depth}")


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"the body {reason}", code="invalid_json")
