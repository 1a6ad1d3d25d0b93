"""What answers look like: OpenAI's shapes, and how they are filled from what the engine yields.

One writer serves one choice. `part` is its share of a stream, `whole` its share of an answer in
one piece; both go into `choices`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from mlx_dist.engine.reader import ToolCall
from mlx_dist.engine.text import Tokenizer
from mlx_dist.messages import Logprobs
from mlx_dist.serve.generation import Chunk, Completion, TokenInfo, Usage

# JSON has no infinity; this is what OpenAI says instead.
_LEAST_LOGPROB = -9999.0


class UsageReply(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class FunctionReply(Struct):
    name: str
    arguments: str


class CallReply(Struct):
    """`index` is the call's place in a stream; an answer in one piece leaves it out."""

    id: str
    function: FunctionReply
    index: int | UnsetType = UNSET
    type: str = "function"


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]


class Words(Struct, omit_defaults=True):
    """A `message`, or the `delta` of one."""

    role: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallReply] | None = None


class Delta(Words, omit_defaults=True):
    content: str | None = None


class Message(Words, omit_defaults=True, kw_only=True):
    content: str | None


class ChatPart(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChoice(Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class ChatWriter:
    """Writes one choice of a chat."""

    id_prefix = "chatcmpl-"
    object = "chat.completion"
    part_object = "chat.completion.chunk"

    def __init__(self, index: int, tokenizer: Tokenizer, answer_id: str) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._answer_id = answer_id
        self._role: str | None = "assistant"
        self._num_calls = 0

    def part(self, chunk: Chunk) -> ChatPart | None:
        """None if `chunk` has nothing that a client would see."""
        piece = chunk.piece
        logprobs = self._logprobs(chunk.tokens)
        is_seen = piece.text or piece.reasoning or piece.tool_calls or logprobs
        if not (is_seen or chunk.finish_reason):
            return None
        role, self._role = self._role, None
        delta = Delta(
            role=role,
            content=piece.text or ("" if role else None),
            reasoning_content=piece.reasoning or None,
            tool_calls=self._calls(piece.tool_calls, is_part=True),
        )
        return ChatPart(self._index, delta, logprobs, chunk.finish_reason)

    def whole(self, answer: Completion) -> ChatChoice:
        message = Message(
            role="assistant",
            content=answer.text or (None if answer.tool_calls else ""),
            reasoning_content=answer.reasoning or None,
            tool_calls=self._calls(answer.tool_calls, is_part=False),
        )
        logprobs = self._logprobs(answer.tokens)
        return ChatChoice(self._index, message, logprobs, answer.finish_reason)

    def _calls(self, calls: tuple[ToolCall, ...], is_part: bool) -> list[CallReply] | None:
        first = self._num_calls
        self._num_calls += len(calls)
        return [
            CallReply(
                id=self._call_id(first + number),
                function=FunctionReply(call.name, call.arguments),
                index=first + number if is_part else UNSET,
            )
            for number, call in enumerate(calls)
        ] or None

    def _call_id(self, number: int) -> str:
        # The same whenever the same answer is written.
        told = f"{self._answer_id} {self._index} {number}"
        return "call_" + hashlib.sha256(told.encode()).hexdigest()[:24]

    def _logprobs(self, tokens: tuple[TokenInfo, ...]) -> ChatLogprobs | None:
        content = [
            TokenLogprob(
                *self._facts(info.token, info.logprobs.logprob),
                top_logprobs=[TopLogprob(*self._facts(*top)) for top in info.logprobs.top],
            )
            for info in tokens
            if info.logprobs is not None
        ]
        return ChatLogprobs(content) if content else None

    def _facts(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        text = self._tokenizer.token_text(token)
        return text, max(logprob, _LEAST_LOGPROB), list(self._tokenizer.token_bytes(token))


class TextWriter:
    """Writes one choice of a completion."""

    id_prefix = "cmpl-"
    object = "text_completion"
    part_object = "text_completion"

    def __init__(self, index: int, tokenizer: Tokenizer, _answer_id: str) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._offset = 0

    def part(self, chunk: Chunk) -> TextChoice | None:
        """None if `chunk` has nothing that a client would see."""
        text, reason = chunk.piece.text, chunk.finish_reason
        logprobs = self._logprobs(chunk.tokens)
        if not (text or logprobs or reason):
            return None
        return TextChoice(self._index, text, logprobs, reason)

    def whole(self, answer: Completion) -> TextChoice:
        logprobs = self._logprobs(answer.tokens)
        return TextChoice(self._index, answer.text, logprobs, answer.finish_reason)

    def _logprobs(self, tokens: tuple[TokenInfo, ...]) -> TextLogprobs | None:
        told = TextLogprobs([], [], [], [])
        for info in tokens:
            if info.logprobs is None:
                continue
            text = self._tokenizer.token_text(info.token)
            told.tokens.append(text)
            told.token_logprobs.append(max(info.logprobs.logprob, _LEAST_LOGPROB))
            told.top_logprobs.append(self._top(info.token, info.logprobs))
            told.text_offset.append(self._offset)
            self._offset += len(text)
        return told if told.tokens else None

    def _top(self, token: int, logprobs: Logprobs) -> dict[str, float]:
        # Tokens of one text share a key: the likeliest goes last and stays.
        pairs = [(token, logprobs.logprob), *reversed(logprobs.top)]
        return {self._tokenizer.token_text(t): max(lp, _LEAST_LOGPROB) for t, lp in pairs}


Writer = ChatWriter | TextWriter


def usage_reply(usage: Usage) -> UsageReply:
    return UsageReply(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        {"cached_tokens": usage.cached_tokens},
    )


def reply_head(
    writer: type[Writer], is_part: bool, answer_id: str, created_s: int, model: str
) -> dict[str, Any]:
    """The fields that all answers begin with."""
    return {
        "id": writer.id_prefix + answer_id,
        "object": writer.part_object if is_part else writer.object,
        "created": created_s,
        "model": model,
    }
