"""The proof that sequences which share a microbatch get the logits that each gets alone.

Owns what is done with the sequences and the comparison; knows nothing of what a family is.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.proof import ProofError, run
from benchmarks.tiny_models import VOCAB_SIZE
from mlx_dist.messages import Row, Step
from mlx_dist.model.stage import Stage

# Of the largest logit: other shapes round differently, and layers pass that on.
TOLERANCE = 1e-4

Source = tuple[int, int]  # a kept entry, and how many of its tokens


@dataclass(slots=True)
class _Alone:
    """A sequence's tokens, and the plain caches of the model in one piece that has seen them."""

    caches: list[Any]
    tokens: list[int] = field(default_factory=list)


class Batches:
    """Stages that run one after another and, beside them, each of their sequences alone.

    What is done is done on every stage. A step raises ProofError unless each sequence's logits
    are within rounding of those that the model in one piece gives it alone.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], seed: int = 0) -> None:
        self.worst_error = 0.0
        self.slots_of: dict[int, list[int]] = {}
        self.entries: dict[int, list[int]] = {}
        self._model = model
        self._stages = stages
        self._alone: dict[int, _Alone] = {}
        self._random = random.Random(seed)

    @property
    def num_slots(self) -> int:
        return len(self._alone)

    def length(self, slot: int) -> int:
        """How many tokens the sequence in `slot` has seen."""
        return len(self._alone[slot].tokens)

    def open(
        self, microbatch: int, slots: Sequence[int], kept: Sequence[Source | None] | None = None
    ) -> None:
        """Begin sequences, each from what was kept or, by default, empty."""
        kept = kept or [None] * len(slots)
        for stage in self._stages:
            stage.slots.open(microbatch, slots, kept)
        self.slots_of[microbatch] = list(slots)
        for slot, source in zip(slots, kept, strict=True):
            self._alone[slot] = _Alone(make_prompt_cache(self._model))
            if source is not None:
                entry, num_tokens = source
                self._logits_alone(slot, self.entries[entry][:num_tokens])

    def step(self, microbatch: int, lengths: Sequence[int]) -> None:
        """Give each sequence so many random tokens more and compare their logits."""
        rows = [
            Row(slot, self.length(slot), [self._random.randrange(VOCAB_SIZE) for _ in range(n)])
            for slot, n in zip(self.slots_of[microbatch], lengths, strict=True)
        ]
        got_BLV = run(self._stages, Step(microbatch, rows))
        for row, got_LV in zip(rows, got_BLV, strict=True):
            want_LV = self._logits_alone(row.slot, row.tokens)
            error = _error(got_LV[: len(row.tokens)], want_LV)
            self.worst_error = max(self.worst_error, error)
            # Not a number is no small error.
            if not error <= TOLERANCE:
                raise ProofError(
                    f"logits differ by {error:.1g} from those of a sequence alone "
                    f"(a step of {list(lengths)} tokens after {[r.position for r in rows]})"
                )

    def decode(self, microbatch: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(microbatch, [1] * len(self.slots_of[microbatch]))

    def merge(self, source: int, target: int) -> None:
        for stage in self._stages:
            stage.slots.merge(source, target)
        self.slots_of.setdefault(target, []).extend(self.slots_of.pop(source))

    def close(self, slots: Sequence[int]) -> None:
        for stage in self._stages:
            stage.slots.close(slots)
        for slot in slots:
            del self._alone[slot]
        rest = {m: [s for s in old if s not in slots] for m, old in self.slots_of.items()}
        self.slots_of = {m: left for m, left in rest.items() if left}

    def keep(self, slot: int, entry: int) -> None:
        for stage in self._stages:
            stage.slots.keep(slot, entry)
        self.entries[entry] = list(self._alone[slot].tokens)

    def drop(self, entries: Sequence[int]) -> None:
        for stage in self._stages:
            stage.slots.drop(entries)
        for entry in entries:
            del self.entries[entry]

    def check_empty(self) -> None:
        """Raise ProofError if something is held after all was closed and dropped."""
        for stage in self._stages:
            held = stage.slots.num_slots, stage.slots.kv_bytes
            if held != (0, 0):
                raise ProofError(f"{held[0]} slots and {held[1]} bytes are held by no sequence")

    def _logits_alone(self, slot: int, tokens: list[int]) -> mx.array:
        """The logits (L, V) of the model in one piece, as the sequence goes on with `tokens`."""
        alone = self._alone[slot]
        alone.tokens += tokens
        logits_BLV: mx.array = self._model(mx.array([tokens], mx.int32), cache=alone.caches)
        mx.eval(logits_BLV, [c.state for c in alone.caches if not c.empty()])
        return logits_BLV[0]


def _error(got_LV: mx.array, want_LV: mx.array) -> float:
    """The largest difference, as a part of the largest logit or of 1; infinities may be equal."""
    difference_LV = mx.where(got_LV == want_LV, 0, mx.abs(got_LV - want_LV))
    size_LV = mx.where(mx.isinf(want_LV), 0, mx.abs(want_LV))
    error = mx.max(difference_LV) / mx.maximum(mx.max(size_LV), 1.0)
    return float(error.item())  # type: ignore[arg-type]


def check_batches(model: nn.Module, stages: Sequence[Stage], *, pads: bool) -> float:
    """Prove what a scheduler does with sequences, and answer the largest error.

    With `pads`, those of several lengths are prefilled together. Raises ProofError if a logit of
    any sequence is not what it is alone. The tiny models' windows are of 8 tokens.
    """
    batches = Batches(model, stages)
    _together(batches, [5, 11, 3] if pads else [6, 6, 6])
    _from_entries(batches, stages[0].slots.trim_limit, [3, 9] if pads else [4, 4])
    _down_to_one(batches)
    batches.check_empty()
    return batches.worst_error


def _together(batches: Batches, lengths: list[int]) -> None:
    """Three together, a fourth joins; two are kept, and the one in the middle leaves."""
    batches.open(0, [0, 1, 2])
    batches.step(0, lengths)
    batches.decode(0, 2)
    batches.open(1, [3])
    batches.step(1, [6])
    batches.step(1, [4])
    batches.merge(1, 0)
    batches.decode(0, 2)
    batches.keep(1, 0)
    batches.keep(2, 1)
    batches.decode(0, 1)
    batches.close([1])
    batches.decode(0, 2)


def _from_entries(batches: Batches, trim_limit: float, lengths: list[int]) -> None:
    """Sequences begin from what was kept, whole and trimmed, and join the others."""
    whole = [(entry, len(tokens)) for entry, tokens in batches.entries.items()]
    (_, short) = whole[1]
    first_part = (1, 4) if short < trim_limit else (1, short)
    batches.open(2, [4, 1], [whole[0], first_part])
    batches.step(2, lengths)
    batches.decode(2, 2)
    # Those with the shortest prompts join before they have seen a token, or after one.
    batches.open(3, [5])
    batches.merge(3, 2)
    batches.open(3, [7])
    batches.step(3, [1])
    batches.merge(3, 2)
    batches.decode(2, 2)
    batches.merge(2, 0)
    batches.decode(0, 9)
    batches.open(3, [6], [first_part])
    batches.step(3, [5])
    batches.decode(3, 2)
    batches.keep(6, 2)
    batches.merge(3, 0)
    batches.decode(0, 1)


def _down_to_one(batches: Batches) -> None:
    """They leave until one is left, which goes on alone, is kept and ends."""
    batches.close([0, 3, 5, 7])
    batches.decode(0, 2)
    batches.close([6, 2])
    batches.decode(0, 1)
    batches.close([4])
    batches.decode(0, 2)
    batches.step(0, [4])
    batches.decode(0, 2)
    # One leaves before the others have seen a token.
    batches.open(1, [8, 9])
    batches.close([8])
    batches.step(1, [3])
    batches.merge(0, 1)
    batches.decode(1, 1)
    batches.close([1, 9])
    batches.drop([0, 1, 2])
