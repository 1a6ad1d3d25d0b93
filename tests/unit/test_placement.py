"""Every layer is held exactly once, whatever the counts, and no cut is better than the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_dist.cluster.cuts import search
from mlx_dist.cluster.placement import (
    Placement,
    Problem,
    Share,
    best,
    check,
    cut,
    even_counts,
    fits,
    is_within_memory,
    latency_s,
    slowest_s,
)
from mlx_dist.config import Objective, Split, parse_layers
from mlx_dist.errors import PlacementError

GB = 10**9
OBJECTIVES = tuple(Objective)


def even(problem: Problem) -> Placement:
    """All machines, as even in layers as can be, whether they fit or not.

    The leader comes first and the others in their order. Raises PlacementError with more machines
    than layers.
    """
    machines = _all_in_order(problem)
    return _counted(machines, even_counts(problem.num_layers, len(machines)))


def proportional(problem: Problem, weights: Sequence[float]) -> Placement:
    """As `even`, with layers in proportion to the weight of each machine, and at least one."""
    machines = _all_in_order(problem)
    even_counts(problem.num_layers, len(machines))
    total = sum(weights[machine] for machine in machines) or 1.0
    due = [problem.num_layers * weights[machine] / total for machine in machines]
    counts = [1] * len(machines)
    for _ in range(problem.num_layers - len(machines)):
        counts[max(range(len(machines)), key=lambda i: due[i] - counts[i])] += 1
    return _counted(machines, counts)


def _all_in_order(problem: Problem) -> list[int]:
    """The machines, the leader first; of a fixed order, those from the leader on."""
    leader = problem.leader or 0
    before = [] if problem.is_order_fixed else list(range(leader))
    return [leader, *before, *range(leader + 1, problem.num_machines)]


def _counted(machines: Sequence[int], counts: Sequence[int]) -> Placement:
    stages = cut(sum(counts), len(counts), counts)
    return tuple(Share(machine, *stage) for machine, stage in zip(machines, stages, strict=True))


@st.composite
def problems(draw, max_machines=4, max_layers=6, unit_s=1.0, is_roomy=False):
    """Layers and machines of few kinds each, in whole numbers: equal sums are common, and exact."""
    num_layers = draw(st.integers(1, max_layers))
    layer = st.tuples(st.integers(0, 5), st.integers(0, 6))
    layers = draw(st.lists(layer, min_size=num_layers, max_size=num_layers))
    kind = st.tuples(st.integers(0, 4 * num_layers), st.integers(1, 4), st.integers(0, 3))
    kinds = draw(st.lists(kind, min_size=1, max_size=max_machines))
    machines = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=max_machines))
    size = len(machines)
    hops = draw(
        st.integers(0, 9).map(lambda hop: [hop] * size**2)
        | st.lists(st.integers(0, 9), min_size=size**2, max_size=size**2)
    )
    embedding_bytes, head = draw(st.integers(0, 3)), draw(layer)

    def stage_bytes(_machine, start, end):
        held = sum(num_bytes for num_bytes, _ in layers[start:end])
        return held + (embedding_bytes if start == 0 or end == num_layers else 0)

    def stage_s(machine, start, end):
        _, per_layer, overhead = machines[machine]
        layers_s = sum(work * per_layer * unit_s for _, work in layers[start:end])
        return layers_s + overhead * unit_s + head[1] * unit_s * (end == num_layers)

    return Problem(
        num_layers,
        tuple(10**6 if is_roomy else capacity for capacity, _, _ in machines),
        stage_bytes,
        stage_s,
        lambda a, b: hops[a * size + b] * unit_s,
        tuple(f"m{i}" for i in range(size)),
        leader=draw(st.none() | st.integers(0, size - 1)),
        is_order_fixed=draw(st.booleans()),
        may_leave_out=draw(st.booleans()),
    )


def of_equal_layers(num_layers, capacities, slowness, hop_s=0.0, **changes) -> Problem:
    """Layers of 1 GB; on each machine a layer takes so many seconds."""
    task = Problem(
        num_layers,
        tuple(int(capacity * GB) for capacity in capacities),
        lambda machine, start, end: (end - start) * GB,
        lambda machine, start, end: (end - start) * slowness[machine],
        lambda a, b: hop_s,
        tuple(f"m{i}" for i in range(len(capacities))),
    )
    return replace(task, **changes)


def all_placements(problem):
    """Every one that the rules allow and the memory holds: brute force."""
    machines = range(problem.num_machines)
    for size in range(1, min(problem.num_machines, problem.num_layers) + 1):
        if size < problem.num_machines and not problem.may_leave_out:
            continue
        for order in permutations(machines, size):
            if problem.leader not in (None, order[0]):
                continue
            if problem.is_order_fixed and list(order) != sorted(order):
                continue
            for inner in combinations(range(1, problem.num_layers), size - 1):
                bounds = pairwise((0, *inner, problem.num_layers))
                placement = tuple(
                    Share(machine, *stage) for machine, stage in zip(order, bounds, strict=True)
                )
                if is_within_memory(problem, placement):
                    yield placement


def value(problem, placement, objective):
    values = latency_s(problem, placement), slowest_s(problem, placement)
    return values if objective == "latency" else values[::-1]


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(OBJECTIVES))
def test_the_best_is_the_best_of_all(problem, objective):
    allowed = list(all_placements(problem))
    assert fits(problem) == bool(allowed)
    if not allowed:
        with pytest.raises(PlacementError):
            best(problem, objective)
        return
    placement = best(problem, objective)
    assert placement in allowed
    least = min(value(problem, other, objective) for other in allowed)
    assert value(problem, placement, objective) == least


@settings(deadline=None)
@given(problems(unit_s=0.1), st.sampled_from(OBJECTIVES))
def test_sums_that_differ_by_rounding_are_ties(problem, objective):
    assume(fits(problem))
    least = min(value(problem, other, objective) for other in all_placements(problem))
    # Of two that are equal but for rounding, the first number may be the larger by that much.
    rounded = min(
        value(problem, other, objective)[1]
        for other in all_placements(problem)
        if value(problem, other, objective)[0] <= least[0] * (1 + 1e-12)
    )
    found = value(problem, best(problem, objective), objective)
    assert found == pytest.approx((least[0], rounded))


@settings(deadline=None)
@given(problems(max_machines=7, max_layers=30), st.sampled_from(OBJECTIVES))
def test_every_layer_is_placed_once_and_every_cap_kept(problem, objective):
    assume(fits(problem))
    placement = best(problem, objective)
    layers = [i for share in placement for i in range(share.start, share.end)]
    assert layers == list(range(problem.num_layers))
    machines = [share.machine for share in placement]
    assert all(share.start < share.end for share in placement)
    assert len(set(machines)) == len(machines)
    assert is_within_memory(problem, placement)
    assert problem.leader in (None, machines[0])
    assert not problem.is_order_fixed or machines == sorted(machines)
    assert problem.may_leave_out or len(machines) == problem.num_machines


@settings(deadline=None)
@given(problems(max_machines=7, max_layers=30, is_roomy=True), st.sampled_from(OBJECTIVES))
def test_the_best_is_no_worse_than_the_even_and_the_proportional_split(problem, objective):
    assume(fits(problem) and problem.num_machines <= problem.num_layers)
    found = value(problem, best(problem, objective), objective)
    memory = [1 + i % 3 for i in range(problem.num_machines)]
    for other in (even(problem), proportional(problem, memory)):
        assert other[0].start == 0
        assert other[-1].end == problem.num_layers
        assert found <= value(problem, other, objective)


def test_a_machine_of_a_third_of_the_memory_gets_a_third_of_the_layers():
    problem = of_equal_layers(14, [6, 6, 2], [1.0, 1.0, 1.0])
    for objective in OBJECTIVES:
        placement = best(problem, objective)
        counts = {share.machine: share.end - share.start for share in placement}
        assert counts == {0: 6, 1: 6, 2: 2}
    assert [s.end - s.start for s in proportional(problem, problem.capacity_bytes)] == [6, 6, 2]
    assert [s.end - s.start for s in proportional(problem, [1, 1, 0])] == [7, 6, 1]
    assert [s.end - s.start for s in even(problem)] == [5, 5, 4]


def test_one_stream_is_not_cut_without_need_and_many_are():
    problem = of_equal_layers(12, [20, 20, 20], [1.0, 1.0, 2.0], hop_s=0.5)
    assert best(problem, Objective.latency) == (Share(0, 0, 12),)
    assert {s.machine: s.end - s.start for s in best(problem, Objective.throughput)} == {
        0: 5,
        1: 5,
        2: 2,
    }


def test_a_slow_machine_is_left_out_unless_it_must_not_be():
    problem = of_equal_layers(4, [4, 4, 4], [1.0, 1.0, 9.0])
    assert {share.machine for share in best(problem, Objective.throughput)} == {0, 1}
    everyone = replace(problem, may_leave_out=False)
    assert {share.machine for share in best(everyone, Objective.throughput)} == {0, 1, 2}


def test_a_stage_slower_by_rounding_only_is_no_reason_for_a_cut():
    seconds = {(0, 0, 2): 0.1 + 0.2, (0, 0, 1): 0.1, (1, 1, 2): 0.3}
    problem = of_equal_layers(2, [2, 2], [1.0, 1.0])
    problem = replace(problem, stage_s=lambda *stage: seconds.get(stage, 9.0))
    assert best(problem, Objective.throughput) == (Share(0, 0, 2),)


def test_eight_equal_machines_are_as_few_orders_as_one():
    costs = np.ones((8, 95, 95))
    for first, num_stops in ((0, 8), (None, 8)):
        found = search(
            costs, np.zeros((8, 8)), first=first, is_order_fixed=False, may_leave_out=True
        )
        assert [len(route) for route in found.routes] == [num_stops]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eight_different_machines_are_placed(objective):
    slowness = [1 + i / 10 for i in range(8)]
    problem = of_equal_layers(94, [16 + i for i in range(8)], slowness, hop_s=0.1, leader=5)
    placement = best(problem, objective)
    assert placement[0].machine == 5
    if objective == "throughput":
        assert slowest_s(problem, placement) < slowest_s(problem, even(problem))
    else:
        # The fastest six hold 111 of the 94 layers; one of them is the leader.
        assert {share.machine for share in placement} == {0, 1, 2, 3, 4, 5}


def test_what_is_missing_is_said_with_what_would_fit():
    problem = of_equal_layers(40, [16, 11.5], [1.0, 1.0])
    assert not fits(problem)
    words = (
        r"the model does not fit: m0 has 16.0 GB, m1 has 11.5 GB, and 12.5 GB are missing "
        r"\(.* GB on m0 for layers .*, .* GB on m1 for layers .*-39\); use weights of fewer bits"
    )
    with pytest.raises(PlacementError, match=words):
        best(problem, Objective.latency)
    remedies = ("4-bit weights: 20.0 GB", "one more machine of 16 GB")
    words = "; what would fit: 4-bit weights: 20.0 GB, or one more machine of 16 GB$"
    with pytest.raises(PlacementError, match=words):
        best(replace(problem, remedies=remedies), Objective.throughput)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 6))
def test_no_cut_lacks_less_than_is_said(capacities, num_layers):
    """With layers of one size, all that the machines lack together is missing."""
    problem = of_equal_layers(num_layers, capacities, [1.0] * len(capacities))
    missing = num_layers - sum(capacities)
    # The leader's layer may be missing though the others have room.
    missing = max(missing, 1 - capacities[0])
    if missing <= 0:
        assert fits(problem)
        return
    with pytest.raises(PlacementError, match=rf"and {missing}\.0 GB are missing"):
        best(problem, Objective.latency)


def test_a_given_placement_is_checked():
    problem = of_equal_layers(6, [4, 4], [1.0, 1.0])
    check(problem, (Share(0, 0, 3), Share(1, 3, 6)))
    uneven = (Share(0, 0, 1), Share(1, 1, 6))
    words = r"as it is cut: .* 1.0 GB are missing \(1.0 GB on m1 for layers 1-5\); .*--layers auto"
    with pytest.raises(PlacementError, match=words):
        check(problem, uneven)
    with pytest.raises(PlacementError, match="fewer bits"):
        check(replace(problem, capacity_bytes=(GB, GB)), uneven)


@pytest.mark.parametrize(
    ("num_layers", "num_machines", "changes", "words"),
    [
        (4, 5, {"may_leave_out": False}, "4 layers and there are 5 machines"),
        (9, 3, {"may_leave_out": False, "is_order_fixed": True, "leader": 1}, "m1 leads"),
        (9, 0, {"leader": None}, "no machine"),
        (9, 13, {}, "13 machines have too many orders"),
    ],
)
def test_machines_that_cannot_be_ordered_so_are_refused(num_layers, num_machines, changes, words):
    slowness = [1.0 + i for i in range(num_machines)]
    problem = of_equal_layers(num_layers, [9 + i for i in range(num_machines)], slowness, **changes)
    with pytest.raises(PlacementError, match=words):
        best(problem, Objective.latency)


def test_more_machines_than_layers_are_no_hindrance_if_some_may_be_left_out():
    problem = of_equal_layers(3, [1, 1, 1, 1, 1], [1.0] * 5)
    assert len(best(problem, Objective.throughput)) == 3
    with pytest.raises(PlacementError, match="3 layers"):
        even(problem)


@given(st.integers(1, 200), st.data())
def test_an_even_cut_holds_every_layer_once(num_layers, data):
    num_ranks = data.draw(st.integers(1, num_layers))
    stages = cut(num_layers, num_ranks, None)
    assert [i for start, end in stages for i in range(start, end)] == list(range(num_layers))
    sizes = [end - start for start, end in stages]
    assert max(sizes) - min(sizes) <= 1
    assert tuple(sizes) == even_counts(num_layers, num_ranks)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_given_counts_are_kept(counts):
    stages = cut(sum(counts), len(counts), counts)
    assert [end - start for start, end in stages] == counts
    assert stages[0][0] == 0
    assert stages[-1][1] == sum(counts)


@pytest.mark.parametrize(
    ("num_layers", "num_ranks", "counts", "words"),
    [
        (6, 7, None, "6 layers and there are 7 ranks"),
        (6, 2, (3, 2), "adds up to 5"),
        (6, 2, (3, 2, 1), "cuts for 3 ranks and there are 2"),
        (6, 2, (6, 0), "leaves a rank without layers"),
        (6, 3, (3, -1, 4), "leaves a rank without layers"),
    ],
)
def test_an_impossible_cut_is_refused(num_layers, num_ranks, counts, words):
    with pytest.raises(PlacementError, match=words):
        cut(num_layers, num_ranks, counts)


@pytest.mark.parametrize("text", ["", "3,", "a,b", "3;3", "1.5,2"])
def test_layers_that_are_no_list_are_refused(text):
    with pytest.raises(PlacementError, match="is none of auto, even and a list of counts"):
        parse_layers(text)


def test_layers_are_read():
    assert parse_layers("3,1,2") == (3, 1, 2)
    assert parse_layers("even") is Split.even
    assert parse_layers("auto") is Split.auto
