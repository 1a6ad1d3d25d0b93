"""Rank 0's scheduler: which plan next. Knows slots and tokens; knows no arrays and no network."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mlx_dist.messages import Close, Open, Plan, Row, Sampling, Step, Tokens


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that is known to be servable.

    Generation ends at `max_tokens` or at a token of `stop_tokens`, which is not part of it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()
    record: bool = False


class Scheduler:
    """Turns one request at a time into plans.

    The prompt but its last token is cut into chunks that are planned back to back, so that they
    fill the pipe; the last token's step samples the first new one.
    """

    _SLOT = 0
    _MICROBATCH = 0

    def __init__(self, prefill_chunk: int) -> None:
        self._prefill_chunk = prefill_chunk
        self._ready: deque[Plan] = deque()
        self._request: Request | None = None
        self._position = 0
        self._num_generated = 0
        self.finish_reason: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether a plan is left to run or a token to come."""
        return self._request is not None or bool(self._ready)

    def submit(self, request: Request) -> None:
        """Begin `request`; the one before must be over."""
        assert not self.is_active
        assert request.prompt and request.max_tokens > 0
        self._request = request
        self._position = self._num_generated = 0
        self.finish_reason = None
        self._ready.append(Open(self._SLOT, request.sampling))
        *before, last = request.prompt
        for i in range(0, len(before), self._prefill_chunk):
            self._plan_step(before[i : i + self._prefill_chunk], sample=False)
        self._plan_step([last], sample=True)

    def next_plan(self) -> Plan | None:
        """The next plan, or None while one must wait for a token."""
        return self._ready.popleft() if self._ready else None

    def accept(self, tokens: Tokens) -> list[int]:
        """Take what the last stage sampled; answer the tokens that belong to the text."""
        assert self._request is not None
        [token] = tokens.tokens
        if token in self._request.stop_tokens:
            self.finish("stop")
            return []
        self._num_generated += 1
        if self._num_generated == self._request.max_tokens:
            self.finish("length")
        else:
            self._plan_step([token], sample=True)
        return [token]

    def finish(self, reason: str) -> None:
        """End the request for `reason`: "stop" or "length". What was planned for it is dropped."""
        if self._request is None:
            return
        self._request = None
        self.finish_reason = reason
        self._ready.clear()
        self._ready.append(Close(self._SLOT))

    def _plan_step(self, tokens: list[int], sample: bool) -> None:
        assert self._request is not None
        row = Row(self._SLOT, self._position, tokens)
        self._ready.append(Step(self._MICROBATCH, [row], sample, self._request.record))
        self._position += len(tokens)
