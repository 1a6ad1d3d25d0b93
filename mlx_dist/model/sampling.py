"""From logits to token ids, on the last stage. Knows no ranks.

mlx-lm's samplers and logits processors do the work. What is added is where the randomness comes
from: each token's random number depends on its request's seed and its position alone.
"""

# V vocabulary

from __future__ import annotations

from collections import deque

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_dist.messages import Sampling

# The number of last tokens that penalties look at, mlx-lm's default.
_PENALTY_CONTEXT = 20
_MASK_64 = (1 << 64) - 1


class SlotSampler:
    """Samples the tokens of one sequence."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self._seed = sampling.seed
        self._is_greedy = sampling.temperature == 0
        self._sample = make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            # mlx-lm refuses a top_k that keeps everything.
            top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
        )
        repetition = sampling.repetition_penalty
        self._processors = make_logits_processors(
            logit_bias=sampling.logit_bias or None,
            repetition_penalty=repetition if repetition != 1 else None,
            repetition_context_size=_PENALTY_CONTEXT,
            presence_penalty=sampling.presence_penalty or None,
            presence_context_size=_PENALTY_CONTEXT,
            frequency_penalty=sampling.frequency_penalty or None,
            frequency_context_size=_PENALTY_CONTEXT,
        )
        self._last_tokens: deque[int] = deque(maxlen=_PENALTY_CONTEXT)

    def observe(self, tokens: list[int]) -> None:
        """Note tokens that the sequence has grown by."""
        self._last_tokens.extend(tokens[-_PENALTY_CONTEXT:])

    def sample(self, logits_V: mx.array, position: int) -> mx.array:
        """The token id, a scalar array, that follows the sequence's first `position` tokens."""
        logits_1V = logits_V[None]
        for process in self._processors:
            logits_1V = process(mx.array(list(self._last_tokens)), logits_1V)
        if not self._is_greedy:
            logits_1V = logits_1V - mx.logsumexp(logits_1V, axis=-1, keepdims=True)
            mx.random.seed(_mix(self._seed, position))
        token: mx.array = self._sample(logits_1V)[0]
        return token


def _mix(seed: int, position: int) -> int:
    """One 64-bit number of both: a step of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)
