"""Requests, and how far each has come. Pure: knows tokens, no plans and no arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlx_dist.messages import Logprobs, Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that is known to be servable.

    Generation ends at `max_tokens` or at a token of `stop_tokens`, which is not part of it. At
    the `borders`, numbers of prompt tokens, another prompt may go on differently. With `record`
    every rank keeps what its layers put out, and nothing of it is reused.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()
    borders: tuple[int, ...] = ()
    record: bool = False

    @property
    def most_tokens(self) -> int:
        """The most tokens that its caches come to hold."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a request: prompt tokens went down the pipe, a token came, or it is over.

    `prefilled` counts the prompt tokens in the pipe, with the `cached_tokens` taken from a kept
    entry. The last event of a request has a `finish_reason`.
    """

    request_id: int
    prefilled: int
    cached_tokens: int
    token: int | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way.

    `position` counts the tokens planned into its caches, the first `num_cached` of which are a
    copy. It has a slot from when it is admitted until it is over.
    """

    id: int
    request: Request
    slot: int | None = None
    num_cached: int = 0
    position: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def num_to_prefill(self) -> int:
        # The last prompt token goes through with the first decoding step.
        return max(0, len(self.request.prompt) - 1 - self.position)

    @property
    def next_token(self) -> int:
        return self.generated[-1] if self.generated else self.request.prompt[-1]

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens that its caches hold once every plan so far is done."""
        return (*self.request.prompt, *self.generated)[: self.position]

    def event(
        self,
        token: int | None = None,
        logprobs: Logprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> Event:
        prefilled = min(self.position, len(self.request.prompt))
        return Event(self.id, prefilled, self.num_cached, token, logprobs, finish_reason)
