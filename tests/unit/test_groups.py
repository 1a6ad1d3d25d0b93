"""Tensor groups are predicted as pipelines are, and their slices follow speeds and memories."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dist.cluster import groups
from mlx_dist.cluster.additions import best_addition
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import LayerCost, Link, ModelCosts, OutsideCost, Products, Workload
from mlx_dist.cluster.groups import capped, weights_by_speed
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.cluster.prediction import predict
from mlx_dist.cluster.problems import overhead_bytes
from mlx_dist.cluster.steps import StepShape
from mlx_dist.cluster.sums import Collectives
from mlx_dist.config import Objective, Parallel, RunConfig, Split
from mlx_dist.engine import ways
from mlx_dist.errors import ConfigError, FamilyError, PlacementError
from mlx_dist.messages import KvCost
from mlx_dist.plan import Asked, plan_of_file
from mlx_dist.plan_view import as_object, lines
from tests.unit.test_plan import CONFIG, machines
from tests.unit.test_prediction import WIRED, all_linked, machine, split
from tests.unit.test_prediction import model as model_of

FREE = Link(0.0, float("inf"))


def costs_of(slice_: Slice, num_layers: int = 4, ideal: bool = False) -> ModelCosts:
    """A model of which a slice costs its part, and norms besides unless all is `ideal`."""
    part = slice_.weights[slice_.place] / sum(slice_.weights)
    fixed = 0 if ideal else 100_000
    is_slice = slice_.size > 1
    layer = LayerCost(
        weights_bytes=int(40_000_000 * part) + fixed,
        dense=Products(int(10_000_000 * part), 32),
        kv=KvCost(growing=[(int(10_000 * part), None)]),
        num_ops=0 if ideal else 10,
        sums=(4000, 4000) if is_slice else (),
    )
    return ModelCosts(
        name="model",
        dtype="float32",
        layers=(layer,) * num_layers,
        outside=(OutsideCost(int(60_000_000 * part), frozenset({-1, num_layers})),),
        head=Products(int(15_000_000 * part), 32),
        hidden_bytes=4000,
        vocab_size=15000,
        entry_sums=(4000,) if is_slice else (),
        logits_bytes=60_000 if is_slice else 0,
    )


def case_of(*slowdowns: float, gigabytes: float | tuple[float, ...] = 8, **changes) -> Case:
    sizes = gigabytes if isinstance(gigabytes, tuple) else (gigabytes,) * len(slowdowns)
    them = tuple(
        machine(f"m{i}", size, slow)
        for i, (slow, size) in enumerate(zip(slowdowns, sizes, strict=True))
    )
    basic = Case(
        costs_of(WHOLE),
        them,
        all_linked(len(them)),
        Workload(1000),
        Objective.latency,
        leader=0,
        is_order_fixed=True,
        may_leave_out=False,
        costs_of=costs_of,
    )
    return replace(basic, **changes)


def weights_of(placement) -> tuple[int, ...]:
    return tuple(share.slice.weights[share.slice.place] for share in placement)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 20))
def test_groups_of_one_are_a_pipeline(counts, num_sequences):
    costs = model_of(sum(counts))
    them = [machine(f"m{i}", slowdown=1 + i) for i in range(len(counts))]
    case = case_of(*[1.0] * len(counts), costs=costs, machines=tuple(them), costs_of=None)
    case = replace(case, workload=Workload(1000, num_sequences))
    shares = groups.place(case, 1, Split.auto, tuple(counts))
    assert list(shares) == split(counts)
    predicted = predict(costs, them, case.links, split(counts), case.workload)
    assert case.predicted(shares) == predicted
    assert all(stage.collectives_s == 0 for stage in predicted.stages)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 30))
def test_with_free_links_more_ranks_are_never_worse(num_ranks, num_sequences):
    def rate(size: int) -> float:
        case = case_of(*[1.0] * size, links=all_linked(size, FREE))
        slices = {Slice(i, (1,) * size): costs_of(Slice(i, (1,) * size)) for i in range(size)}
        shares = groups.place(case, size)
        workload = Workload(1000, num_sequences)
        return predict(
            case.costs, case.machines, case.links, shares, workload, slices=slices
        ).total_tokens_per_s

    # What a plan takes to the others is the program's own, and not the links'.
    assert rate(num_ranks + 1) >= rate(num_ranks) * 0.99


def test_a_group_takes_its_slowest_rank_and_its_collectives():
    case = case_of(1.0, 3.0)
    shares = groups.place(case, 2, (1, 1))
    predicted = case.predicted(shares)
    slow = case_of(3.0, costs=costs_of(Slice(1, (1, 1)))).predicted()
    together = Collectives(2, WIRED, plan_s=140e-6 + 1e-4)
    # Two sums a layer and one of the embedding, of a hidden vector; a gather is half a sum.
    each_s = WIRED.seconds(4000)
    sums_s = 9 * each_s + WIRED.seconds(60_000) / 2 + together.plan_s
    costs = case.slice_costs(Slice(0, (1, 1)))
    assert together.step_s(costs, 0, 4, StepShape(1, 1, 500, 1)) == pytest.approx(sums_s)
    assert predicted.stages[0].collectives_s == pytest.approx(sums_s)
    expected_s = 1 / slow.stream_tokens_per_s + sums_s
    assert predicted.stream_tokens_per_s == pytest.approx(1 / expected_s)
    # Logits are gathered of what is sampled, and a chunk of a prompt has none.
    chunk_s = together.step_s(costs, 0, 4, StepShape(1, 100, 0, 0))
    assert chunk_s == pytest.approx(together.plan_s + 9 * together.sum_s(400_000))


def test_what_was_measured_of_sums_counts():
    curve = {4000: 1e-3, 40_000: 2e-3}
    measured = Collectives(2, WIRED, curve, 2)
    assert measured.sum_s(4000) == 1e-3
    assert measured.sum_s(22_000) == pytest.approx(1.5e-3)
    # Four ranks, of which nothing was measured: twice as many exchanges.
    assert replace(measured, size=4).sum_s(4000) == pytest.approx(2e-3)
    case = case_of(1.0, 1.0, sums={2: curve})
    slow = case.predicted(groups.place(case, 2))
    assert slow.limit == "memory bandwidth of m0 and m1"
    slower = replace(case, sums={2: {4000: 1.0}})
    assert slower.predicted(groups.place(slower, 2)).limit == "collectives of m0 and m1"


def test_a_ring_sums_over_its_neighbours():
    """Ranks that it does not connect do not make its sums last for ever."""
    unreachable = Link(float("inf"), float("inf"))
    links = all_linked(4)
    for a, b in ((0, 2), (2, 0), (1, 3), (3, 1)):
        links[a][b] = unreachable
    case = case_of(1.0, 1.0, 1.0, 1.0, links=links)
    assert case.predicted(groups.place(case, 4)).stream_tokens_per_s > 1


@pytest.mark.parametrize(
    ("seconds", "weights"),
    [
        ([1.0], (1,)),
        ([2.0, 2.0, 2.0], (1, 1, 1)),
        ([1.0, 2.0], (2, 1)),
        ([1.0, 1.5, 1.5], (3, 2, 2)),
        ([1.0, 1.01], (1, 1)),
    ],
)
def test_weights_are_small_numbers(seconds, weights):
    assert weights_by_speed(seconds) == weights


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=8))
def test_weights_are_in_the_ratio_of_speeds(seconds):
    weights = weights_by_speed(seconds)
    fast = min(range(len(seconds)), key=lambda i: seconds[i])
    for i, weight in enumerate(weights):
        assert weight >= 1
        assert weight / weights[fast] == pytest.approx(seconds[fast] / seconds[i], rel=0.15)


@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.0, 1)), min_size=1, max_size=8),
)
def test_what_a_cap_cuts_off_goes_to_the_others(pairs):
    total = sum(share for share, _ in pairs)
    shares, caps = [share / total for share, _ in pairs], [cap for _, cap in pairs]
    found = capped(shares, caps)
    if sum(caps) < 1:
        assert found is None
        return
    assert sum(found) == pytest.approx(1)
    assert all(each <= cap + 1e-9 for each, cap in zip(found, caps, strict=True))
    ratios = [f / s for f, s, cap in zip(found, shares, caps, strict=True) if f < cap]
    assert all(ratio == pytest.approx(max(ratios)) for ratio in ratios)


def test_a_fast_machine_gets_more_and_a_small_one_no_more_than_it_holds():
    assert weights_of(groups.place(case_of(1.0, 1.0, 2.0), 3)) == (2, 2, 1)
    # A part of 1/3, 73 MB, beside what a process takes, has no room on the second machine.
    small = (overhead_bytes(costs_of(WHOLE)) + 50_000_000) / 1e9
    case = case_of(1.0, 1.0, 1.0, gigabytes=(8, small, 8))
    with pytest.raises(PlacementError, match=r"MB are missing \(.* on m1 for 1/3 of layers 0-3\)"):
        groups.place(case, 3, Split.even)
    shares = groups.place(case, 3)
    weights = weights_of(shares)
    assert weights[1] < weights[0]
    predicted = case.predicted(shares)
    assert all(stage.headroom_bytes >= 0 for stage in predicted.stages)
    # No more is shifted than needs to be.
    assert predicted.stages[1].headroom_bytes < 5_000_000


def test_what_does_not_fit_names_the_rank():
    tiny = (overhead_bytes(costs_of(WHOLE)) + 50_000_000) / 1e9
    with pytest.raises(PlacementError, match=r"m0 has .*, and .* are missing .* on m1 for 1/2 of"):
        groups.place(case_of(1.0, 1.0, gigabytes=tiny), 2)


@settings(deadline=None)
@given(st.permutations([1.0, 1.0, 4.0, 4.0]))
def test_layers_of_groups_go_by_their_speed(slowdowns):
    case = case_of(*slowdowns)
    shares = groups.place(case, 2, Split.even)
    starts = [(share.start, share.end) for share in shares]
    assert starts[0] == starts[1]
    assert starts[2] == starts[3]
    assert [layer for a, b in (starts[0], starts[2]) for layer in range(a, b)] == list(range(4))
    best = case.predicted(shares).stream_tokens_per_s
    for first in range(1, 4):
        other = groups.place(case, 2, Split.even, (first, 4 - first))
        assert case.predicted(other).stream_tokens_per_s <= best * (1 + 1e-9)


def test_what_cannot_be_is_said():
    case = case_of(1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="tensor=2 does not divide 3 ranks"):
        groups.place(case, 2)
    with pytest.raises(ConfigError, match="--slices 2,1 is for 2 ranks and there are 3"):
        groups.place(case, 3, (2, 1))
    with pytest.raises(PlacementError, match="--layers 2,1,1 cuts for 3 groups and there are 1"):
        groups.place(case, 3, layers=(2, 1, 1))
    many = case_of(*[1.0] * 10)
    with pytest.raises(PlacementError, match="4 layers and there are 5 groups"):
        groups.place(many, 2)
    tensor = RunConfig("m", parallel=Parallel.tensor)
    with pytest.raises(ConfigError, match="--leave-out goes with --parallel pipeline only"):
        ways.sizes(replace(tensor, leave_out=True), 2)
    with pytest.raises(ConfigError, match="--slices goes with --parallel tensor"):
        ways.sizes(RunConfig("m", slices=(1, 1)), 2)
    with pytest.raises(ConfigError, match="ring fabric cannot form"):
        ways.sizes(replace(tensor, parallel=2), 4, "ring")


def test_what_there_is_to_choose_from():
    auto = RunConfig("m", parallel=Parallel.auto)
    assert ways.sizes(auto, 1) == (1,)
    assert ways.sizes(auto, 5) == (1, 5)
    assert ways.sizes(auto, 12) == (1, 2, 3, 4, 6, 12)
    assert ways.sizes(auto, 12, "ring") == (1, 12)
    assert ways.sizes(replace(auto, parallel=3), 12) == (3,)
    assert ways.sizes(replace(auto, parallel=Parallel.tensor), 12) == (12,)
    assert ways.sizes(RunConfig("m"), 12) == (1,)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("link", [FREE, Link(1e-2, 1e7)], ids=["free", "slow"])
def test_auto_is_the_best_that_is_predicted(objective, link):
    case = case_of(*[1.0] * 4, links=all_linked(4, link), objective=objective)
    config = RunConfig("m", parallel=Parallel.auto, optimize=objective)
    sizes = ways.sizes(config, 4)
    judged = ways.judged(config, case.workload)
    choice = ways.choose(case, config, sizes, None, judged)

    def rate(shares) -> float:
        rated = replace(case, workload=judged)
        return rated.rate_of(rated.predicted(shares))

    each = {
        size: rate(case.placement() if size == 1 else groups.place(case, size)) for size in sizes
    }
    assert rate(choice.shares) == pytest.approx(max(each.values()))
    assert choice.said.startswith("--parallel auto: ")
    for name in {1: "pipeline", 2: "tensor=2", 4: "tensor"}.values():
        assert name in choice.said
    if objective is Objective.latency:
        assert (choice.shares[0].slice.size == 1) == (link is not FREE)


def test_a_family_that_nobody_slices_is_a_pipeline():
    def refuse(_slice: Slice) -> ModelCosts:
        raise FamilyError("model: nobody has looked at it; use --parallel pipeline")

    case = case_of(1.0, 1.0, costs_of=refuse)
    auto = RunConfig("m", parallel=Parallel.auto)
    choice = ways.choose(case, auto, (1, 2), None)
    assert [share.slice for share in choice.shares] == [WHOLE, WHOLE]
    assert choice.said.endswith("model: nobody has looked at it")
    with pytest.raises(FamilyError, match="use --parallel pipeline"):
        ways.choose(case, replace(auto, parallel=Parallel.tensor), (2,), None)


def test_one_more_machine_is_one_more_in_the_group():
    case = case_of(1.0, 1.0, links=all_linked(2, Link(1e-6, 1e10)))
    config = RunConfig("m", parallel=Parallel.tensor)
    choice = ways.choose(case, config, (2,), None)
    addition = best_addition(case, choice.way)
    assert addition is not None
    assert addition.what.startswith("one more chip")


def test_a_file_of_machines_is_planned_for_in_groups(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    path = machines(tmp_path, 12, 4, "rdma")
    config = RunConfig(str(tmp_path / "model"), parallel=2)
    plan = plan_of_file(config, Asked(), path)
    stages = plan.prediction.stages
    assert [stage.layers for stage in stages] == [(0, 4)] * 2 + [(4, 8)] * 2
    assert [stage["slice"]["place"] for stage in as_object(plan)["stages"]] == [0, 1, 0, 1]
    assert as_object(plan)["left_out"] == []
    auto = plan_of_file(replace(config, parallel=Parallel.auto), Asked(), path)
    assert auto.prediction.stream_tokens_per_s >= plan.prediction.stream_tokens_per_s
    assert any(line.startswith("--parallel auto: ") for line in lines(auto))
