"""How many sequences run together, from measured step times. Pure: knows times, no arrays.

P stages are busy all the time if P microbatches are in flight. Whether more sequences in each
are worth it depends on what a step of that size takes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mlx_dist.errors import ConfigError

# A larger microbatch must bring this much more tokens a second.
_WORTHWHILE = 1.05
# As must several microbatches, which take the room in the pipe that prompts could have.
_WORTHWHILE_SPLIT = 1.15
# Prompts may lengthen a stream's gaps between tokens to this many times what they are.
_LONGEST_GAP = 2.2
_TYPICAL_PROMPT = 2048
# A step that takes so many times the shortest there is, is mostly arithmetic.
_OF_LEAST_STEP = 3.5
# Padding is read at every step, and all of a microbatch is copied whenever a sequence joins or
# leaves, which takes several times as long: so it may take this part of a step of its own.
_WORTHWHILE_PADDING = 0.25

Curve = Mapping[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Measured seconds of each stage's part of a step, on every rank.

    `decode` by sequences of one token each, `prefill` by tokens of one sequence with nothing
    cached; `score_s` is what each adds for every token that is cached, if that was measured.
    `hop_s` is what a step takes longer through the whole pipe than the stages compute.
    """

    decode: Curve
    prefill: Curve
    hop_s: float = 0.0
    score_s: tuple[float, ...] = ()

    @property
    def num_stages(self) -> int:
        return len(next(iter(self.decode.values())))

    def decode_s(self, num_sequences: int) -> float:
        """Seconds of the slowest stage."""
        return max(interpolate(self.decode, num_sequences))

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float:
        """Seconds of the slowest stage, for tokens of a sequence with `num_cached` before them."""
        return max(self.prefill_stages_s(num_tokens, num_cached))

    def tokens_per_s(self, num_microbatches: int, num_sequences: int) -> float:
        """What all streams get together: M b / max(M max t(b), sum of t(b), and the hops)."""
        stages_s = interpolate(self.decode, num_sequences)
        turn_s = max(num_microbatches * max(stages_s), sum(stages_s) + self.hop_s)
        return num_microbatches * num_sequences / turn_s

    def round_s(self, sizes: list[int]) -> float:
        """Seconds in which every sequence of microbatches of these sizes gets a token."""
        latency_s = sum(interpolate(self.decode, max(sizes))) + self.hop_s
        return max(sum(self.decode_s(size) for size in sizes), latency_s)

    def prompt_s(self, num_tokens: int, chunk: int) -> float:
        """Seconds of a prompt's way through the idle pipe in steps of up to `chunk` tokens."""
        sizes: list[int] = []
        while num_left := num_tokens - sum(sizes):
            is_last = num_left <= chunk
            before = sizes[-1] if sizes else 0
            sizes.append(
                self.last_prefill(num_left, before, num_tokens - num_left) if is_last else chunk
            )
        return self._through_s(sizes, 0, [0.0] * self.num_stages)

    def last_prefill(self, num_left: int, before: int, num_cached: int) -> int:
        """All tokens that a prompt has left, or half of them where the idle pipe is sooner done so.

        Behind a prompt's last step the first stages have nothing more to do. The others are at the
        step of `before` tokens that came before.
        """
        half = -(-num_left // 2)
        free_s = [0.0] * self.num_stages
        if before:
            _, *others_s = self.prefill_stages_s(before, num_cached - before)
            free_s = [0.0, *accumulate(others_s)]
        whole_s = self._through_s([num_left], num_cached, free_s)
        halves_s = self._through_s([half, num_left - half], num_cached, free_s)
        return half if halves_s < whole_s else num_left

    def _through_s(self, sizes: list[int], num_cached: int, free_s: list[float]) -> float:
        """Seconds until steps of these tokens are through stages that are free after `free_s`."""
        free_s = list(free_s)
        for size in sizes:
            at_s = 0.0
            for i, stage_s in enumerate(self.prefill_stages_s(size, num_cached)):
                at_s = free_s[i] = max(free_s[i], at_s) + stage_s
            num_cached += size
        return free_s[-1]

    def prefill_beside(self, sizes: list[int], slowdown: float, num_cached: int) -> int:
        """The most prompt tokens of one step beside microbatches of these sizes.

        A round takes that step longer, and whoever is right behind it waits for it at each stage.
        """
        round_s = self.round_s(sizes)
        step_s = round_s * min(_LONGEST_GAP - 1, _LONGEST_GAP / self.num_stages)
        return self.prefill_within(step_s / slowdown, num_cached)

    @property
    def least_worthwhile_prefill(self) -> int:
        """Prompt tokens below which a step is mostly what any step takes, however small."""
        return self.prefill_within(_OF_LEAST_STEP * self.prefill_s(min(self.prefill)))

    def prefill_within(self, seconds: float, num_cached: int = 0) -> int:
        """The most prompt tokens whose step keeps every stage busy for no longer.

        Not less than the least that was measured: fewer take hardly less.
        """
        low, high = min(self.prefill), max(self.prefill)
        while low < high:
            middle = (low + high + 1) // 2
            is_within = self.prefill_s(middle, num_cached) <= seconds
            low, high = (middle, high) if is_within else (low, middle - 1)
        return low

    def prefill_stages_s(self, num_tokens: int, num_cached: int) -> tuple[float, ...]:
        """Seconds of each stage, for tokens of a sequence with `num_cached` before them."""
        stages_s = interpolate(self.prefill, num_tokens)
        if not self.score_s:
            return stages_s
        num_scores = num_tokens * num_cached
        return tuple(a + num_scores * b for a, b in zip(stages_s, self.score_s, strict=True))


@dataclass(frozen=True, slots=True)
class Batching:
    """What the scheduler may put together.

    Up to `num_microbatches` of up to `max_sequences` decode at a time. A step has at most
    `prefill_chunk` prompt tokens while nothing decodes; while something does, it has what `times`
    allow, or `prefill_share` without them. Prompts of several lengths share one if it `pads`.
    Sequences of very different lengths do not share a microbatch, where that would have to be
    padded by more than `most_padding` tokens and there may be another.
    """

    num_microbatches: int = 1
    max_sequences: int = 1
    prefill_chunk: int = 512
    prefill_share: int = 64
    times: StepTimes | None = None
    pads: bool = True
    most_padding: float = math.inf

    def num_microbatches_for(self, num_sequences: int) -> int:
        """Among how many microbatches so many sequences are spread.

        One, if that gives them their tokens about as fast as all would.
        """
        most = min(num_sequences, self.num_microbatches)
        if self.times is None or num_sequences > self.max_sequences:
            return most
        apart_s = self.times.round_s([-(-num_sequences // most)] * most)
        is_fast = self.times.round_s([num_sequences]) <= _WORTHWHILE_SPLIT * apart_s
        return 1 if is_fast else most

    @property
    def least_prefill(self) -> int:
        """Prompt tokens of a step fewer of which would take hardly less."""
        return min(self.times.prefill) if self.times else 1

    def prefill_tokens(
        self,
        decoding: list[int],
        slowdown: float,
        is_crowded: bool = False,
        num_cached: int = 0,
    ) -> int:
        """The prompt tokens of the next step, beside microbatches of these sizes.

        They come after `num_cached` of their sequence. `slowdown` is how much longer the last ones
        took than their times say. Where it `is_crowded` by those who wait, no step is so small that
        it would only make them wait longer.
        """
        if not decoding:
            return self.prefill_chunk
        if self.times is None:
            return min(self.prefill_share, self.prefill_chunk)
        most = self.times.prefill_beside(decoding, slowdown, num_cached)
        if is_crowded:
            most = max(most, self.times.least_worthwhile_prefill)
        return min(most, self.prefill_chunk)


def choose(
    times: StepTimes, num_stages: int, most_sequences: int, cached_s: float = 0.0
) -> Batching:
    """The batching that serves most tokens a second, with no more sequences than it takes.

    `most_sequences` bounds a microbatch. A token takes at least `cached_s` to read from the cache.
    """
    sizes = [size for size in sorted(times.decode) if size <= most_sequences] or [1]
    size = sizes[0]
    for _smaller, larger in pairwise(sizes):
        gain = times.tokens_per_s(num_stages, larger) / times.tokens_per_s(num_stages, size)
        size = larger if gain > _WORTHWHILE else size
    best = max(range(1, num_stages + 1), key=lambda m: (times.tokens_per_s(m, size), -m))
    chunk = min(sorted(times.prefill), key=lambda n: times.prompt_s(_TYPICAL_PROMPT, n))
    cached_s = max(cached_s, *times.score_s) if times.score_s else cached_s
    padding = _WORTHWHILE_PADDING * times.decode_s(1) / cached_s if cached_s else math.inf
    return Batching(best, size, chunk, times=times, most_padding=padding)


def parse_batching(text: str) -> Batching | None:
    """The batching in "fixed:M,B,C": microbatches, sequences of each, prompt tokens of a step.

    None for "auto" and "measure", which are chosen by step times. Raises ConfigError for others.
    """
    if text in ("auto", "measure"):
        return None
    kind, _, numbers = text.partition(":")
    try:
        microbatches, sequences, chunk = (int(part) for part in numbers.split(","))
    except ValueError:
        microbatches = sequences = chunk = 0
    if kind != "fixed" or min(microbatches, sequences, chunk) < 1 or sequences > 1024:
        raise ConfigError(
            f"--batching {text!r} is none of auto, measure and "
            "fixed:MICROBATCHES,SEQUENCES,CHUNK, as in fixed:2,16,256"
        )
    return Batching(microbatches, sequences, chunk, prefill_share=min(64, chunk))


def interpolate(curve: Curve, size: int) -> tuple[float, ...]:
    """The seconds at `size`, on straight lines between what was measured and beyond."""
    sizes = sorted(curve)
    if len(sizes) == 1 or size in curve:
        return curve[size if size in curve else sizes[0]]
    right = min(max(1, bisect_left(sizes, size)), len(sizes) - 1)
    a, b = sizes[right - 1], sizes[right]
    part = (size - a) / (b - a)
    return tuple(
        max(low + part * (high - low), 0.0) for low, high in zip(curve[a], curve[b], strict=True)
    )
