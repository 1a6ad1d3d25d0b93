"""What a relay in front of the shim adds to a request, so that it can be asked again elsewhere.

The relay sends a request on as it came, with headers of its own: the answer's id and time, and a
seed for a request that has none. Asked again after a failure, it adds behind the body the tokens
that it has been told of, and the answer goes on from there. Believed is only who knows the secret
that the shim's process made up. Both ends of the format are here; no sockets and no engine.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = list[tuple[bytes, bytes]]
TokensByChoice = Sequence[Sequence[int]]

# No client's header may begin so.
PREFIX = b"x-mlx-dist-"
# What the relay's headers take, at most.
MOST_HEADER_BYTES = 1024
_SECRET, _FACTS, _NUM_BYTES = PREFIX + b"relay", PREFIX + b"facts", PREFIX + b"tokens"
_KEY = "mlx_dist.relayed"
# A comment in a stream, which only a relay is sent: a choice and the tokens it has grown by.
_COMMENT = b":t "


class _Facts(msgspec.Struct, frozen=True, array_like=True):
    answer_id: str
    created_s: int
    seed: int


@dataclass(frozen=True, slots=True)
class Relayed:
    """How a request is to be answered: under this id and time, with this seed if it has none.

    `tokens` are those that each choice has already, or nothing where all begin.
    """

    answer_id: str
    created_s: int
    seed: int
    tokens: TokensByChoice = ()

    def stamp(self, secret: bytes, body: bytes) -> tuple[Headers, bytes]:
        """The headers that say so, and what to send in place of `body`."""
        facts = msgspec.json.encode(_Facts(self.answer_id, self.created_s, self.seed))
        headers = [(_SECRET, secret), (_FACTS, facts)]
        if self.tokens:
            tokens = msgspec.json.encode(self.tokens)
            headers.append((_NUM_BYTES, str(len(tokens)).encode()))
            body += tokens
        return headers, body


def relayed_of(scope: Scope) -> Relayed | None:
    """What a relay said of this request; None if it came without one."""
    found: Relayed | None = scope.get(_KEY)
    return found


def tokens_comment(index: int, tokens: Sequence[int]) -> bytes:
    """The comment for a relay that choice `index` has grown by `tokens`."""
    return _COMMENT + b" ".join(b"%d" % number for number in (index, *tokens)) + b"\n"


def tokens_in(comment: bytes) -> tuple[int, list[int]] | None:
    """The choice and the tokens in a comment, if it is one of these."""
    if not comment.startswith(_COMMENT):
        return None
    index, *tokens = map(int, comment[len(_COMMENT) :].split())
    return index, tokens


class RelayDoor:
    """Stands before the guard of a shim behind a relay, and takes off what the relay put on.

    A request without the secret is one like any other, and loses these headers, too.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            said = {name: value for name, value in scope["headers"] if name.startswith(PREFIX)}
            kept = [header for header in scope["headers"] if not header[0].startswith(PREFIX)]
            scope = {**scope, "headers": kept}
            if _FACTS in said and hmac.compare_digest(said.get(_SECRET, b""), self._secret):
                facts = msgspec.json.decode(said[_FACTS], type=_Facts)
                tokens: TokensByChoice = ()
                if num_bytes := int(said.get(_NUM_BYTES, b"0")):
                    receive, tokens = await _split(receive, num_bytes)
                    scope["headers"] = [h for h in kept if h[0] != b"content-length"]
                scope[_KEY] = Relayed(facts.answer_id, facts.created_s, facts.seed, tokens)
        await self._app(scope, receive, send)


async def _split(receive: Receive, num_bytes: int) -> tuple[Receive, TokensByChoice]:
    """`receive` without the last `num_bytes` of the body, and the tokens in these."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        # Of a relay that is gone in the middle, nothing more comes.
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            break
    whole = b"".join(parts)
    body: Message | None = {"type": "http.request", "body": whole[:-num_bytes], "more_body": False}
    if message["type"] == "http.disconnect":
        return receive, ()

    async def rest() -> Message:
        nonlocal body
        if body is None:
            return await receive()
        message, body = body, None
        return message

    return rest, msgspec.json.decode(whole[-num_bytes:], type=list[list[int]])
