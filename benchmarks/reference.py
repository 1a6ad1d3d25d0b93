"""What a single process says, by mlx-lm's own forward pass, up to the rounding of its logits."""

# V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlx_dist.messages import Sampling
from mlx_dist.model.sampling import SlotSampler

# Matrix products round differently for another number of rows.
NEARLY_EQUAL = 1e-4
_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked; `sampling` has no grammar."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


class Reference:
    """The model of a folder in one piece, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._model: Any
        self._model, self.tokenizer = load(str(folder))[:2]
        self._cache = make_prompt_cache(self._model)
        self._cached: list[int] = []

    def could_say(self, question: Question, text: str, is_whole: bool = True) -> bool:
        """Whether `text` is an answer, or the beginning of one.

        It is if it has tokens each of which is sampled after those before it: by the logits as they
        are, or with its own raised by `NEARLY_EQUAL`.
        """
        text, tokens = text.rstrip(_HALF_A_CHARACTER), list[int]()
        return self._leads_to(text, question, tokens, is_whole)

    def _leads_to(self, text: str, question: Question, tokens: list[int], is_whole: bool) -> bool:
        said = self._text(tokens)
        if not is_whole and said.startswith(text):
            return True
        if not text.startswith(said):
            return False
        is_ended = bool(tokens) and tokens[-1] in self.tokenizer.eos_token_ids
        if is_ended or len(tokens) == question.max_tokens:
            return said == text
        ways = ([*tokens, token] for token in self._sampled(question, tokens, text))
        return any(self._leads_to(text, question, way, is_whole) for way in ways)

    def _sampled(self, question: Question, tokens: list[int], text: str) -> Iterator[int]:
        """The token that is sampled next, and then those of `text` that rounding could make it."""
        prefix = [*question.prompt, *tokens]
        logits_V = self._logits(prefix)
        sampler = SlotSampler(question.sampling, logits_V.size)
        sampler.observe(prefix)

        def sampled(logits_V: mx.array) -> int:
            return int(np.array(sampler.sample(logits_V, len(prefix))))

        likeliest = sampled(logits_V)
        yield likeliest
        for token in range(logits_V.size):
            said = self._text([*tokens, token])
            is_possible = token != likeliest and (text.startswith(said) or said.startswith(text))
            if is_possible and sampled(logits_V.at[token].add(NEARLY_EQUAL)) == token:
                yield token

    def _logits(self, prefix: list[int]) -> mx.array:
        """Those after the last token; what is cached of the tokens before it is used again."""
        most = min(len(self._cached), len(prefix) - 1)
        num_same = next((i for i in range(most) if self._cached[i] != prefix[i]), most)
        trim_prompt_cache(self._cache, len(self._cached) - num_same)
        self._cached = prefix
        logits_V: mx.array = self._model(mx.array([prefix[num_same:]]), cache=self._cache)[0, -1]
        return logits_V

    def _text(self, tokens: Sequence[int]) -> str:
        ends = self.tokenizer.eos_token_ids
        text: str = self.tokenizer.decode([token for token in tokens if token not in ends])
        return text.rstrip(_HALF_A_CHARACTER)
