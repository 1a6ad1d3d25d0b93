"""`mlx-dist bench`: prompt and generation speed of the running placement on random tokens."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np

from mlx_dist import display
from mlx_dist.config import RunConfig
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.program import Leader
from mlx_dist.engine.sequence import Request
from mlx_dist.engine.session import open_session
from mlx_dist.errors import RequestError
from mlx_dist.messages import Sampling


@dataclass(frozen=True, slots=True)
class Trial:
    """One repetition: seconds to the first token, and tokens a second before and after it."""

    ttft_s: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


def run_bench(
    config: RunConfig,
    blas: str,
    prompt_tokens: int,
    generation_tokens: int,
    num_trials: int,
    as_json: bool,
) -> None:
    """The program of every rank: one unmeasured repetition, then `num_trials` measured ones."""
    with open_session(config, blas) as session:
        world = session.world
        with world.agreement():
            if session.tokenizer is not None:
                _check_context(session.tokenizer.context_tokens, prompt_tokens, generation_tokens)
        with display.progress_bar("loading", world.is_leader, in_bytes=True) as progress:
            rank = session.load(progress)
        loaded = session.reports(rank)
        trials: list[Trial] = []
        start = time.perf_counter()
        if world.is_leader:
            leader = session.leader(rank, loaded, Batching(prefill_chunk=config.prefill_chunk))
            random = np.random.default_rng(0)
            for _ in range(num_trials + 1):
                prompt = random.integers(0, rank.stage.vocab_size, prompt_tokens).tolist()
                trials.append(
                    _measure(leader, Request(tuple(prompt), generation_tokens, Sampling()))
                )
            leader.shutdown()
        else:
            rank.follow()
        wall_s = time.perf_counter() - start
        reports = session.reports(rank)
    if not world.is_leader:
        return
    measured = trials[1:]
    average = Trial(*(mean(column) for column in zip(*map(_values, measured), strict=True)))
    if as_json:
        display.print_json(
            {
                "prompt_tokens": prompt_tokens,
                "generation_tokens": generation_tokens,
                "trials": [asdict(trial) for trial in measured],
                "mean": asdict(average),
                "wall_s": wall_s,
                "ranks": display.rank_objects(reports),
            }
        )
        return
    for i, trial in enumerate(measured, 1):
        print(f"trial {i}: {_words(trial)}")
    print(f"mean:    {_words(average)}", flush=True)
    sent = ", ".join(f"rank {report.rank} {report.sent_bytes:,}" for report in reports)
    display.rank_table(reports, f"{wall_s:.1f} s in all; bytes of activations sent: {sent}")


def _measure(leader: Leader, request: Request) -> Trial:
    times = [time.perf_counter()]
    times += [time.perf_counter() for e in leader.stream(request) if e.token is not None]
    ttft_s = times[1] - times[0]
    generation_s = times[-1] - times[1]
    return Trial(ttft_s, len(request.prompt) / ttft_s, (request.max_tokens - 1) / generation_s)


def _check_context(context_tokens: int | None, prompt: int, generation: int) -> None:
    if context_tokens is not None and prompt + generation > context_tokens:
        raise RequestError(
            f"-p {prompt} and -g {generation} are {prompt + generation} tokens and the model "
            f"takes {context_tokens}; use less"
        )


def _values(trial: Trial) -> tuple[float, float, float]:
    return trial.ttft_s, trial.prompt_tokens_per_s, trial.generation_tokens_per_s


def _words(trial: Trial) -> str:
    return (
        f"prompt {trial.prompt_tokens_per_s:.1f} tokens/s, "
        f"generation {trial.generation_tokens_per_s:.1f} tokens/s, "
        f"first token after {trial.ttft_s * 1e3:.0f} ms"
    )
