"""What stages ask of machines, or of tensor groups, as problems of placement. Pure.

Many ranges of layers are asked about: sums from the first layer on are kept, and the difference
of two is a range's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from mlx_dist.cluster.costs import Link, Machine, ModelCosts, Workload
from mlx_dist.cluster.placement import Problem
from mlx_dist.cluster.steps import StepShape, head_time, layer_time
from mlx_dist.cluster.sums import Collectives
from mlx_dist.config import Objective

# The largest number of prompt tokens in one step, as the program has it by default.
PREFILL_CHUNK = 512
# What a rank takes before it loads anything: 90 MB on Linux, and some more beside a GPU.
RUNTIME_BYTES = 150_000_000
# For each token of a chunk, the hidden states that a step keeps at a time: inputs and outputs of
# the matrices of two layers, of which those of an MLP or of experts are several times as wide.
_LIVE_HIDDEN_STATES = 32
# What the program adds to a message's way: it packs two of them, and the receiver sleeps between
# its looks. benchmarks.single_stream measures 561 us for a hop and a token's way back on one host.
PROGRAM_HOP_S = 280e-6

Links = Sequence[Sequence[Link]]


def problem(
    costs: ModelCosts,
    machines: Sequence[Machine],
    links: Links,
    workload: Workload,
    objective: Objective,
    *,
    leader: int | None = None,
    is_order_fixed: bool = False,
    may_leave_out: bool = True,
    remedies: tuple[str, ...] = (),
    own: Sequence[ModelCosts] = (),
) -> Problem:
    """The placement problem of these machines, each with room for all sequences at their longest.

    A step has one sequence, or for throughput the share of a microbatch for every machine. `own`
    are the costs of the machines' slices, where each has but one of the model.
    """
    shape = _step(workload, objective, len(machines))
    demands = [
        _Demand(machine, own[number] if own else costs, workload, shape)
        for number, machine in enumerate(machines)
    ]
    hidden_bytes = costs.hidden_bytes * shape.num_sequences
    return Problem(
        num_layers=costs.num_layers,
        capacity_bytes=tuple(machine.usable_bytes for machine in machines),
        stage_bytes=lambda machine, start, end: demands[machine].bytes(start, end),
        stage_s=lambda machine, start, end: demands[machine].seconds(start, end),
        hop_s=lambda a, b: message_s(links[a][b], hidden_bytes),
        names=tuple(machine.name for machine in machines),
        leader=leader,
        is_order_fixed=is_order_fixed,
        may_leave_out=may_leave_out,
        remedies=remedies,
    )


def group_problem(
    groups: Sequence[Sequence[int]],
    own: Sequence[ModelCosts],
    machines: Sequence[Machine],
    links: Links,
    collectives: Sequence[Collectives],
    workload: Workload,
    objective: Objective,
) -> Problem:
    """As `problem`, of groups of machines in the place of machines, all of them in their order.

    `own` are the costs of the machines' slices. What a stage takes of a group is what is missing
    on the machine that has least room for it: there is no other capacity.
    """
    shape = _step(workload, objective, len(groups))
    demands = [
        [_Demand(machines[number], own[number], workload, shape) for number in group]
        for group in groups
    ]
    together = [
        _Together(each, own[group[0]], shape)
        for each, group in zip(collectives, groups, strict=True)
    ]
    hidden_bytes = own[0].hidden_bytes * shape.num_sequences

    def missing_bytes(group: int, start: int, end: int) -> int:
        return max(each.bytes(start, end) - each.usable_bytes for each in demands[group])

    def seconds(group: int, start: int, end: int) -> float:
        slowest_s = max(each.seconds(start, end) for each in demands[group])
        return slowest_s + together[group].seconds(start, end)

    return Problem(
        num_layers=own[0].num_layers,
        capacity_bytes=(0,) * len(groups),
        stage_bytes=missing_bytes,
        stage_s=seconds,
        hop_s=lambda a, b: group_hop_s(groups[a], groups[b], links, hidden_bytes),
        names=tuple(machines[group[0]].name for group in groups),
        is_order_fixed=True,
        may_leave_out=False,
    )


def message_s(link: Link, num_bytes: int) -> float:
    """Seconds of a message with an array of so many bytes, the program's own included."""
    return PROGRAM_HOP_S + link.seconds(num_bytes)


def group_hop_s(a: Sequence[int], b: Sequence[int], links: Links, num_bytes: int) -> float:
    """Seconds from the ranks `a` to `b`, of which each is sent all of it by one of the others."""
    return max(message_s(links[a[place % len(a)]][rank], num_bytes) for place, rank in enumerate(b))


def overhead_bytes(costs: ModelCosts) -> int:
    """What a process takes beside weights and caches: its runtime, and a chunk's activations."""
    return RUNTIME_BYTES + _LIVE_HIDDEN_STATES * PREFILL_CHUNK * costs.hidden_bytes


def kv_bytes(costs: ModelCosts, start: int, end: int, workload: Workload) -> int:
    """What all sequences take at their longest. A window holds a chunk more while one goes in."""
    return workload.num_sequences * sum(
        layer.kv.bytes_for(workload.context_tokens, slack=PREFILL_CHUNK)
        for layer in costs.layers[start:end]
    )


class _Demand:
    """What stages ask of one machine: memory, and seconds of a step."""

    def __init__(
        self, machine: Machine, costs: ModelCosts, workload: Workload, shape: StepShape
    ) -> None:
        self.usable_bytes = machine.usable_bytes
        self._num_layers = costs.num_layers
        self._overhead_bytes = overhead_bytes(costs)
        self._weights_bytes = _weights(costs)
        self._kv_bytes = _sums(
            [kv_bytes(costs, i, i + 1, workload) for i in range(len(costs.layers))]
        )
        self._layers_s = _sums(
            [layer_time(machine.speeds, layer, shape).total_s for layer in costs.layers]
        )
        self._head_s = head_time(machine.speeds, costs, shape).total_s

    def bytes(self, start: int, end: int) -> int:
        cached_bytes = int(self._kv_bytes[end] - self._kv_bytes[start])
        return self._weights_bytes(start, end) + cached_bytes + self._overhead_bytes

    def seconds(self, start: int, end: int) -> float:
        seconds = self._layers_s[end] - self._layers_s[start]
        return seconds + self._head_s if end == self._num_layers else seconds


class _Together:
    """Seconds of a group's collectives in a step."""

    def __init__(self, collectives: Collectives, costs: ModelCosts, shape: StepShape) -> None:
        self._num_layers = costs.num_layers
        self._layers_s = _sums([collectives.sums_s(layer.sums, shape) for layer in costs.layers])
        self._entry_s = collectives.sums_s(costs.entry_sums, shape)
        self._exit_s = collectives.logits_s(costs, shape)
        self._plan_s = collectives.plan_s

    def seconds(self, start: int, end: int) -> float:
        seconds = self._plan_s + self._layers_s[end] - self._layers_s[start]
        seconds += self._entry_s if start == 0 else 0.0
        return seconds + (self._exit_s if end == self._num_layers else 0.0)


def _step(workload: Workload, objective: Objective, num_stages: int) -> StepShape:
    num_sequences = 1
    if objective is Objective.throughput:
        num_sequences = -(-workload.num_sequences // num_stages)
    return StepShape(num_sequences, 1, workload.context_tokens // 2, num_sequences)


def _weights(costs: ModelCosts) -> Callable[[int, int], int]:
    """As `costs.weights_bytes`, for many ranges of layers."""
    sums = _sums([layer.weights_bytes for layer in costs.layers])
    outside = [(part.weights_bytes, sorted(part.users)) for part in costs.outside]
    num_layers = costs.num_layers

    def weights_bytes(start: int, end: int) -> int:
        first = -1 if start == 0 else start
        last = num_layers if end == num_layers else end - 1
        held = int(sums[end] - sums[start])
        for part_bytes, users in outside:
            place = bisect_left(users, first)
            if place < len(users) and users[place] <= last:
                held += part_bytes
        return held

    return weights_bytes


def _sums(values: Sequence[float]) -> list[float]:
    """The sums of the first 0, 1, 2, ... values."""
    return list(accumulate(values, initial=0))
