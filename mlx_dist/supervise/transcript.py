"""What a client has been sent of a streamed answer, and what is new in the same answer, told again.

A stream that is told again may be cut into other events: so what counts is what each choice has
grown by (text, reasoning, calls, logprobs), not the events. Pure: bytes in, bytes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mlx_dist.serve.relayed import tokens_in

_DATA = b"data: "
_DONE = b"data: [DONE]"
_BETWEEN = b"\n\n"


class DivergedError(Exception):
    """What is told again is not what was told: two candidates for a token were as good as equal."""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct):
    index: int
    delta: _Delta | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode


class _Grown:
    """A text or a list that is only ever added to, and may be told again from its beginning."""

    def __init__(self) -> None:
        self._parts: list[Any] = []
        self._told: Any = None
        self._seen = 0

    def rewind(self) -> None:
        """What comes now is told again."""
        if self._parts:
            told = self._parts[0]
            if len(self._parts) > 1:
                is_text = isinstance(told, str)
                told = "".join(self._parts) if is_text else [one for p in self._parts for one in p]
            self._parts, self._told, self._seen = [told], told, 0

    def new_in(self, part: Any) -> Any:
        """What of `part` has not been told yet. Raises DivergedError if the rest is another."""
        if self._told is None:
            self._parts.append(part)
            return part
        told = self._told[self._seen : self._seen + len(part)]
        self._seen += len(part)
        if self._seen >= len(self._told):
            self._told = None
        if told != part[: len(told)]:
            raise DivergedError
        new = part[len(told) :]
        if new:
            self._parts.append(new)
        return new


class _Choices:
    """What one choice has grown by, by kind; and its tokens, as the ranks told them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._tokens_seen = 0
        self._grown: dict[str, _Grown] = {}
        self._wholes: set[str] = set()

    def rewind(self) -> None:
        self._tokens_seen = 0
        for grown in self._grown.values():
            grown.rewind()

    def add_tokens(self, tokens: Sequence[int]) -> None:
        new = tokens[max(0, len(self.tokens) - self._tokens_seen) :]
        self._tokens_seen += len(tokens)
        self.tokens += new

    def num_new_in(self, kind: str, part: Any) -> int:
        """How much of the end of `part` is new. Raises DivergedError."""
        if kind not in self._grown:
            self._grown[kind] = _Grown()
        return len(self._grown[kind].new_in(part))

    def is_new(self, kind: str) -> bool:
        """Whether a thing that comes once comes for the first time."""
        is_new = kind not in self._wholes
        self._wholes.add(kind)
        return is_new


class Transcript:
    """The stream of one answer. `feed` it what comes; it gives back what the client is to get.

    `error` is the error event that the stream ended with, and is held back; `is_done` that it
    ended well. `tokens` are those of each choice, to go on from; none where they are not told.
    """

    def __init__(self) -> None:
        self.error: bytes | None = None
        self.is_done = False
        self._is_told_again = False
        self._has_usage = False
        self._choices: dict[int, _Choices] = {}
        self._rest = b""

    @property
    def tokens(self) -> list[list[int]]:
        # The last one is computed again, so that what ends the answer does so again.
        count = max(self._choices, default=-1) + 1
        tokens = [self._choices[i].tokens[:-1] if i in self._choices else [] for i in range(count)]
        return tokens if any(tokens) else []

    def rewind(self) -> None:
        """The answer is told again from its beginning."""
        self._rest, self.error, self._is_told_again = b"", None, True
        for choice in self._choices.values():
            choice.rewind()

    def feed(self, data: bytes) -> bytes:
        """What of `data`, as bytes of events, is new. Raises DivergedError."""
        *events, self._rest = (self._rest + data).split(_BETWEEN)
        return b"".join(self._new_of(event) for event in events)

    def _new_of(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            comment, _, event = event.partition(b"\n")
            if (told := tokens_in(comment)) is None:
                return comment + _BETWEEN
            self._choice(told[0]).add_tokens(told[1])
            if not event:
                return b""
        if event.startswith(_DONE):
            self.is_done = True
            return event + _BETWEEN
        if not event.startswith(_DATA):
            return event + _BETWEEN
        told_event = _decode(event[len(_DATA) :])
        if told_event.error is not None:
            self.error = event + _BETWEEN
            return b""
        return self._new_in(told_event, event)

    def _new_in(self, told: _Event, event: bytes) -> bytes:
        is_whole = True
        for choice in told.choices:
            is_whole &= self._is_all_new(choice)
        if told.usage is not None and not told.choices:
            is_whole, self._has_usage = not self._has_usage, True
            return event + _BETWEEN if is_whole else b""
        if is_whole:
            return event + _BETWEEN
        return self._cut(told, event)

    def _is_all_new(self, choice: _Choice) -> bool:
        """Note what `choice` has grown by, and cut off what was told before; was there nothing?"""
        known, is_all = self._choice(choice.index), True
        delta = choice.delta
        if delta is not None:
            is_all &= _cut_field(known, delta, "content")
            is_all &= _cut_field(known, delta, "reasoning_content")
            is_all &= _cut_field(known, delta, "tool_calls")
            if delta.role is not None and not known.is_new("role"):
                delta.role, is_all = None, False
        is_all &= _cut_field(known, choice, "text")
        if choice.logprobs is not None:
            is_all &= _cut_logprobs(known, choice.logprobs)
        if choice.finish_reason is not None and not known.is_new("finish_reason"):
            choice.finish_reason, is_all = None, False
        return is_all

    def _cut(self, told: _Event, event: bytes) -> bytes:
        """`event` with nothing in it that the client has; nothing if that is all of it."""
        kept = [_as_json(choice) for choice in told.choices if _says_anything(choice)]
        if not kept:
            return b""
        whole = msgspec.json.decode(event[len(_DATA) :])
        return _DATA + msgspec.json.encode(whole | {"choices": kept}) + _BETWEEN

    def _choice(self, index: int) -> _Choices:
        if index not in self._choices:
            self._choices[index] = _Choices()
        return self._choices[index]


def _cut_field(known: _Choices, holder: _Delta | _Choice, name: str) -> bool:
    """Leave of a field what is new; whether that is all of it."""
    part = getattr(holder, name)
    if not part:
        return True
    num_new = known.num_new_in(name, part)
    if num_new == len(part):
        return True
    setattr(holder, name, part[len(part) - num_new :] or None)
    return False


def _cut_logprobs(known: _Choices, logprobs: dict[str, Any]) -> bool:
    """As `_cut_field`. Their numbers are never quite the same again: tokens are compared."""
    is_chat = "content" in logprobs
    tokens = [one["token"] for one in logprobs["content"]] if is_chat else logprobs["tokens"]
    num_old = len(tokens) - known.num_new_in("logprobs", tokens)
    for name, values in logprobs.items():
        logprobs[name] = values[num_old:]
    return num_old == 0


def _says_anything(choice: _Choice) -> bool:
    delta = choice.delta
    in_delta = delta is not None and (delta.content or delta.reasoning_content or delta.tool_calls)
    has_logprobs = choice.logprobs is not None and any(choice.logprobs.values())
    return bool(in_delta or choice.text or has_logprobs or choice.finish_reason)


def _as_json(choice: _Choice) -> dict[str, Any]:
    told: dict[str, Any] = {"index": choice.index}
    if choice.delta is not None:
        delta = msgspec.to_builtins(choice.delta)
        told["delta"] = {name: value for name, value in delta.items() if value is not None}
    if choice.text is not None or choice.delta is None:
        told["text"] = choice.text or ""
    logprobs = choice.logprobs if choice.logprobs and any(choice.logprobs.values()) else None
    return told | {"logprobs": logprobs, "finish_reason": choice.finish_reason}
