"""Makes text, reasoning and tool calls of a sequence's tokens. Knows no arrays and no ranks.

mlx-lm knows the models' markers and how each writes its calls. Added here: stop strings, which
end the visible text and neither the reasoning nor a call; and that nothing is lost, for a call
that cannot be understood is given back as the text it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

# The names of mlx-lm's states. Text in any other is a header, which is not shown.
_NORMAL, _REASONING, _TOOL = "normal", "reasoning", "tool"
# The bytes of a character, at most: so many tokens hold its beginning.
_MOST_TOKENS_A_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` are JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What a token has added to an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class _Calls:
    """How a model writes tool calls."""

    start: str
    end: str
    parse: Callable[[str], Any]

    def read(self, text: str) -> tuple[ToolCall, ...]:
        """The calls in `text`, the inside of the markers; none if it cannot be understood."""
        try:
            parsed = self.parse(text)
            calls = parsed if isinstance(parsed, list) else [parsed]
            return tuple(_tool_call(call) for call in calls)
        # mlx-lm's parsers meet whatever a model writes, and fail at it in many ways.
        except Exception:
            return ()


class Reader:
    """Reads one sequence. `is_stopped` says that a stop string was met, and the text ended."""

    def __init__(
        self,
        detokenizer: StreamingDetokenizer,
        stop: tuple[str, ...] = (),
        machine: TextStateMachine | None = None,
        state: str = _NORMAL,
        calls: _Calls | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._visible = _UpToStop(stop)
        self._machine = (machine or TextStateMachine()).make_state(state)
        self._calls = calls
        # The text of the call that is being written, if one is.
        self._call: str | None = None

    @classmethod
    def of_text(
        cls, tokenizer: TokenizerWrapper, stop: tuple[str, ...], prompt: tuple[int, ...]
    ) -> Reader:
        """All is text, and goes on where `prompt` ends."""
        detokenizer = tokenizer.detokenizer
        # At a beginning detokenizers drop a space, which here is one between two words.
        for token in prompt[-_MOST_TOKENS_A_CHARACTER:]:
            detokenizer.add_token(token)
        detokenizer.finalize()
        _ = detokenizer.last_segment
        return cls(detokenizer, stop)

    @classmethod
    def of_chat(
        cls,
        tokenizer: TokenizerWrapper,
        stop: tuple[str, ...],
        tools: Sequence[Mapping[str, Any]] | None,
        in_reasoning: bool,
    ) -> Reader:
        """Reasoning and, if there are `tools`, calls are told from the text."""
        calls = None
        if tools and tokenizer.has_tool_calling:
            calls = _Calls(
                tokenizer.tool_call_start,
                tokenizer.tool_call_end or "",
                lambda text: tokenizer.tool_parser(text, list(tools)),
            )
        machine = make_text_state_machine(tokenizer if calls else _without_calls(tokenizer))
        first = tokenizer.response_initial_state or (_REASONING if in_reasoning else _NORMAL)
        return cls(tokenizer.detokenizer, stop, machine, first, calls)

    @property
    def is_stopped(self) -> bool:
        return self._visible.is_stopped

    def add(self, token: int) -> Piece:
        """What is certain now that `token` has come."""
        self._detokenizer.add_token(token)
        return self._read(self._detokenizer.last_segment, is_last=False)

    def finish(self) -> Piece:
        """What was still held back."""
        self._detokenizer.finalize()
        return self._read(self._detokenizer.last_segment, is_last=True)

    def _read(self, text: str, is_last: bool) -> Piece:
        if self.is_stopped:
            return Piece()
        self._machine, segments = TextStateMachine.split(self._machine, text)
        if is_last:
            self._machine, held, state = TextStateMachine.flush(self._machine)
            segments.append((state, held))
        visible, reasoning = "", ""
        calls: tuple[ToolCall, ...] = ()
        for state, part in segments:
            if state == _TOOL:
                self._call = (self._call or "") + part
                continue
            ended, as_text = self._end_call(is_whole=True)
            calls += ended
            visible += self._visible.add(as_text)
            if state == _NORMAL:
                visible += self._visible.add(part)
            elif state == _REASONING:
                reasoning += part
            if self.is_stopped:
                return Piece(visible, reasoning, calls)
        if is_last:
            ended, as_text = self._end_call(is_whole=False)
            calls += ended
            visible += self._visible.add(as_text) + self._visible.finish()
        return Piece(visible, reasoning, calls)

    def _end_call(self, is_whole: bool) -> tuple[tuple[ToolCall, ...], str]:
        """The calls that were being written; or, if they are none, their text."""
        text, self._call = self._call, None
        if text is None or self._calls is None:
            return (), ""
        if calls := self._calls.read(text):
            return calls, ""
        return (), self._calls.start + text + (self._calls.end if is_whole else "")


class _UpToStop:
    """Lets text through up to the first of the `stop` strings.

    Text that may be the beginning of one is held back until it is known not to be. The string
    that is complete first ends the text, the longest of those if several are.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.is_stopped = True
            num_released = min(found)[1]
        else:
            num_released = len(self._held) - self._num_ambiguous()
        released, self._held = self._held[:num_released], self._held[num_released:]
        return released

    def finish(self) -> str:
        held, self._held = self._held, ""
        return "" if self.is_stopped else held

    def _num_ambiguous(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _without_calls(tokenizer: TokenizerWrapper) -> SimpleNamespace:
    """What makes a state machine of `tokenizer` that knows no tool calls."""
    return SimpleNamespace(
        has_thinking=tokenizer.has_thinking,
        think_start=tokenizer.think_start,
        think_end=tokenizer.think_end,
        has_tool_calling=False,
        structural_markers=tokenizer.structural_markers,
        response_transitions={
            state: [(marker, target) for marker, target in edges if target != _TOOL]
            for state, edges in tokenizer.response_transitions.items()
        },
    )


def _tool_call(call: dict[str, Any]) -> ToolCall:
    """Raises ValueError, or what else may come, for what is no call."""
    name, arguments = call["name"], call.get("arguments", {})
    if not isinstance(name, str):
        raise ValueError("the name of a call is no string")
    # Some models write them as a string that holds JSON.
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair can be written in JSON, and not be sent.
    (name + text).encode()
    return ToolCall(name, text)
