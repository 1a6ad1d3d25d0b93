"""What a placement will do, before a byte of the model is loaded. Pure: knows numbers only.

A token of a single stream goes through all stages and hops in turn; with several microbatches in
flight the slowest of them sets the pace. docs/plans.md says how far the predictions are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_dist.cluster import limits
from mlx_dist.cluster.costs import Machine, ModelCosts, Workload
from mlx_dist.cluster.limits import Turn
from mlx_dist.cluster.placement import WHOLE, Share, Slice
from mlx_dist.cluster.problems import (
    PREFILL_CHUNK,
    PROGRAM_HOP_S,
    Links,
    group_hop_s,
    kv_bytes,
    message_s,
    overhead_bytes,
)
from mlx_dist.cluster.steps import Seconds, StepShape, stage_time
from mlx_dist.cluster.sums import Collectives, Curve, collectives

# Of a group's machines, so many are named.
_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage, or a machine's part of it: `layers` [start, end), and what it holds of them.

    `kv_bytes` are those of all sequences at their longest, `overhead_bytes` what a process takes
    beside weights and caches, `headroom_bytes` what is left. `step_s` is for a single sequence,
    and `collectives_s` what of it are the collectives of a tensor group.
    """

    machine: int
    name: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    headroom_bytes: int
    step_s: float
    slice: Slice = WHOLE
    collectives_s: float = 0.0


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
    *,
    slices: Mapping[Slice, ModelCosts] | None = None,
    sums: Mapping[int, Curve] | None = None,
) -> Prediction:
    """What `placement` does with `workload`; links[a][b] is from machine a to machine b.

    Rates are those of sequences with `cached_tokens`, by default half of the context: the mean
    over a sequence that fills it. Prompts go in chunks of `chunk` tokens. `slices` are the costs
    of the slices that there are, and `sums` what was measured of sums, by the number of ranks.
    """
    if cached_tokens is None:
        cached_tokens = workload.context_tokens // 2
    slices = {} if slices is None else slices
    stages = tuple(
        _Stage(
            shares,
            tuple(machines[share.machine] for share in shares),
            tuple(slices.get(share.slice, costs) for share in shares),
            group_collectives([share.machine for share in shares], links, sums or {}),
        )
        for shares in _by_stage(placement)
    )
    pipe = _Pipe(costs, stages, links)
    together = pipe.best_turn(workload.num_sequences, cached_tokens)
    return Prediction(
        stages=tuple(
            forecast for stage in stages for forecast in stage.forecasts(workload, cached_tokens)
        ),
        cached_tokens=cached_tokens,
        stream_tokens_per_s=pipe.best_turn(1, cached_tokens).tokens_per_s,
        num_sequences=workload.num_sequences,
        num_microbatches=together.num_microbatches,
        total_tokens_per_s=together.tokens_per_s,
        ttft_s={n: pipe.prompt_s(n, chunk) for n in workload.prompt_tokens},
        limit=limits.limit_of(together, [stage.name for stage in stages]),
    )


def group_collectives(ranks: Sequence[int], links: Links, sums: Mapping[int, Curve]) -> Collectives:
    """The collectives of a group of `ranks`, which are sent every plan by the first of them."""
    # A plan is one of the two messages of a hop.
    return collectives(ranks, links, sums, PROGRAM_HOP_S / 2)


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


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage: the shares of a machine or of a tensor group, their machines and their costs."""

    shares: tuple[Share, ...]
    machines: tuple[Machine, ...]
    costs: tuple[ModelCosts, ...]
    collectives: Collectives = field(default_factory=Collectives)

    @property
    def name(self) -> str:
        first, *others = [machine.name for machine in self.machines]
        if len(others) < _MOST_NAMES:
            return " and ".join([", ".join([first, *others[:-1]]), *others[-1:]])
        return f"{first} and {len(others)} more"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(share.machine for share in self.shares)

    def seconds(self, shape: StepShape) -> Seconds:
        """A step of the slowest machine, and the collectives."""
        return max((self._own(place, shape) for place in range(len(self.shares))), key=_total_s)

    def forecasts(self, workload: Workload, cached_tokens: int) -> list[StageForecast]:
        """What each machine holds and does."""
        found = []
        for place, (share, machine, costs) in enumerate(
            zip(self.shares, self.machines, self.costs, strict=True)
        ):
            start, end = share.start, share.end
            cached_bytes = kv_bytes(costs, start, end, workload)
            held_bytes = costs.weights_bytes(start, end) + cached_bytes + overhead_bytes(costs)
            seconds = self._own(place, StepShape(1, 1, cached_tokens, 1))
            found.append(
                StageForecast(
                    machine=share.machine,
                    name=machine.name,
                    layers=(start, end),
                    weights_bytes=costs.weights_bytes(start, end),
                    kv_bytes=cached_bytes,
                    overhead_bytes=overhead_bytes(costs),
                    headroom_bytes=machine.usable_bytes - held_bytes,
                    step_s=seconds.total_s,
                    slice=share.slice,
                    collectives_s=seconds.collectives_s,
                )
            )
        return found

    def _own(self, place: int, shape: StepShape) -> Seconds:
        share, costs = self.shares[place], self.costs[place]
        own = stage_time(self.machines[place].speeds, costs, share.start, share.end, shape)
        together_s = self.collectives.step_s(costs, share.start, share.end, shape)
        return own + Seconds(collectives_s=together_s)


def _total_s(seconds: Seconds) -> float:
    return seconds.total_s


def _by_stage(placement: Sequence[Share]) -> list[tuple[Share, ...]]:
    """The shares of each stage."""
    starts = [i for i, share in enumerate(placement) if share.slice.place == 0]
    return [tuple(placement[a:b]) for a, b in pairwise([*starts, len(placement)])]


@dataclass(frozen=True, slots=True)
class _Pipe:
    """The stages of a placement, one after the other, and the links between them."""

    costs: ModelCosts
    stages: tuple[_Stage, ...]
    links: Links

    def best_turn(self, num_sequences: int, cached_tokens: int) -> Turn:
        """The turn that serves most tokens a second, with as few microbatches as that takes."""
        most = min(len(self.stages), num_sequences)
        turns = [self._turn(num_sequences, m, cached_tokens) for m in range(1, most + 1)]
        return max(turns, key=lambda turn: (turn.tokens_per_s, -turn.num_microbatches))

    def prompt_s(self, num_tokens: int, chunk: int) -> float:
        """Seconds to the first token of a prompt, in the idle pipe.

        All but the prompt's last token go in chunks, and the last one like those that follow it. A
        stage works on a step while the stage before works on the next.
        """
        starts = range(0, num_tokens - 1, chunk)
        steps = [StepShape(1, min(chunk, num_tokens - 1 - start), start, 0) for start in starts]
        stages_free_s = [0.0] * len(self.stages)
        links_free_s = [0.0] * len(self.stages)
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
        busy = [Seconds()] * len(self.stages)
        links_s = [0.0] * len(self.stages)
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
        return [stage.seconds(shape) for stage in self.stages]

    def _hops_s(self, num_tokens: int) -> list[float]:
        """Seconds from each stage to the next one and, of tokens, from the last to the first."""
        num_bytes = self.costs.hidden_bytes * num_tokens
        order = [stage.ranks for stage in self.stages]
        hops_s = [group_hop_s(a, b, self.links, num_bytes) for a, b in pairwise(order)]
        # In a world of one nothing is sent.
        back_s = message_s(self.links[order[-1][0]][order[0][0]], 0) if hops_s else 0.0
        return [*hops_s, back_s]
