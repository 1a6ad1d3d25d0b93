"""`mlx-dist bench`: prompt and generation speed of the running placement on random tokens."""

from __future__ import annotations

import time
from dataclasses import asdict, astuple, dataclass
from functools import partial
from statistics import mean

import numpy as np

from mlx_dist import display
from mlx_dist.cluster.costs import Workload
from mlx_dist.cluster.prediction import Prediction
from mlx_dist.config import RunConfig
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.leader import Leader
from mlx_dist.engine.program import Rank
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.engine.session import open_session
from mlx_dist.errors import RequestError
from mlx_dist.messages import Report, Sampling

# Streams that began first go on while prompts of others are taken.
_LONGER = 4


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured: `num_streams` prompts at once of `prompt_tokens` random tokens each."""

    prompt_tokens: int
    generation_tokens: int
    num_streams: int = 1
    num_trials: int = 3

    @property
    def most_tokens(self) -> int:
        """The most that a stream generates before the last one is done."""
        return self.generation_tokens * (1 if self.num_streams == 1 else _LONGER)

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.most_tokens

    @property
    def workload(self) -> Workload:
        prompts = self.num_streams * self.prompt_tokens
        return Workload(self.context_tokens, self.num_streams, (prompts,))

    def batching(self, num_stages: int, config: RunConfig) -> Batching:
        """A microbatch for every stage."""
        num_microbatches = min(num_stages, self.num_streams)
        size = -(-self.num_streams // num_microbatches)
        return Batching(num_microbatches, size, config.prefill_chunk)


@dataclass(frozen=True, slots=True)
class Trial:
    """One repetition: seconds until every stream has its first token, and tokens a second.

    Those of prompts count until then, those generated from then until the first stream ends.
    """

    ttft_s: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


def run_bench(config: RunConfig, blas: str, load: Load, as_json: bool) -> None:
    """The program of every rank: one unmeasured repetition, then measured ones, as predicted."""
    with open_session(config, blas) as session:
        world = session.world
        with world.agreement():
            if session.tokenizer is not None:
                _check_context(session.tokenizer.context_tokens, load)
        case = session.case(load.workload, is_fresh=True)
        with display.progress_bar("loading", world.is_leader, in_bytes=True) as progress:
            rank = session.load(progress)
        loaded = session.reports(rank)
        trials: list[Trial] = []
        start = time.perf_counter()
        if isinstance(rank, Rank) and world.is_leader:
            leader = session.leader(rank, loaded, load.batching(len(session.layout.pipe), config))
            random = np.random.default_rng(0)
            for _ in range(load.num_trials + 1):
                shape = load.num_streams, load.prompt_tokens
                prompts = random.integers(0, rank.stage.vocab_size, shape).tolist()
                requests = [Request(tuple(p), load.most_tokens, Sampling()) for p in prompts]
                trials.append(_measure(leader, requests, load.generation_tokens))
            leader.shutdown()
        else:
            rank.follow()
        wall_s = time.perf_counter() - start
        reports = session.reports(rank)
    if case is not None:
        _show(load, trials[1:], case.predicted(session.layout.shares), reports, wall_s, as_json)


def _measure(leader: Leader, requests: list[Request], generation_tokens: int) -> Trial:
    """All `requests` begin together, and all end when the last has its `generation_tokens`."""
    times: list[list[float]] = [[] for _ in requests]
    ended: list[Event] = []

    def deliver(event: Event, own: list[float]) -> None:
        if event.token is not None:
            own.append(time.perf_counter())
        if event.finish_reason is not None:
            ended.append(event)

    start = time.perf_counter()
    ids = leader.submit(requests, [partial(deliver, own=own) for own in times])
    while not ended and min(map(len, times)) < generation_tokens:
        leader.turn()
    for request_id in ids:
        leader.end(request_id)
    while len(ended) < len(requests):
        leader.turn()
    begun, over = max(own[0] for own in times), min(own[-1] for own in times)
    num_between = sum(begun < moment <= over for own in times for moment in own)
    prompt_tokens = sum(len(request.prompt) for request in requests)
    return Trial(begun - start, prompt_tokens / (begun - start), num_between / (over - begun))


def _check_context(context_tokens: int | None, load: Load) -> None:
    if context_tokens is not None and load.context_tokens > context_tokens:
        raise RequestError(
            f"-p {load.prompt_tokens} and -g {load.generation_tokens} for {load.num_streams} "
            f"streams come to {load.context_tokens} tokens and the model takes {context_tokens}; "
            "use less"
        )


def _show(
    load: Load,
    trials: list[Trial],
    forecast: Prediction,
    reports: list[Report],
    wall_s: float,
    as_json: bool,
) -> None:
    average = Trial(*(mean(column) for column in zip(*map(astuple, trials), strict=True)))
    predicted = _predicted(load, forecast)
    if as_json:
        display.print_json(
            {
                **asdict(load),
                "trials": [asdict(trial) for trial in trials],
                "mean": asdict(average),
                "predicted": asdict(predicted),
                "limit": forecast.limit,
                "wall_s": wall_s,
                "ranks": display.rank_objects(reports),
            }
        )
        return
    for i, trial in enumerate(trials, 1):
        print(f"trial {i}:   {_words(trial)}")
    print(f"mean:      {_words(average)}")
    print(f"predicted: {_words(predicted)}; limited by {forecast.limit}", flush=True)
    sent = ", ".join(f"rank {report.rank} {report.sent_bytes:,}" for report in reports)
    display.rank_table(reports, f"{wall_s:.1f} s in all; bytes of activations sent: {sent}")


def _predicted(load: Load, forecast: Prediction) -> Trial:
    """The forecast as a trial. Prompts of several streams share steps, as one long prompt would."""
    [(num_tokens, ttft_s)] = forecast.ttft_s.items()
    return Trial(ttft_s, num_tokens / ttft_s, forecast.total_tokens_per_s)


def _words(trial: Trial) -> str:
    return (
        f"prompt {trial.prompt_tokens_per_s:.1f} tokens/s, "
        f"generation {trial.generation_tokens_per_s:.1f} tokens/s, "
        f"first token after {trial.ttft_s * 1e3:.0f} ms"
    )
