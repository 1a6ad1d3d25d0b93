"""What is chosen from step times is the best there is, and prompts leave streams their time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.engine.batching import Batching, StepTimes, choose, interpolate, parse_batching
from mlx_dist.errors import ConfigError

SIZES = [1, 2, 4, 8, 16, 32]
seconds = st.floats(1e-3, 1.0)


@st.composite
def step_times(draw):
    """Every stage takes a time for the step and one for each token."""
    num_stages = draw(st.integers(1, 5))
    stages = [(draw(seconds), draw(seconds) / 10) for _ in range(num_stages)]
    decode = {size: tuple(a + b * size for a, b in stages) for size in SIZES}
    prefill = {16 * size: tuple(a + b * 16 * size for a, b in stages) for size in SIZES}
    score_s = draw(st.sampled_from([(), tuple(b / 500 for _, b in stages)]))
    return StepTimes(decode, prefill, draw(st.floats(0.0, 0.1)), score_s)


@given(step_times(), st.integers(1, 100))
def test_between_and_beyond_what_was_measured_times_lie_on_lines(times, size):
    a, b = times.decode[1], times.decode[2]
    expected = [low + (size - 1) * (high - low) for low, high in zip(a, b, strict=True)]
    assert interpolate(times.decode, size) == pytest.approx(expected)
    assert times.decode_s(size) == pytest.approx(max(expected))


def test_one_measured_size_stands_for_all():
    assert interpolate({4: (0.5,)}, 1) == interpolate({4: (0.5,)}, 64) == (0.5,)


@given(step_times(), st.integers(1, 8), st.integers(1, 32))
def test_the_rate_is_that_of_the_slowest_stage_or_of_the_whole_way(times, m, b):
    stages_s = interpolate(times.decode, b)
    rate = times.tokens_per_s(m, b)
    bounds = m * b / (m * max(stages_s)), m * b / (sum(stages_s) + times.hop_s)
    assert rate == pytest.approx(min(bounds))


@given(step_times(), st.sampled_from([1, 3, 8, 32, 64]))
def test_no_other_number_of_microbatches_does_better(times, most):
    num_stages = len(times.decode[1])
    chosen = choose(times, num_stages, most)
    assert chosen.max_sequences <= max(most, 1)
    assert chosen.times is times
    rate = times.tokens_per_s(chosen.num_microbatches, chosen.max_sequences)
    others = [times.tokens_per_s(m, chosen.max_sequences) for m in range(1, num_stages + 1)]
    assert rate == max(others)
    assert rate >= 0.9 * times.tokens_per_s(num_stages, 1)
    chunks = [times.prompt_s(2048, chunk) for chunk in times.prefill]
    assert times.prompt_s(2048, chosen.prefill_chunk) == min(chunks)


def test_larger_microbatches_only_where_they_pay():
    flat = StepTimes(dict.fromkeys(SIZES, (0.1, 0.1)), {64: (0.1, 0.1)})
    assert choose(flat, 2, 16).max_sequences == 16
    linear = StepTimes({n: (0.1 * n, 0.1 * n) for n in SIZES}, {64: (0.1, 0.1)})
    assert choose(linear, 2, 16).max_sequences == 1
    # A stage that is nine times as slow as the other leaves nothing to gain from a second.
    uneven = StepTimes(dict.fromkeys(SIZES, (0.9, 0.0)), {64: (0.1, 0.1)})
    assert choose(uneven, 2, 16).num_microbatches == 1


def _stages(a, b, *factors):
    """Stages that take a seconds for a step and b for each of its tokens, times their factors."""
    curve = {n: tuple(factor * (a + b * n) for factor in factors) for n in (1, 8, 64, 512)}
    return StepTimes(curve, curve)


def _steps(times, num_tokens, chunk):
    steps = []
    while num_left := num_tokens - sum(steps):
        before = steps[-1] if steps else 0
        last = times.last_prefill(num_left, before, sum(steps))
        steps.append(chunk if num_left > chunk else last)
    return steps


def test_the_last_step_of_a_prompt_is_halved_where_it_is_through_sooner():
    # A step's own time is that of 32 tokens.
    times = _stages(0.032, 0.001, 1.0, 0.8)
    assert _steps(times, 1023, 256) == [256, 256, 256, 128, 64, 63]
    assert times.prompt_s(1023, 256) < 3 * 0.288 + 0.287 + 0.8 * 0.287
    # The second of two alike is always a step behind: only a first step can be less for it.
    times = _stages(0.032, 0.001, 1.0, 1.0)
    assert _steps(times, 1023, 256) == [256, 256, 256, 255]
    assert _steps(times, 255, 256) == [128, 127]
    assert _steps(_stages(0.032, 0.001, 1.0), 255, 256) == [255]


@given(step_times(), st.integers(1, 600), st.integers(0, 600), st.integers(0, 600))
def test_a_prompt_comes_to_its_end(times, num_left, before, num_cached):
    size = times.last_prefill(num_left, min(before, num_cached), num_cached)
    assert size in (num_left, -(-num_left // 2))


def test_few_sequences_stay_together_where_a_step_of_more_takes_hardly_longer():
    batching = Batching(4, 16, times=_stages(0.010, 0.0001, *[1.0] * 4))
    assert [batching.num_microbatches_for(n) for n in (1, 4, 16, 17, 64)] == [1, 1, 1, 4, 4]
    batching = Batching(4, 16, times=_stages(0.0001, 0.010, *[1.0] * 4))
    assert [batching.num_microbatches_for(n) for n in (1, 3, 16, 64)] == [1, 3, 4, 4]
    assert Batching(4, 16).num_microbatches_for(8) == 4


@given(step_times(), st.integers(1, 5), st.integers(1, 32), st.integers(1, 160))
def test_sequences_that_stay_together_are_nearly_as_fast(times, m, size, num_sequences):
    num_sequences = min(num_sequences, m * size)
    chosen = Batching(m, size, times=times).num_microbatches_for(num_sequences)
    most = min(m, num_sequences)
    assert chosen in (1, most)
    assert chosen * size >= num_sequences
    apart_s = times.round_s([-(-num_sequences // most)] * most)
    assert times.round_s([-(-num_sequences // chosen)] * chosen) <= 1.16 * apart_s


@given(
    step_times(),
    st.lists(st.integers(1, 32), min_size=1, max_size=5),
    st.floats(0.2, 5.0),
    st.sampled_from([0, 100, 4000]),
)
def test_prompts_lengthen_a_gap_no_more_than_said(times, sizes, slowdown, num_cached):
    batching = Batching(5, 32, 512, times=times)
    num_tokens = batching.prefill_tokens(sizes, slowdown, num_cached=num_cached)
    assert min(times.prefill) <= num_tokens <= 512
    took_s = slowdown * times.prefill_s(num_tokens, num_cached)
    round_s = times.round_s(sizes)
    if num_tokens > min(times.prefill):
        assert round_s + took_s <= 2.2 * round_s * (1 + 1e-9)
        assert took_s * times.num_stages <= 2.2 * round_s * (1 + 1e-9)
    if num_tokens < 512:
        more_s = slowdown * times.prefill_s(num_tokens + 1, num_cached)
        longest_s = 2.2 * round_s * (1 - 1e-9)
        assert round_s + more_s > longest_s or more_s * times.num_stages > longest_s


@given(step_times(), st.lists(st.integers(1, 32), min_size=1, max_size=5))
def test_a_round_is_no_shorter_than_the_way_through_the_pipe(times, sizes):
    way_s = sum(interpolate(times.decode, max(sizes))) + times.hop_s
    assert times.round_s(sizes) == max(way_s, sum(map(times.decode_s, sizes)))


def test_what_an_idle_server_and_one_without_times_compute_at_a_time():
    batching = Batching(2, 8, prefill_chunk=100, prefill_share=30)
    assert batching.prefill_tokens([], 1.0) == 100
    assert batching.prefill_tokens([1, 2], 1.0) == 30
    assert Batching(2, 8, 20, prefill_share=30).prefill_tokens([1], 1.0) == 20


def test_a_prompt_goes_through_in_chunks():
    times = StepTimes({1: (0.1, 0.1)}, {10: (0.2, 0.3)})
    assert times.prompt_s(10, 10) == pytest.approx(0.5)
    assert times.prompt_s(25, 10) == pytest.approx(0.5 + 2 * 0.3)


def test_what_is_cached_makes_a_step_longer():
    times = StepTimes({1: (0.1, 0.1)}, {10: (0.2, 0.3)}, score_s=(0.02, 0.01))
    assert times.prefill_s(10, 0) == 0.3
    assert times.prefill_stages_s(10, 5) == pytest.approx((1.2, 0.8))
    assert times.prefill_s(10, 5) == pytest.approx(1.2)


def test_padding_is_worth_a_quarter_of_a_step_of_its_own():
    curve = {1: (0.1, 0.2)}
    assert choose(StepTimes(curve, curve), 2, 8).most_padding == math.inf
    assert choose(StepTimes(curve, curve), 2, 8, cached_s=1e-3).most_padding == pytest.approx(50)
    times = StepTimes(curve, curve, score_s=(1e-3, 2e-3))
    assert choose(times, 2, 8, cached_s=1e-3).most_padding == pytest.approx(25)


def test_what_the_flag_says():
    assert parse_batching("fixed:2,16,256") == Batching(2, 16, 256, prefill_share=64)
    assert parse_batching("fixed:1,1,8").prefill_share == 8


@pytest.mark.parametrize(
    "text", ["", "auto:1", "fixed", "fixed:1,2", "fixed:0,1,1", "fixed:1,2000,1", "fixed:a,b,c"]
)
def test_what_it_cannot_say(text):
    with pytest.raises(ConfigError, match="fixed:MICROBATCHES"):
        parse_batching(text)


@given(step_times(), st.lists(st.integers(1, 32), min_size=1, max_size=5), st.floats(0.2, 5.0))
def test_where_many_wait_no_step_is_mostly_overhead(times, sizes, slowdown):
    batching = Batching(5, 32, 512, times=times)
    alone = batching.prefill_tokens(sizes, slowdown)
    crowded = batching.prefill_tokens(sizes, slowdown, is_crowded=True)
    assert crowded >= alone
    if crowded > alone:
        least_s = times.prefill_s(min(times.prefill))
        assert times.prefill_s(crowded) <= 3.5 * least_s * (1 + 1e-9)
