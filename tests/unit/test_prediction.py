"""Predictions are the sums they claim to be, and placements keep to what is predicted for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dist.cluster.additions import best_addition, what_would_fit
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import (
    LayerCost,
    Link,
    Machine,
    ModelCosts,
    OutsideCost,
    Products,
    Workload,
)
from mlx_dist.cluster.placement import Share, fits
from mlx_dist.cluster.prediction import predict, stage_s
from mlx_dist.cluster.problems import PREFILL_CHUNK, PROGRAM_HOP_S, overhead_bytes, problem
from mlx_dist.cluster.steps import StepShape, interpolate, layer_time, stage_time
from mlx_dist.config import Objective
from mlx_dist.errors import PlacementError
from mlx_dist.messages import KvCost, Speeds

GB = 10**9
NOWHERE, WIRED = Link(0.0, float("inf")), Link(1e-4, 1e9)
# A weight is read in 1 ns, and multiplied with in 0.1 ns a token beyond that.
SPEEDS = Speeds(
    dtype="float32",
    bits=4,
    product_s={1: 1e-9, 11: 2e-9, 111: 12e-9},
    quantized_s={1: 2e-10, 11: 1.2e-9},
    stream_bytes_per_s=1e10,
    op_s=1e-6,
    element_s=1e-9,
    head_s=1e-7,
)
LAYER = LayerCost(
    weights_bytes=4_000_000,
    dense=Products(1_000_000, 32),
    kv=KvCost(growing=[(1000, None)]),
    score_flops=4096,
    num_activations=2000,
    num_ops=10,
)


def model(num_layers: int, layer: LayerCost = LAYER) -> ModelCosts:
    return ModelCosts(
        name="model",
        dtype="float32",
        layers=(layer,) * num_layers,
        outside=(
            OutsideCost(50_000_000, frozenset({-1})),
            OutsideCost(60_000_000, frozenset({num_layers})),
        ),
        head=Products(1_000_000, 32),
        hidden_bytes=4000,
        vocab_size=15000,
    )


def machine(name: str, gigabytes: float = 8, slowdown: float = 1.0) -> Machine:
    speeds = Speeds(
        SPEEDS.dtype,
        SPEEDS.bits,
        {n: s * slowdown for n, s in SPEEDS.product_s.items()},
        {n: s * slowdown for n, s in SPEEDS.quantized_s.items()},
        SPEEDS.stream_bytes_per_s / slowdown,
        SPEEDS.op_s * slowdown,
        SPEEDS.element_s * slowdown,
        SPEEDS.head_s * slowdown,
    )
    return Machine(name, "chip", int(1.25 * gigabytes * GB), int(gigabytes * GB), speeds)


def all_linked(num: int, link: Link = WIRED) -> list[list[Link]]:
    return [[NOWHERE if a == b else link for b in range(num)] for a in range(num)]


def split(counts: list[int]) -> list[Share]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [
        Share(i, start, start + count)
        for i, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 1000), st.floats(0, 1), min_size=1), st.floats(0.5, 5000))
def test_times_lie_on_lines_through_what_was_measured(curve, size):
    value = interpolate(curve, size)
    least, most = min(curve), max(curve)
    assert value >= 0
    if size <= least:
        assert value == curve[least]
    elif size <= most:
        assert min(curve.values()) - 1e-9 <= value <= max(curve.values()) + 1e-9
    for measured, seconds in curve.items():
        assert interpolate(curve, measured) == pytest.approx(seconds)


def test_a_layer_costs_its_matrices_its_caches_and_its_operations():
    shape = StepShape(num_sequences=3, tokens_each=1, cached_tokens=99, num_sampled=3)
    seconds = layer_time(SPEEDS, LAYER, shape)
    # 1 to 11 tokens: 1 to 2 ns a weight.
    products_s = 1e6 * 0.2e-9
    # 111 tokens in 12 ns are the most that was measured.
    scores_s = 3 * 100 * 4096 / (2 * 111 / 12e-9)
    assert seconds.memory_s == pytest.approx(1e6 * 1e-9 + 3 * 100 * 1000 / 1e10)
    assert seconds.products_s == pytest.approx(products_s + scores_s)
    assert seconds.operations_s == pytest.approx(3 * 2000 * 1e-9 + 10e-6)
    assert seconds.total_s == pytest.approx(
        seconds.memory_s + seconds.products_s + seconds.operations_s
    )


@pytest.mark.parametrize("tokens_each", [1, 50])
def test_each_head_of_a_sequence_multiplies_twice_where_attention_is_several_operations(
    tokens_each,
):
    shape = StepShape(num_sequences=3, tokens_each=tokens_each, cached_tokens=100, num_sampled=3)
    fused, several = (
        layer_time(SPEEDS, replace(LAYER, num_scores=num_heads), shape) for num_heads in (0, 8)
    )
    num_scores = 8 * 3 * tokens_each * (100 + (tokens_each + 1) / 2)
    added_s = several.operations_s - fused.operations_s
    assert added_s == pytest.approx(num_scores * SPEEDS.element_s + 2 * 8 * 3 * SPEEDS.head_s)
    assert replace(several, operations_s=fused.operations_s) == fused


def test_a_chunk_looks_at_what_is_before_it_and_half_of_itself():
    only_scores = replace(LAYER, dense=Products(), num_activations=0, num_ops=0)
    alone = StepShape(1, 100, 0, 1)
    later = StepShape(1, 100, 1000, 1)
    seconds = [layer_time(SPEEDS, only_scores, shape).products_s for shape in (alone, later)]
    assert seconds[1] / seconds[0] == pytest.approx((1000 + 50.5) / 50.5)


def test_a_window_bounds_what_is_read_and_what_is_looked_at():
    windowed = replace(LAYER, kv=KvCost(growing=[(1000, 64)]))
    near, far = (StepShape(1, 1, cached, 1) for cached in (64, 6400))
    assert layer_time(SPEEDS, windowed, near) == layer_time(SPEEDS, windowed, far)
    assert layer_time(SPEEDS, LAYER, near).total_s < layer_time(SPEEDS, LAYER, far).total_s


@pytest.mark.parametrize(("bits", "ratio"), [(4.5, 1.0), (8.5, 8.5 / 4.5), (2.5, 2.5 / 4.5)])
def test_other_bits_change_what_is_read_and_not_what_is_multiplied(bits, ratio):
    layer = replace(LAYER, dense=Products(1_000_000, bits))
    one, many = (
        layer_time(SPEEDS, layer, StepShape(num, 1, 0, num)).total_s
        - layer_time(SPEEDS, replace(layer, dense=Products()), StepShape(num, 1, 0, num)).total_s
        for num in (1, 11)
    )
    assert one == pytest.approx(1e6 * 2e-10 * ratio)
    assert many - one == pytest.approx(1e6 * 1e-9)


def test_one_token_meets_its_experts_and_many_meet_all():
    routed = replace(
        LAYER,
        dense=Products(),
        kv=KvCost(),
        num_activations=0,
        num_ops=0,
        expert=Products(1_000_000, 32),
        num_experts=16,
        experts_per_token=4,
    )
    assert layer_time(SPEEDS, routed, StepShape(1, 1, 0, 1)).total_s == pytest.approx(4e-3)
    # A thousand tokens: each of 16 experts with 250 of them.
    expected = 16 * 1e6 * interpolate(SPEEDS.product_s, 250)
    assert layer_time(SPEEDS, routed, StepShape(1, 1000, 0, 1)).total_s == pytest.approx(expected)


def test_one_stream_goes_through_all_stages_and_hops():
    costs, machines = model(6), [machine("a"), machine("b", slowdown=2)]
    links = [[NOWHERE, Link(1e-3, 1e6)], [Link(5e-4, 1e6), NOWHERE]]
    placement = split([4, 2])
    predicted = predict(costs, machines, links, placement, Workload(2000))
    stages_s = [
        stage_s(machines[i], costs, *ends, 1, 1, 1000) for i, ends in ((0, (0, 4)), (1, (4, 6)))
    ]
    hops_s = 1e-3 + 4000 / 1e6 + 5e-4 + 2 * PROGRAM_HOP_S
    assert predicted.cached_tokens == 1000
    assert predicted.stream_tokens_per_s == pytest.approx(1 / (sum(stages_s) + hops_s))
    assert predicted.total_tokens_per_s == predicted.stream_tokens_per_s
    assert [stage.step_s for stage in predicted.stages] == pytest.approx(stages_s)


def test_a_world_of_one_has_no_hops():
    costs, alone = model(6), machine("a")
    predicted = predict(costs, [alone], [[NOWHERE]], split([6]), Workload(2000))
    assert predicted.stream_tokens_per_s == pytest.approx(
        1 / stage_s(alone, costs, 0, 6, 1, 1, 1000)
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([0.0, 1e-4, 1e-2]),
    st.integers(0, 4000),
)
def test_many_sequences_get_what_the_slowest_stage_or_the_way_allows(
    counts, num_sequences, latency_s, cached
):
    costs = model(sum(counts))
    machines = [machine(f"m{i}", slowdown=1 + i) for i in range(len(counts))]
    links = all_linked(len(counts), Link(latency_s, 1e9))
    placement = split(counts)
    predicted = predict(
        costs, machines, links, placement, Workload(8000, num_sequences), cached_tokens=cached
    )

    def rate(num_microbatches: int) -> float:
        sizes = [len(range(m, num_sequences, num_microbatches)) for m in range(num_microbatches)]
        stages_s = [
            [stage_s(machines[s.machine], costs, s.start, s.end, n, 1, cached) for n in sizes]
            for s in placement
        ]
        hop_s = PROGRAM_HOP_S + latency_s
        num_hops = len(counts) if len(counts) > 1 else 0
        hops_s = num_hops * hop_s + max(0, num_hops - 1) * max(sizes) * 4000 / 1e9
        way_s = sum(s[0] for s in stages_s) + hops_s
        link_s = sum(hop_s + n * 4000 / 1e9 for n in sizes) if num_hops else 0.0
        if len(counts) == 1:
            link_s = 0.0
        return num_sequences / max(max(map(sum, stages_s)), way_s, link_s)

    rates = {m: rate(m) for m in range(1, min(len(counts), num_sequences) + 1)}
    assert predicted.total_tokens_per_s == pytest.approx(max(rates.values()))
    assert rates[predicted.num_microbatches] == pytest.approx(max(rates.values()))


def test_a_prompt_goes_through_the_pipe_in_chunks_that_overlap():
    costs, machines = model(8), [machine("a"), machine("b")]
    workload = Workload(prompt_tokens=(1, 100, 2048))
    predicted = predict(costs, machines, all_linked(2), split([4, 4]), workload)
    alone = predict(costs, machines[:1], [[NOWHERE]], split([8]), workload)

    def step_s(size: int, cached: int, ends: tuple[int, int], num_sampled: int = 0) -> float:
        shape = StepShape(1, size, cached, num_sampled)
        return stage_time(SPEEDS, costs, *ends, shape).total_s

    hop_s = 1e-4 + PROGRAM_HOP_S
    # The prompt's last token is a step of its own, right behind the others.
    short_s = step_s(99, 0, (0, 8)) + step_s(1, 99, (0, 8), 1)
    assert alone.ttft_s[100] == pytest.approx(short_s)
    through_s = 2 * step_s(99, 0, (0, 4)) + hop_s + 99 * 4000 / 1e9
    assert predicted.ttft_s[100] == pytest.approx(through_s + step_s(1, 99, (4, 8), 1) + hop_s)
    assert alone.ttft_s[1] == pytest.approx(step_s(1, 0, (0, 8), 1))
    # The last of four chunks is behind three others on one stage only.
    assert alone.ttft_s[2048] / 2 < predicted.ttft_s[2048] < alone.ttft_s[2048] * 0.7


def test_a_slow_link_sets_the_pace_of_a_long_prompt():
    costs, machines = model(4), [machine("a"), machine("b")]
    slow = predict(
        costs,
        machines,
        all_linked(2, Link(0.0, 1e6)),
        split([2, 2]),
        Workload(prompt_tokens=(2048,)),
    )
    assert slow.ttft_s[2048] > 2048 * 4000 / 1e6


def test_memory_is_weights_caches_at_their_longest_and_the_process():
    costs = model(5, replace(LAYER, kv=KvCost(100, [(1000, None), (10, 64)])))
    workload = Workload(context_tokens=3000, num_sequences=7)
    predicted = predict(costs, [machine("a"), machine("b")], all_linked(2), split([2, 3]), workload)
    first, last = predicted.stages
    assert first.weights_bytes == 2 * 4_000_000 + 50_000_000
    assert last.weights_bytes == 3 * 4_000_000 + 60_000_000
    # A window of 64 holds a chunk more.
    assert last.kv_bytes == 7 * 3 * (100 + 3000 * 1000 + (64 + PREFILL_CHUNK) * 10)
    for stage in predicted.stages:
        held = stage.weights_bytes + stage.kv_bytes + overhead_bytes(costs)
        assert stage.headroom_bytes == 8 * GB - held


@settings(deadline=None)
@given(
    st.lists(st.floats(0.5, 4), min_size=1, max_size=3),
    st.integers(1, 20),
    st.sampled_from(Objective),
)
def test_the_placement_problem_has_the_predictions_numbers(slowdowns, num_sequences, objective):
    costs = model(4)
    machines = [machine(f"m{i}", slowdown=slow) for i, slow in enumerate(slowdowns)]
    workload = Workload(1000, num_sequences)
    task = problem(costs, machines, all_linked(len(machines)), workload, objective)
    each = 1 if objective is Objective.latency else -(-num_sequences // len(machines))
    for i, m in enumerate(machines):
        for start in range(4):
            for end in range(start + 1, 5):
                expected = stage_s(m, costs, start, end, each, 1, 500)
                assert task.stage_s(i, start, end) == pytest.approx(expected)
                held = costs.weights_bytes(start, end) + overhead_bytes(costs)
                held += num_sequences * costs.kv_bytes(start, end, 1000)
                assert task.stage_bytes(i, start, end) == held
    assert task.capacity_bytes == tuple(m.usable_bytes for m in machines)


@pytest.mark.parametrize(
    ("link", "num_ops", "num_sequences", "expected"),
    [
        (Link(1e-5, 1e10), 10, 1, "memory bandwidth of all machines"),
        (Link(1.0, 1e10), 10, 1, "links"),
        (Link(1e-5, 1e10), 10**6, 1, "small operations of all machines"),
        (Link(1e-5, 1e10), 10, 2000, "products of b"),
        (Link(1e-5, 1e4), 10, 2000, "link a to b"),
    ],
)
def test_what_limits_is_named(link, num_ops, num_sequences, expected):
    layer = replace(LAYER, num_ops=num_ops, num_activations=0, kv=KvCost())
    costs = replace(model(4, layer), head=Products())
    machines = [machine("a"), machine("b", slowdown=1 if num_sequences == 1 else 1.5)]
    workload = Workload(100, num_sequences)
    predicted = predict(costs, machines, all_linked(2, link), split([2, 2]), workload)
    assert predicted.limit == expected


def case(num: int, gigabytes: float = 8, num_layers: int = 8, **changes) -> Case:
    machines = tuple(machine(f"m{i}", gigabytes) for i in range(num))
    basic = Case(
        model(num_layers), machines, all_linked(num), Workload(1000, 16), Objective.throughput
    )
    return replace(basic, **changes)


def test_one_more_machine_is_the_best_addition_where_stages_are_slow():
    asked = case(2, workload=Workload(1000, 200))
    addition = best_addition(asked)
    assert addition is not None
    assert addition.what == "one more chip of 9 GB"
    assert addition.speedup > 1.02


def test_a_faster_link_is_the_best_addition_where_the_link_is_slow():
    # Twice the memory makes two of three hops, and a better link as good as none.
    costs = model(26, replace(LAYER, weights_bytes=100_000_000))
    asked = case(
        3,
        1.2,
        costs=costs,
        links=all_linked(3, Link(20e-3, 1e6)),
        objective=Objective.latency,
        workload=Workload(10),
    )
    addition = best_addition(asked)
    assert addition is not None
    assert addition.what == "links of 1gbe in place of the slowest"
    assert addition.speedup > 1.02


def test_more_memory_is_the_best_addition_where_it_saves_all_hops():
    asked = case(2, 0.3, objective=Objective.latency, workload=Workload(10))
    addition = best_addition(asked)
    assert addition is not None
    assert addition.what.startswith("1 GB in m")


def test_nothing_is_added_where_nothing_helps():
    asked = case(1, objective=Objective.latency, workload=Workload(1000))
    assert best_addition(asked) is None


def test_what_would_fit_is_found_by_trying():
    thin = replace(model(8), layers=(replace(LAYER, weights_bytes=1_000_000),) * 8)
    thick = replace(model(8), layers=(replace(LAYER, weights_bytes=100_000_000),) * 8)
    asked = case(2, 0.7, costs=thick, workload=Workload(16000, 4))
    with pytest.raises(PlacementError):
        asked.placement()
    assert asked.rate() == 0
    remedies = what_would_fit(asked, {"4 bits": thin})
    assert "4 bits" in remedies
    contexts = [r for r in remedies if r.startswith("a context of")]
    for words in contexts:
        tokens = int(words.split()[3])
        assert fits(replace(asked, workload=Workload(tokens, 4)).problem())
        assert not fits(replace(asked, workload=Workload(2 * tokens, 4)).problem())
    assert any("more 1 GB machine" in words for words in remedies)
