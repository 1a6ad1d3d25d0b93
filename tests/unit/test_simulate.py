"""The scheduler keeps every stage busy, and no stream waits for another's long prompt."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.simulate import (
    Arrival,
    Simulation,
    closed_loop,
    even_times,
    long_prompt,
    percentile,
    poisson,
    steady_decode,
    step_cost,
)
from mlx_dist.engine.batching import Batching, StepTimes, choose

HOP_S = 0.001
stages = pytest.mark.parametrize("num_stages", [2, 4, 8])


def _uneven(num_stages: int) -> StepTimes:
    """Stages of which each is slower than the one before, the last half as fast as the first."""
    factors = [1 + i / max(1, num_stages - 1) for i in range(num_stages)]
    even = even_times(1, HOP_S).decode
    curve = {size: tuple(seconds * f for f in factors) for size, (seconds,) in even.items()}
    return StepTimes(curve, curve, HOP_S * num_stages)


@stages
@pytest.mark.parametrize("times_of", [lambda n: even_times(n, HOP_S), _uneven])
@pytest.mark.parametrize("is_full", [False, True])
def test_steady_decoding_reaches_the_bound(num_stages, times_of, is_full):
    num_microbatches = num_stages if is_full else num_stages - 1
    steady = steady_decode(times_of(num_stages), num_stages, num_microbatches, 4, HOP_S)
    assert steady.rate == pytest.approx(steady.bound, rel=0.05)


@stages
@pytest.mark.parametrize("times_of", [lambda n: even_times(n, HOP_S), _uneven])
def test_a_long_prompt_does_not_stall_the_streams(num_stages, times_of):
    times = times_of(num_stages)
    batching = choose(times, num_stages, most_sequences=16)
    intrusion = long_prompt(times, num_stages, batching, HOP_S)
    assert intrusion.p99_during_s <= 2.5 * intrusion.median_before_s
    # Nor do they stall it: it takes the half of the time that is its own.
    assert intrusion.ttft_s < 4 * times.prompt_s(2048, batching.prefill_chunk)


def test_a_long_sequence_is_not_what_the_short_ones_are_padded_to():
    """Five thousand cached tokens take as long as a step."""
    times = replace(even_times(1, 0.0), score_s=(2e-6,))
    batching = choose(times, 1, most_sequences=16)
    arrivals = [Arrival(0.0, 2048, 1 << 20), *[Arrival(10.0, 32, 1 << 20)] * 8]
    apart_rate, together_rate = (
        Simulation(1, each, step_cost(times), 0.0, arrivals, end_s=14.0).rate(12.0, 14.0)
        for each in (batching, replace(batching, most_padding=math.inf))
    )
    assert apart_rate > 1.5 * together_rate


def test_a_single_stream_does_not_starve_a_long_prompt():
    times = even_times(1, HOP_S)
    intrusion = long_prompt(times, 1, choose(times, 1, 16), HOP_S, num_streams=1)
    assert intrusion.ttft_s < 8 * times.prompt_s(2048, 512)


@stages
def test_under_half_load_nobody_waits_long(num_stages):
    times = even_times(num_stages, HOP_S)
    batching = choose(times, num_stages, most_sequences=16)
    arrivals = poisson(3.0, 30.0, prompt_tokens=64, max_tokens=32)
    sim = Simulation(num_stages, batching, step_cost(times), HOP_S, arrivals, end_s=40.0)
    assert len(sim.streams) == len(arrivals)
    assert all(stream.is_over for stream in sim.streams)
    assert percentile(sim.ttfts_s(0.0, 30.0), 99) < 3.0


@stages
def test_a_crowd_fills_the_microbatches(num_stages):
    times = even_times(num_stages, HOP_S)
    batching = Batching(num_stages, 8, 256, times=times)
    arrivals = closed_loop(num_stages * 8, prompt_tokens=32, max_tokens=32)
    sim = Simulation(num_stages, batching, step_cost(times), HOP_S, arrivals, end_s=40.0)
    sizes = [len(step.rows) for at_s, step in sim.steps if step.sample and at_s > 20.0]
    assert sum(sizes) / len(sizes) > 6
    assert max(sim.busy_s) > 0.8 * 40.0


def test_a_lone_stage_serves_a_crowd():
    """Its answers are there before the next step is planned, so it is never seen busy."""
    decode = {1: (0.037,), 4: (0.044,), 16: (0.056,), 64: (0.132,)}
    times = StepTimes(decode, {8: (0.038,), 32: (0.070,), 128: (0.229,), 512: (1.04,)})
    arrivals = closed_loop(16, prompt_tokens=32, max_tokens=32)
    sim = Simulation(1, choose(times, 1, 16), step_cost(times), 0.0, arrivals, end_s=40.0)
    request_s = times.prefill_s(31) + 32 * times.decode_s(16) / 16
    assert sim.rate(20.0, 40.0) > 0.8 * 32 / request_s
    assert percentile(sim.ttfts_s(20.0, 39.0), 99) < 6 * times.prefill_s(31)


def test_short_prompts_pass_a_long_one():
    times = even_times(2, HOP_S)
    long, short = Arrival(0.0, 8192, 4), [Arrival(0.5 + i / 10, 16, 4) for i in range(10)]
    sim = Simulation(
        2, Batching(2, 8, 256, times=times), step_cost(times), HOP_S, [long, *short], 60
    )
    first, *rest = sim.streams
    assert all(stream.is_over for stream in sim.streams)
    assert max(stream.ttft_s for stream in rest) < first.ttft_s / 4


def test_what_the_simulation_counts():
    times = StepTimes({1: (0.1, 0.3)}, {1: (0.1, 0.3)}, hop_s=0.02)
    sim = Simulation(2, Batching(times=times), step_cost(times), 0.01, [Arrival(0.0, 1, 3)], 10.0)
    [stream] = sim.streams
    assert stream.is_over
    assert stream.tokens_s == pytest.approx([0.42, 0.84, 1.26])
    assert sim.busy_s == pytest.approx([0.3, 0.9])
    assert sim.gaps_s(0.0, 10.0) == pytest.approx([0.42, 0.42])
    assert sim.rate(0.0, 2.0) == 1.5
