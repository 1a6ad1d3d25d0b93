"""`mlx-dist generate`: one prompt, its text, and how fast it came."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mlx_dist import display
from mlx_dist.config import RunConfig
from mlx_dist.engine.program import Leader, Rank
from mlx_dist.engine.scheduler import Request
from mlx_dist.engine.session import Session, open_session
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import RequestError
from mlx_dist.messages import Report, Sampling

_RANK_FIELDS = ("rank", "host", "layers", "weights_bytes", "peak_rss_bytes", "load_s")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asks for. `chat` None is a chat where the model has a template."""

    prompt: str
    chat: bool | None
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]

    def request(self, tokenizer: Tokenizer) -> Request:
        """This as tokens. Raises RequestError if it cannot be served."""
        tokens = tokenizer.encode_prompt(self.prompt, self.chat)
        max_tokens = tokenizer.limit(tokens, self.max_tokens)
        return Request(tokens, max_tokens, self.sampling, tokenizer.stop_tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request, and when. Rates count what the clock saw, in tokens a second."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    ttft_s: float
    prompt_tokens_per_s: float
    tokens_per_s: float


def run_generate(config: RunConfig, blas: str, wanted: Wanted, as_json: bool) -> None:
    """The program of every rank. Raises AgreedError on all of them if any cannot take part."""
    with open_session(config, blas) as session:
        world = session.world
        request = None
        with world.agreement():
            if session.tokenizer is not None:
                request = wanted.request(session.tokenizer)
        with display.progress_bar("loading", world.is_leader, in_bytes=True) as progress:
            rank = session.load(progress)
        with world.agreement():
            if request is not None:
                _check_ids(request.sampling, rank.stage.vocab_size)
        answer = None
        if session.tokenizer is not None and request is not None:
            answer = _answer(session, rank, request, wanted.stop, is_streamed=not as_json)
        else:
            rank.follow()
        reports = session.reports(rank)
    if answer is not None:
        _show(answer, reports, as_json)


def _answer(
    session: Session, rank: Rank, request: Request, stop: tuple[str, ...], is_streamed: bool
) -> Answer:
    assert session.tokenizer is not None
    leader = Leader(rank, session.config.prefill_chunk)
    stream = session.tokenizer.text_stream(stop)
    pieces: list[str] = []
    times = [time.perf_counter()]

    def show(piece: str) -> None:
        pieces.append(piece)
        if is_streamed and piece:
            display.write_text(piece)

    with display.progress_bar("prompt", is_shown=True) as progress:
        leader.on_prefill = progress
        tokens = leader.stream(request)
        first = next(tokens, None)
        times.append(time.perf_counter())
    if first is not None:
        show(stream.add(first))
        if stream.is_stopped:
            leader.stop()
    for token in tokens:
        times.append(time.perf_counter())
        show(stream.add(token))
        if stream.is_stopped:
            leader.stop()
    show(stream.finish())
    leader.shutdown()
    if is_streamed:
        display.write_text("\n")
    num_tokens = len(times) - 1 if first is not None else 0
    ttft_s = times[1] - times[0]
    return Answer(
        text="".join(pieces),
        prompt_tokens=len(request.prompt),
        completion_tokens=num_tokens,
        finish_reason="stop" if stream.is_stopped else leader.finish_reason,
        ttft_s=ttft_s,
        prompt_tokens_per_s=len(request.prompt) / ttft_s,
        tokens_per_s=(num_tokens - 1) / (times[-1] - times[1]) if num_tokens > 1 else 0.0,
    )


def _check_ids(sampling: Sampling, vocab_size: int) -> None:
    for token in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"--logit-bias names token {token} and the model has ids 0 to {vocab_size - 1}"
            )


def _show(answer: Answer, reports: list[Report], as_json: bool) -> None:
    if as_json:
        fields = {name: getattr(answer, name) for name in answer.__slots__}
        display.print_json(fields | {"ranks": display.rank_objects(reports, _RANK_FIELDS)})
        return
    display.rank_table(
        reports,
        f"{answer.prompt_tokens} prompt tokens at {answer.prompt_tokens_per_s:.1f}/s, "
        f"first token after {answer.ttft_s:.2f} s, {answer.completion_tokens} tokens at "
        f"{answer.tokens_per_s:.1f}/s, ended by {answer.finish_reason}",
    )
