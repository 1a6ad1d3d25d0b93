"""Measures what steps of each size take on the running placement, through the real pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from mlx_dist.cluster import memo
from mlx_dist.engine.batching import StepTimes
from mlx_dist.engine.leader import Leader
from mlx_dist.messages import Close, Open, Opening, Row, Sampling, Step

# Few: prompts cost more than the steps that are measured.
_PROMPT_TOKENS = 4
_NUM_DECODES = 4
_LARGEST_MICROBATCH = 64
_LEAST_CHUNK = 8
_LARGEST_CHUNK = 512
# What noise makes of a shorter step says more than what is cached.
_LEAST_SCORED_CHUNK = 128
_MICROBATCH = 0


def measure(leader: Leader, most_sequences: int, context_tokens: int, budget_s: float) -> StepTimes:
    """Step times for growing sizes until `budget_s` has passed or the KV memory is full.

    The leader must have nothing else to do.
    """
    decode: dict[int, tuple[float, ...]] = {}
    prefill: dict[int, tuple[float, ...]] = {}
    hop_s = 0.0
    begun = time.monotonic()
    fits = leader.scheduler.ledger.fits
    for size in _powers(1, min(most_sequences, _LARGEST_MICROBATCH)):
        if not fits([[_PROMPT_TOKENS + _NUM_DECODES] * size], None):
            break
        decode[size], waited_s = _decode_s(leader, size)
        hop_s = hop_s or waited_s
        if time.monotonic() - begun > budget_s / 2:
            break
    begun = time.monotonic()
    for size in _powers(_LEAST_CHUNK, min(_LARGEST_CHUNK, context_tokens - 1)):
        if not fits([[size]], None):
            break
        prefill[size] = min((_prefill_s(leader, size) for _ in range(2)), key=sum)
        if time.monotonic() - begun > budget_s / 2:
            break
    # A model of a tiny context has no chunk to measure.
    times = StepTimes(decode, prefill or {1: decode[1]}, hop_s)
    twice = [n for n in prefill if 2 * n < context_tokens and fits([[2 * n]], None)]
    if max(twice, default=0) < _LEAST_SCORED_CHUNK:
        return times
    return replace(times, score_s=_score_s(leader, max(twice)))


def remembered(
    facts: Mapping[str, object],
    leader: Leader,
    most_sequences: int,
    context_tokens: int,
    is_fresh: bool,
) -> tuple[StepTimes, bool]:
    """Step times for a placement, and whether they are from an earlier start.

    `facts` tell this placement from others. With `is_fresh` it is measured in any case.
    """
    if not is_fresh and (times := memo.recall("step times", facts, StepTimes)):
        return times, True
    times = measure(leader, most_sequences, context_tokens, budget_s=8.0)
    memo.keep("step times", facts, times)
    return times, False


def _decode_s(leader: Leader, size: int) -> tuple[tuple[float, ...], float]:
    """Seconds of each rank for a decoding step of `size` sequences, and of all hops together."""
    slots = range(size)
    leader.do(Open(_MICROBATCH, [Opening(slot, Sampling()) for slot in slots]))
    _step(leader, [Row(slot, 0, [0] * _PROMPT_TOKENS) for slot in slots], sample=False)
    measured = []
    for i in range(_NUM_DECODES):
        rows = [Row(slot, _PROMPT_TOKENS + i, [0]) for slot in slots]
        measured.append(_step(leader, rows, sample=True))
    leader.do(Close(list(slots)))
    return min(measured, key=lambda seconds: sum(seconds[0]))


def _prefill_s(leader: Leader, size: int) -> tuple[float, ...]:
    leader.do(Open(_MICROBATCH, [Opening(0, Sampling())]))
    seconds, _ = _step(leader, [Row(0, 0, [0] * size)], sample=False)
    leader.do(Close([0]))
    return seconds


def _score_s(leader: Leader, size: int) -> tuple[float, ...]:
    """Seconds that a prompt's token takes each rank longer for every token before its step."""
    leader.do(Open(_MICROBATCH, [Opening(0, Sampling())]))
    steps = [_step(leader, [Row(0, start, [0] * size)], sample=False)[0] for start in (0, size)]
    leader.do(Close([0]))
    return tuple(max(0.0, after - before) / size**2 for before, after in zip(*steps, strict=True))


def _step(leader: Leader, rows: list[Row], sample: bool) -> tuple[tuple[float, ...], float]:
    start = time.perf_counter()
    vitals = leader.ask(Step(_MICROBATCH, rows, sample)).vitals
    wall_s = time.perf_counter() - start
    seconds = tuple(v.step_s for v in vitals)
    return seconds, max(0.0, wall_s - sum(seconds))


def _powers(first: int, last: int) -> list[int]:
    return [size for size in (first << i for i in range(16)) if size <= last]
