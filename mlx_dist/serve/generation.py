"""One answer in the making: tokens from the engine's thread become text in the caller's."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mlx_dist.engine.leader import Leader
from mlx_dist.engine.reader import Piece, Reader, ToolCall
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.messages import Logprobs


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A sampled token and, if asked for, what is known of its probability."""

    token: int
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt, of the answer, and of the prompt's part that was already cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What has come since the chunk before.

    The last one has a `finish_reason`: "stop", "length", "tool_calls" or "cancelled".
    """

    piece: Piece
    tokens: tuple[TokenInfo, ...]
    finish_reason: str | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[TokenInfo, ...]
    finish_reason: str
    usage: Usage


class Generation:
    """An answer under way. Belongs to the thread that takes from it.

    `num_prefilled` counts the prompt tokens that are in the pipe.
    """

    def __init__(
        self,
        reader: Reader,
        request: Request,
        leader: Leader,
        on_news: Callable[[], None],
        tokens_so_far: tuple[int, ...] = (),
    ) -> None:
        """Submit `request`, whose prompt ends with the tokens that the answer has already.

        They are taken as if they had just come. Raises what `Admission.check` raises.
        """
        self.is_finished = False
        self.num_prefilled = 0
        self._reader = reader
        self._num_prompt_tokens = len(request.prompt) - len(tokens_so_far)
        self._num_tokens = 0
        self._num_cached = 0
        self._has_tool_calls = False
        self._on_news = on_news
        self._events = deque(Event(0, 0, 0, token) for token in tokens_so_far)
        self._has_events = threading.Event()
        self._leader = leader
        [self._id] = leader.submit([request], [self._deliver])

    def take(self) -> Chunk | None:
        """What has come since the last call, if anything. Never blocks."""
        pieces: list[Piece] = []
        tokens: list[TokenInfo] = []
        reason: str | None = None
        self._has_events.clear()
        while self._events and not self.is_finished:
            event = self._events.popleft()
            # What the answer has already may be cached, too.
            self._num_cached = min(event.cached_tokens, self._num_prompt_tokens)
            if event.token is not None:
                tokens.append(TokenInfo(event.token, event.logprobs))
                pieces.append(self._reader.add(event.token))
            reason = event.finish_reason
            if self._reader.is_stopped and reason is None:
                self._leader.end(self._id, "stop")
                reason = "stop"
            if reason is not None:
                pieces.append(self._reader.finish())
                self.is_finished = True
        if not tokens and reason is None:
            return None
        self._num_tokens += len(tokens)
        piece = _joined(pieces)
        self._has_tool_calls |= bool(piece.tool_calls)
        if reason == "stop" and self._has_tool_calls:
            reason = "tool_calls"
        usage = Usage(self._num_prompt_tokens, self._num_tokens, self._num_cached)
        return Chunk(piece, tuple(tokens), reason, usage)

    def wait(self) -> None:
        """Wait, in another thread than the engine's, until there may be something to take."""
        self._has_events.wait()

    def cancel(self) -> None:
        """Ask for no more; takes effect at the next step. Nothing happens if it is over."""
        if not self.is_finished:
            self._leader.end(self._id, "cancelled")

    def _deliver(self, event: Event) -> None:
        self.num_prefilled = event.prefilled
        self._events.append(event)
        self._has_events.set()
        self._on_news()


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
    )


def completion_of(chunks: list[Chunk]) -> Completion:
    """The whole answer that `chunks` make up; the last one must have a finish reason."""
    piece, last = _joined([chunk.piece for chunk in chunks]), chunks[-1]
    assert last.finish_reason is not None
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Completion(
        piece.text, piece.reasoning, piece.tool_calls, tokens, last.finish_reason, last.usage
    )
