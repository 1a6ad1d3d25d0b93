"""What a placement will do, before a byte of the model is loaded. Pure: knows numbers only.

A token of a single stream goes through all stages and hops in turn; with several microbatches in
flight the slowest of them sets the pace. docs/plans.md says how far the predictions are off.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mlx_dist.cluster import limits
from mlx_dist.cluster.costs import Link, Machine, ModelCosts, Workload
from mlx_dist.cluster.limits import Turn
from mlx_dist.cluster.placement import Problem, Share
from mlx_dist.cluster.steps import Seconds, StepShape, head_time, layer_time, stage_time
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
_PROGRAM_HOP_S = 280e-6

Links = Sequence[Sequence[Link]]


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage: `layers` [start, end) on machine number `machine`, and what it holds.

    `kv_bytes` are those of all sequences at their longest, `overhead_bytes` what a process takes
    beside weights and caches, `headroom_bytes` what is left. `step_s` is for a single sequence.
    """

    machine: int
    name: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    headroom_bytes: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a placement does: tokens a second of one stream, and of `num_sequences` together.

    Each sequence has `cached_tokens`. `ttft_s` is the time to the first token, in an idle pipe, by
    the length of the prompt. `limit` says what bounds the rate of `num_sequences`.
    """

    stages: tuple[StageForecast, ...]
    cached_tokens: int
    stream_tokens_per_s: float
    num_sequences: int
    num_microbatches: int
    total_tokens_per_s: float
    ttft_s: dict[int, float]
    limit: str


def predict(
    costs: ModelCosts,
    machines: Sequence[Machine],
    links: Links,
    placement: Sequence[Share],
    workload: Workload,
    cached_tokens: int | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Prediction:
    """What `placement` does with `workload`; links[a][b] is from machine a to machine b.

    Rates are those of sequences with `cached_tokens`, by default half of the context: the mean
    over a sequence that fills it. Prompts go in chunks of `chunk` tokens.
    """
    if cached_tokens is None:
        cached_tokens = workload.context_tokens // 2
    pipe = _Pipe(costs, machines, links, tuple(placement))
    together = pipe.best_turn(workload.num_sequences, cached_tokens)
    return Prediction(
        stages=tuple(
            _stage_forecast(costs, machines[share.machine], share, workload, cached_tokens)
            for share in placement
        ),
        cached_tokens=cached_tokens,
        stream_tokens_per_s=pipe.best_turn(1, cached_tokens).tokens_per_s,
        num_sequences=workload.num_sequences,
        num_microbatches=together.num_microbatches,
        total_tokens_per_s=together.tokens_per_s,
        ttft_s={n: pipe.prompt_s(n, chunk) for n in workload.prompt_tokens},
        limit=limits.limit_of(together, [machines[share.machine].name for share in placement]),
    )


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
) -> Problem:
    """The placement problem of these machines, each with room for all sequences at their longest.

    A step has one sequence, or for throughput the share of a microbatch for every machine.
    """
    num_sequences = 1
    if objective is Objective.throughput:
        num_sequences = -(-workload.num_sequences // len(machines))
    shape = StepShape(num_sequences, 1, workload.context_tokens // 2, num_sequences)
    # Sums over many ranges of layers are asked for: differences of sums from the first layer on.
    kv_bytes = _sums([_kv_bytes(costs, i, i + 1, workload) for i in range(costs.num_layers)])
    layers_s = [
        _sums([layer_time(m.speeds, layer, shape).total_s for layer in costs.layers])
        for m in machines
    ]
    heads_s = [head_time(m.speeds, costs, shape).total_s for m in machines]
    weights_bytes = _weights(costs)

    def stage_bytes(_machine: int, start: int, end: int) -> int:
        held_bytes = weights_bytes(start, end) + int(kv_bytes[end] - kv_bytes[start])
        return held_bytes + overhead_bytes(costs)

    def seconds(machine: int, start: int, end: int) -> float:
        layers = layers_s[machine][end] - layers_s[machine][start]
        return layers + heads_s[machine] if end == costs.num_layers else layers

    return Problem(
        num_layers=costs.num_layers,
        capacity_bytes=tuple(machine.usable_bytes for machine in machines),
        stage_bytes=stage_bytes,
        stage_s=seconds,
        hop_s=lambda a, b: _hop_s(links[a][b], costs.hidden_bytes * num_sequences),
        names=tuple(machine.name for machine in machines),
        leader=leader,
        is_order_fixed=is_order_fixed,
        may_leave_out=may_leave_out,
        remedies=remedies,
    )


def stage_s(
    machine: Machine,
    costs: ModelCosts,
    start: int,
    end: int,
    num_sequences: int,
    tokens_each: int,
    cached_tokens: int,
) -> float:
    """Seconds of the stage [start, end) for new tokens of sequences with `cached_tokens` each.

    One token of each sequence is sampled.
    """
    shape = StepShape(num_sequences, tokens_each, cached_tokens, num_sequences)
    return stage_time(machine.speeds, costs, start, end, shape).total_s


def overhead_bytes(costs: ModelCosts) -> int:
    """What a process takes beside weights and caches: its runtime, and a chunk's activations."""
    return RUNTIME_BYTES + _LIVE_HIDDEN_STATES * PREFILL_CHUNK * costs.hidden_bytes


@dataclass(frozen=True, slots=True)
class _Pipe:
    """The stages of a placement, one after the other, and the links between them."""

    costs: ModelCosts
    machines: Sequence[Machine]
    links: Links
    placement: tuple[Share, ...]

    def best_turn(self, num_sequences: int, cached_tokens: int) -> Turn:
        """The turn that serves most tokens a second, with as few microbatches as that takes."""
        most = min(len(self.placement), num_sequences)
        turns = [self._turn(num_sequences, m, cached_tokens) for m in range(1, most + 1)]
        return max(turns, key=lambda turn: (turn.tokens_per_s, -turn.num_microbatches))

    def prompt_s(self, num_tokens: int, chunk: int) -> float:
        """Seconds to the first token of a prompt, in the idle pipe.

        All but the prompt's last token go in chunks, and the last one like those that follow it. A
        stage works on a step while the stage before works on the next.
        """
        starts = range(0, num_tokens - 1, chunk)
        steps = [StepShape(1, min(chunk, num_tokens - 1 - start), start, 0) for start in starts]
        stages_free_s = [0.0] * len(self.placement)
        links_free_s = [0.0] * len(self.placement)
        now_s = 0.0
        for step in [*steps, StepShape(1, 1, num_tokens - 1, 1)]:
            hops_s = self._hops_s(step.num_tokens)
            now_s = 0.0
            for i, seconds in enumerate(self._stages(step)):
                now_s = stages_free_s[i] = max(now_s, stages_free_s[i]) + seconds.total_s
                now_s = links_free_s[i] = max(now_s, links_free_s[i]) + hops_s[i]
        return now_s

    def _turn(self, num_sequences: int, num_microbatches: int, cached_tokens: int) -> Turn:
        share, rest = divmod(num_sequences, num_microbatches)
        busy = [Seconds()] * len(self.placement)
        links_s = [0.0] * len(self.placement)
        stages: list[Seconds] = []
        hops_s: list[float] = []
        # The largest last: it is the one whose whole way is looked at.
        for size, count in ((share, num_microbatches - rest), (share + 1, rest)):
            if count:
                stages = self._stages(StepShape(size, 1, cached_tokens, size))
                hops_s = self._hops_s(size)
                busy = [a + b.times(count) for a, b in zip(busy, stages, strict=True)]
                links_s = [a + b * count for a, b in zip(links_s, hops_s, strict=True)]
        return Turn(num_sequences, num_microbatches, busy, links_s, stages, hops_s)

    def _stages(self, shape: StepShape) -> list[Seconds]:
        return [
            stage_time(self.machines[s.machine].speeds, self.costs, s.start, s.end, shape)
            for s in self.placement
        ]

    def _hops_s(self, num_tokens: int) -> list[float]:
        """Seconds from each stage to the next one and, of tokens, from the last to the first."""
        order = [share.machine for share in self.placement]
        num_bytes = self.costs.hidden_bytes * num_tokens
        hops_s = [_hop_s(self.links[a][b], num_bytes) for a, b in pairwise(order)]
        # In a world of one nothing is sent.
        return [*hops_s, _hop_s(self.links[order[-1]][order[0]], 0) if hops_s else 0.0]


def _hop_s(link: Link, num_bytes: int) -> float:
    return _PROGRAM_HOP_S + link.seconds(num_bytes)


def _stage_forecast(
    costs: ModelCosts, machine: Machine, share: Share, workload: Workload, cached_tokens: int
) -> StageForecast:
    start, end = share.start, share.end
    weights_bytes = costs.weights_bytes(start, end)
    kv_bytes = _kv_bytes(costs, start, end, workload)
    held_bytes = weights_bytes + kv_bytes + overhead_bytes(costs)
    return StageForecast(
        machine=share.machine,
        name=machine.name,
        layers=(start, end),
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        overhead_bytes=overhead_bytes(costs),
        headroom_bytes=machine.usable_bytes - held_bytes,
        step_s=stage_s(machine, costs, start, end, 1, 1, cached_tokens),
    )


def _kv_bytes(costs: ModelCosts, start: int, end: int, workload: Workload) -> int:
    """What all sequences take at their longest. A window holds a chunk more while one goes in."""
    return workload.num_sequences * sum(
        layer.kv.bytes_for(workload.context_tokens, slack=PREFILL_CHUNK)
        for layer in costs.layers[start:end]
    )


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
