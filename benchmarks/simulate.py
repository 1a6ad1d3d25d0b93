"""The scheduler on ranks that only take time: what it makes of a load, without a model.

    python -m benchmarks.simulate [--stages 2,4,8]

The real scheduler plans; every stage is a queue that works off steps in the order of planning,
each in the time its size is given; the leader does as `mlx_dist.engine.leader.Leader`: it takes
the answers that have come, runs its own stage for the next plan, and waits when there is none.
Prints a markdown table.
"""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random

from mlx_dist.engine.batching import Batching, StepTimes, choose, interpolate
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.messages import KvCost, Sampling, Step, Tokens, Vitals

StepCost = Callable[[Step], tuple[float, ...]]


@dataclass(slots=True)
class Stream:
    """One request's life: when it came, when each of its tokens did."""

    prompt_tokens: int
    max_tokens: int
    begin_s: float
    tokens_s: list[float] = field(default_factory=list)
    is_over: bool = False

    @property
    def ttft_s(self) -> float:
        return self.tokens_s[0] - self.begin_s

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """From token to token, of those that came in [start_s, end_s)."""
        pairs = pairwise(self.tokens_s)
        return [right - left for left, right in pairs if start_s <= right < end_s]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes; once it is over, another like it comes if the loop `is_closed`."""

    at_s: float
    prompt_tokens: int
    max_tokens: int
    is_closed: bool = False


def step_cost(times: StepTimes) -> StepCost:
    """What steps take by the times that the scheduler is given."""

    def cost(step: Step) -> tuple[float, ...]:
        num_rows, num_tokens = step.shape
        num_cached = max(row.position for row in step.rows)
        if num_tokens > 1:
            return times.prefill_stages_s(num_rows * num_tokens, num_cached)
        # All rows are padded to the longest.
        scores_s = [num_rows * num_cached * each_s for each_s in times.score_s]
        stages_s = interpolate(times.decode, num_rows)
        return tuple(map(sum, zip(stages_s, scores_s, strict=True))) if scores_s else stages_s

    return cost


class Simulation:
    """`arrivals` served by `num_stages` ranks until `end_s`. `streams` are in order of arrival."""

    def __init__(
        self,
        num_stages: int,
        batching: Batching,
        cost: StepCost,
        hop_s: float,
        arrivals: Iterable[Arrival],
        end_s: float,
    ) -> None:
        ledger = KvLedger([KvRoom(KvCost(0, [(1, None)]), 1 << 50)] * num_stages, slack=0)
        self.scheduler = Scheduler(batching, ledger, num_stages, max_queue=1 << 20)
        self.streams: list[Stream] = []
        self.steps: list[tuple[float, Step]] = []  # when each began on the first stage
        self.busy_s = [0.0] * num_stages
        self._cost = cost
        self._hop_s = hop_s
        self._free_s = [0.0] * num_stages
        self._answers: deque[tuple[float, Tokens]] = deque()
        self._ties = count()
        self._coming = [(arrival.at_s, next(self._ties), arrival) for arrival in arrivals]
        heapq.heapify(self._coming)
        self._of_id: dict[int, tuple[Stream, Arrival]] = {}
        self._run(end_s)

    def rate(self, start_s: float, end_s: float) -> float:
        """Tokens a second in [start_s, end_s)."""
        num = sum(start_s <= at_s < end_s for s in self.streams for at_s in s.tokens_s)
        return num / (end_s - start_s)

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """All streams' gaps between tokens that ended in [start_s, end_s), shortest first."""
        return sorted(gap for s in self.streams for gap in s.gaps_s(start_s, end_s))

    def ttfts_s(self, start_s: float, end_s: float) -> list[float]:
        """Seconds to the first token of requests that came in [start_s, end_s), least first."""
        came = (s for s in self.streams if start_s <= s.begin_s < end_s and s.tokens_s)
        return sorted(s.ttft_s for s in came)

    def _run(self, end_s: float) -> None:
        now_s = 0.0
        while now_s < end_s:
            while self._coming and self._coming[0][0] <= now_s:
                self._submit(heapq.heappop(self._coming)[2], now_s)
            while self._answers and self._answers[0][0] <= now_s:
                self.scheduler.accept(self._answers.popleft()[1])
            plan = self.scheduler.next_plan()
            self._hear(now_s)
            if isinstance(plan, Step):
                now_s = self._step(plan, now_s)
            elif plan is None:
                next_s = self._coming[0][0] if self._coming else end_s
                if self._answers and self._answers[0][0] <= max(now_s, next_s):
                    at_s, tokens = self._answers.popleft()
                    now_s = max(now_s, at_s)
                    self.scheduler.accept(tokens)
                    self._hear(now_s)
                else:
                    now_s = max(now_s, next_s)

    def _submit(self, arrival: Arrival, now_s: float) -> None:
        stream = Stream(arrival.prompt_tokens, arrival.max_tokens, now_s)
        self.streams.append(stream)
        request = Request((0,) * arrival.prompt_tokens, arrival.max_tokens, Sampling())
        self._of_id[self.scheduler.submit(request)] = stream, arrival

    def _step(self, step: Step, now_s: float) -> float:
        """Send `step` down the pipe; when the first stage is done with it."""
        seconds = self._cost(step)
        self.steps.append((now_s, step))
        arrived_s = now_s
        for i, stage_s in enumerate(seconds):
            self._free_s[i] = max(self._free_s[i], arrived_s) + stage_s
            self.busy_s[i] += stage_s
            arrived_s = self._free_s[i] + self._hop_s
        tokens = [0] * len(step.rows) if step.sample else []
        vitals = [Vitals(stage_s, 0, 0, 0) for stage_s in seconds]
        self._answers.append((arrived_s, Tokens(step.microbatch, tokens, [], vitals)))
        return self._free_s[0]

    def _hear(self, now_s: float) -> None:
        for event in self.scheduler.take_events():
            self._tell(event, now_s)

    def _tell(self, event: Event, now_s: float) -> None:
        stream, arrival = self._of_id[event.request_id]
        if event.token is not None:
            stream.tokens_s.append(now_s)
        if event.finish_reason is not None:
            stream.is_over = True
            if arrival.is_closed:
                heapq.heappush(self._coming, (now_s, next(self._ties), arrival))


def closed_loop(num_streams: int, prompt_tokens: int, max_tokens: int) -> list[Arrival]:
    """Clients that ask again as soon as they have their answer."""
    return [Arrival(0.0, prompt_tokens, max_tokens, is_closed=True)] * num_streams


def poisson(
    rate: float, end_s: float, prompt_tokens: int, max_tokens: int, seed: int = 0
) -> list[Arrival]:
    """Requests that come at random, `rate` a second on average."""
    random, at_s, arrivals = Random(seed), 0.0, []
    while (at_s := at_s + random.expovariate(rate)) < end_s:
        arrivals.append(Arrival(at_s, prompt_tokens, max_tokens))
    return arrivals


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, that which `percent` of them do not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def even_times(num_stages: int, hop_s: float) -> StepTimes:
    """Stages that are all alike: a step costs 10 ms, and 0.5 ms for each token."""
    sizes = [1 << i for i in range(10)]
    curve = {size: (0.010 + 0.0005 * size,) * num_stages for size in sizes}
    return StepTimes(curve, curve, hop_s * num_stages)


@dataclass(frozen=True, slots=True)
class Steady:
    """Full microbatches that only decode: tokens a second, and what the bound allows."""

    rate: float
    bound: float


def steady_decode(
    times: StepTimes, num_stages: int, num_microbatches: int, size: int, hop_s: float
) -> Steady:
    """As many endless streams as there are places, once all have entered."""
    batching = Batching(num_microbatches, size, times=times)
    arrivals = [Arrival(0.0, 2, 1 << 20)] * (num_microbatches * size)
    end_s = 200 * num_microbatches * times.decode_s(size)
    sim = Simulation(num_stages, batching, step_cost(times), hop_s, arrivals, end_s)
    bound = times.tokens_per_s(num_microbatches, size)
    return Steady(sim.rate(end_s / 2, end_s), bound)


@dataclass(frozen=True, slots=True)
class Intrusion:
    """Streams that decode when a long prompt comes: their gaps before and while it is computed."""

    median_before_s: float
    p99_during_s: float
    ttft_s: float


def long_prompt(
    times: StepTimes,
    num_stages: int,
    batching: Batching,
    hop_s: float,
    num_streams: int = 8,
    prompt_tokens: int = 2048,
) -> Intrusion:
    """`num_streams` decode all the time; a long prompt comes at second 10."""
    arrivals = [Arrival(0.0, 32, 1 << 20)] * num_streams + [Arrival(10.0, prompt_tokens, 8)]
    sim = Simulation(num_stages, batching, step_cost(times), hop_s, arrivals, end_s=60.0)
    long = sim.streams[-1]
    first_s = long.tokens_s[0]
    before, during = sim.gaps_s(5.0, 10.0), sim.gaps_s(10.0, first_s)
    return Intrusion(percentile(before, 50), percentile(during, 99), long.ttft_s)


def main() -> None:
    """Print what the scheduler makes of a few loads at each number of stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default="2,4,8", help="how many, separated by commas")
    parser.add_argument("--hop-ms", type=float, default=1.0, help="from a stage to the next")
    args = parser.parse_args()
    hop_s = args.hop_ms / 1e3
    print(
        "| stages | microbatches | of | tokens/s | of the bound "
        "| gap p50, p99 ms | TTFT p50, p99 ms | long prompt: gap p99, of the median before "
        "| its first token, of that alone |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for num_stages in map(int, args.stages.split(",")):
        print(_row(num_stages, hop_s))


def _row(num_stages: int, hop_s: float) -> str:
    times = even_times(num_stages, hop_s)
    batching = choose(times, num_stages, most_sequences=16)
    num_microbatches, size = batching.num_microbatches, batching.max_sequences
    steady = steady_decode(times, num_stages, num_microbatches, size, hop_s)
    # Keeps the stages about half busy.
    rate = 0.5 / (64 / steady.bound + max(times.prefill[128]))
    arrivals = poisson(rate, 60.0, prompt_tokens=128, max_tokens=64)
    sim = Simulation(num_stages, batching, step_cost(times), hop_s, arrivals, end_s=60.0)
    gaps, ttfts = sim.gaps_s(10.0, 50.0), sim.ttfts_s(10.0, 50.0)
    intrusion = long_prompt(times, num_stages, batching, hop_s)
    pairs = [
        ", ".join(f"{percentile(values, percent) * 1e3:.0f}" for percent in (50, 99))
        for values in (gaps, ttfts)
    ]
    return (
        f"| {num_stages} | {num_microbatches} | {size} | {steady.rate:.0f} "
        f"| {steady.rate / steady.bound:.1%} | {pairs[0]} | {pairs[1]} "
        f"| {intrusion.p99_during_s * 1e3:.0f} ms, "
        f"{intrusion.p99_during_s / intrusion.median_before_s:.2f} "
        f"| {intrusion.ttft_s / times.prompt_s(2048, batching.prefill_chunk):.1f} |"
    )


if __name__ == "__main__":
    main()
