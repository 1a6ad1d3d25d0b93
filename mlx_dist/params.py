"""What a caller may ask of a generation, checked before any rank hears of it. Knows no MLX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlx_dist.errors import RequestError
from mlx_dist.messages import Sampling

# What a sampler takes; a temperature of 0, too.
LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.01, 100),
    "top_p": (1e-6, 1),
    "top_k": (0, 1 << 31),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "seed": (0, (1 << 64) - 1),
}
MOST_BIAS = 100


@dataclass(frozen=True, slots=True)
class Params:
    """How to answer one prompt. `max_tokens` None is what the model's context leaves.

    The text ends before the first of the `stop` strings.
    """

    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()

    def check(self, spell: Callable[[str], str] = str) -> None:
        """Raise RequestError for a value that no sampler takes; `spell` writes a field's name."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self.sampling, name)
            # Written so that NaN is refused too.
            if not least <= value <= most and (name, value) != ("temperature", 0):
                raise RequestError(f"{spell(name)} is {value}; use a value from {least} to {most}")
        for token, bias in self.sampling.logit_bias.items():
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise RequestError(
                    f"{spell('logit_bias')} {token}:{bias} is not between {-MOST_BIAS} and "
                    f"{MOST_BIAS}"
                )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"{spell('max_tokens')} is {self.max_tokens}; use 1 or more")
        if any(not text for text in self.stop):
            raise RequestError(
                f"{spell('stop')} is empty; leave it out to stop at the end of the answer"
            )
