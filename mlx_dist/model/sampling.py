"""From logits to token ids, on the last stage. Knows no ranks.

mlx-lm's filters and logits processors do most of the work. The choice itself is made by adding
Gumbel noise and taking the largest (Gumbel-max), with noise that depends on the request's seed, the
token's position and its id alone. So another rounding of the logits changes a token only if it
could exchange the two largest scores; inverting the cumulative distribution, as mlx.random does,
lets every logit move the borders of all tokens after it.
"""

# B sequences, V vocabulary

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
)

from mlx_dist.messages import PENALTY_CONTEXT, Logprobs, Opening, Row, Sampling

_MASK_64 = (1 << 64) - 1


class Matcher(Protocol):
    """Where a sequence stands in its grammar."""

    def mask(self, logits_1V: mx.array) -> mx.array:
        """The logits with those of tokens that the grammar forbids at minus infinity."""

    def consume(self, token: int) -> None:
        """Go on by `token`."""


class Samplers:
    """Samples the tokens of all sequences. `make_matcher` compiles a grammar."""

    def __init__(self, vocab_size: int, make_matcher: Callable[[str], Matcher]) -> None:
        self._vocab_size = vocab_size
        self._make_matcher = make_matcher
        self._of_slot: dict[int, SlotSampler] = {}

    def open(self, openings: list[Opening]) -> None:
        """Begin sequences."""
        for opening in openings:
            grammar = opening.sampling.grammar
            matcher = None if grammar is None else self._make_matcher(grammar)
            sampler = SlotSampler(opening.sampling, self._vocab_size, matcher)
            sampler.observe(opening.prefix)
            self._of_slot[opening.slot] = sampler

    def close(self, slots: list[int]) -> None:
        """End sequences."""
        for slot in slots:
            self._of_slot.pop(slot, None)

    def observe(self, rows: list[Row]) -> None:
        """Note tokens that sequences have grown by."""
        for row in rows:
            self._of_slot[row.slot].observe(row.tokens)

    def sample(
        self, rows: list[Row], logits_BV: mx.array
    ) -> tuple[list[int], list[Logprobs | None]]:
        """The token that follows each row and, if any row asks, what is said of probabilities."""
        samplers = [self._of_slot[row.slot] for row in rows]
        if all(sampler.is_plain for sampler in samplers):
            tokens_B = mx.argmax(logits_BV, axis=-1)
        else:
            tokens_B = mx.stack(
                [
                    sampler.sample(logits_BV[i], rows[i].position + len(rows[i].tokens))
                    for i, sampler in enumerate(samplers)
                ]
            )
        tokens: list[int] = np.array(tokens_B).tolist()
        for sampler, token in zip(samplers, tokens, strict=True):
            sampler.accept(token)
        if all(sampler.num_logprobs is None for sampler in samplers):
            return tokens, []
        return tokens, [
            None if s.num_logprobs is None else _logprobs(logits_BV[i], tokens[i], s.num_logprobs)
            for i, s in enumerate(samplers)
        ]


class SlotSampler:
    """Samples the tokens of one sequence.

    One that `is_plain` takes the likeliest token, whatever came before.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, matcher: Matcher | None = None) -> None:
        self.num_logprobs = sampling.num_logprobs
        self._seed = sampling.seed
        self._temperature = sampling.temperature
        self._matcher = matcher
        self._filters = list(_filters(sampling, vocab_size)) if sampling.temperature else []
        repetition = sampling.repetition_penalty
        self._processors = make_logits_processors(
            logit_bias=sampling.logit_bias or None,
            repetition_penalty=repetition if repetition != 1 else None,
            repetition_context_size=PENALTY_CONTEXT,
            presence_penalty=sampling.presence_penalty or None,
            presence_context_size=PENALTY_CONTEXT,
            frequency_penalty=sampling.frequency_penalty or None,
            frequency_context_size=PENALTY_CONTEXT,
        )
        self.is_plain = not self._temperature and not self._processors and matcher is None
        self._last_tokens: deque[int] = deque(maxlen=PENALTY_CONTEXT)

    def observe(self, tokens: list[int]) -> None:
        """Note tokens that the sequence has grown by."""
        self._last_tokens.extend(tokens[-PENALTY_CONTEXT:])

    def sample(self, logits_V: mx.array, position: int) -> mx.array:
        """The token id, a scalar array, that follows the sequence's first `position` tokens."""
        logits_1V = logits_V[None]
        for process in self._processors:
            logits_1V = process(mx.array(list(self._last_tokens)), logits_1V)
        if self._matcher is not None:
            logits_1V = self._matcher.mask(logits_1V)
        if self._filters:
            logits_1V = logits_1V - mx.logsumexp(logits_1V, axis=-1, keepdims=True)
            for keep in self._filters:
                logits_1V = keep(logits_1V)
        if self._temperature:
            key = mx.random.key(_mix(self._seed, position))
            logits_1V = logits_1V + self._temperature * mx.random.gumbel(logits_1V.shape, key=key)
        return mx.argmax(logits_1V[0])

    def accept(self, token: int) -> None:
        """Go on in the grammar, if there is one, by the token that was sampled."""
        if self._matcher is not None:
            self._matcher.consume(token)


def _filters(sampling: Sampling, vocab_size: int) -> Iterator[Callable[[mx.array], mx.array]]:
    """What narrows the choice, in mlx-lm's order; each takes and gives log-probabilities."""
    if sampling.top_p < 1:
        yield partial(apply_top_p, top_p=sampling.top_p)
    if sampling.min_p:
        yield partial(apply_min_p, min_p=sampling.min_p)
    # mlx-lm refuses a top_k that keeps everything.
    if 0 < sampling.top_k < vocab_size:
        yield partial(apply_top_k, top_k=sampling.top_k)


def _logprobs(logits_V: mx.array, token: int, num_top: int) -> Logprobs:
    logprobs_V = np.array((logits_V - mx.logsumexp(logits_V)).astype(mx.float32))
    # Stable, so that of equal ones the lower id comes first, as with argmax.
    top = np.argsort(-logprobs_V, kind="stable")[:num_top].tolist()
    return Logprobs(float(logprobs_V[token]), [(t, float(logprobs_V[t])) for t in top])


def _mix(seed: int, position: int) -> int:
    """One 64-bit number of both: a step of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)
