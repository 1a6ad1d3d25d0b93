"""The Python API: prompts in, text out, over all ranks. The command line and the shim use it.

    from mlx_dist import LLM

    with LLM("path/to/model") as llm:
        for text in llm.stream("Once upon a time", max_tokens=64):
            print(text, end="", flush=True)

Started with `mpirun -np 3 python program.py`, every rank builds an `LLM`. Only the first goes on
with the program; the others serve it inside the constructor and end when it is closed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

from mlx_dist.cluster import launch
from mlx_dist.cluster.blas import preload_blas
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import Workload
from mlx_dist.config import RunConfig
from mlx_dist.engine import calibrate
from mlx_dist.engine.batching import Batching, choose, parse_batching
from mlx_dist.engine.leader import Leader
from mlx_dist.engine.program import Rank
from mlx_dist.engine.sequence import Request
from mlx_dist.engine.session import Session, open_session
from mlx_dist.engine.text import ChatPrompt, Tokenizer
from mlx_dist.errors import PromptTooLongError, RequestError
from mlx_dist.messages import Report, Sampling
from mlx_dist.params import Params
from mlx_dist.serve.generation import Chunk, Completion, Generation, Usage, completion_of
from mlx_dist.serve.stats import RankInfo, Stats, stats_of

__all__ = ["LLM", "Chunk", "Completion", "Generation", "Params", "RankInfo", "Stats", "Usage"]

_MOST_SEQUENCES = 64  # in a microbatch
_MOST_UNASKED = 4096  # tokens of an answer whose length nobody bounds
_LONGEST_PROMPT = 1 << 20
# Predicted is what step times are measured for: sequences that have hardly begun.
_A_TOKEN = Workload(context_tokens=16, prompt_tokens=())

Progress = Callable[[int, int], None]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model on all ranks, open for any number of prompts at a time.

    `generate`, `stream` and `chat` run the engine themselves when they are called in the thread
    that made the LLM; in another thread they wait for one that `run`s it there.
    """

    def __init__(
        self,
        model: str | RunConfig,
        *,
        blas: str | None = None,
        progress: Progress = lambda _done, _total: None,
        before_load: Callable[[Tokenizer], None] = lambda _tokenizer: None,
        met: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """Join the other ranks and load this one's part of the model.

        `model` is a folder or a hub id, with the fields of `RunConfig` as options, or a
        `RunConfig`. On ranks but the first this serves until the first is closed, and then ends
        the process. `before_load` may refuse, on the first rank, before any weights are read; `met`
        is called on every rank when all have met.
        Raises MlxDistError, on every rank, if any rank cannot take part.
        """
        self._is_closed = False
        config = model if isinstance(model, RunConfig) else RunConfig(model, **options)
        parse_batching(config.batching)
        blas = blas or preload_blas(launch.threads_per_rank())
        with ExitStack() as stack:
            session = stack.enter_context(open_session(config, blas, met))
            with session.world.agreement():
                if session.tokenizer is not None:
                    before_load(session.tokenizer)
            # Step times are measured, too, where the batching is to be chosen.
            case = None if parse_batching(config.batching) else session.case(_A_TOKEN)
            rank = session.load(progress)
            self._reports = session.reports(rank)
            if session.tokenizer is None:
                rank.follow()
                session.reports(rank)
                stack.close()
                sys.exit(0)
            assert isinstance(rank, Rank)  # The leader holds the first stage.
            self.tokenizer = session.tokenizer
            self.name = session.files.repo or session.files.folder.name
            self.grammars = rank.grammars
            self._session, self._rank = session, rank
            self._leader = _leader(session, rank, self._reports, case)
            self._owner = threading.get_ident()
            self._stack = stack.pop_all()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._leader.is_broken:
            # A rank that stopped in the middle of a plan cannot end in order.
            self._stack.__exit__(kind, error, traceback)
        else:
            self.close()

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has: 0 to one less."""
        return self._rank.stage.vocab_size

    @property
    def reports(self) -> list[Report]:
        """Every rank's account of itself, after loading or, once closed, of the whole run."""
        return self._reports

    def close(self) -> None:
        """Let all ranks end. Answers under way are dropped."""
        if not self._is_closed:
            self._is_closed = True
            self._leader.shutdown()
            self._reports = self._session.reports(self._rank)
            self._stack.close()

    def generate(self, prompt: str, **params: Any) -> Completion:
        """The answer to `prompt` as it is, without a chat template.

        `params` are `max_tokens`, `stop` (a string or several) and the fields of `Sampling`, as
        in `temperature=0.7, seed=1`. Raises RequestError for what cannot be served.
        """
        generation = self._begin(self.tokenizer.encode_text(prompt), params)
        return completion_of(list(self.chunks(generation)))

    def stream(self, prompt: str, **params: Any) -> Iterator[str]:
        """As `generate`: the text piece by piece, as it comes."""
        generation = self._begin(self.tokenizer.encode_text(prompt), params)
        for chunk in self.chunks(generation):
            yield chunk.piece.text

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **params: Any,
    ) -> Completion:
        """The assistant's answer to `messages`, as OpenAI writes them. Raises RequestError."""
        return completion_of(list(self.stream_chat(messages, tools=tools, **params)))

    def stream_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **params: Any,
    ) -> Iterator[Chunk]:
        """As `chat`: chunks as they come, with text, reasoning and tool calls apart."""
        prompt = self.tokenizer.encode_chat(messages, tools)
        yield from self.chunks(self._begin(prompt, params, tools))

    def check_room(self, num: int) -> None:
        """Raise QueueFullError or NotReadyError if `open` would for one of the next `num` prompts.

        From any thread, at no cost, and only for the moment: `open` decides.
        """
        self._leader.scheduler.admission.check_room(num)

    def open(
        self,
        prompt: ChatPrompt | tuple[int, ...],
        params: Params,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_news: Callable[[], None] = lambda: None,
        tokens_so_far: tuple[int, ...] = (),
    ) -> Generation:
        """Begin an answer, from any thread, or go on with one that has `tokens_so_far`.

        `on_news` is called in the engine's thread whenever there is something to take, and must
        return at once. Raises RequestError for what can never be served, QueueFullError or
        NotReadyError for what cannot be served now; no rank hears of it then.
        """
        is_chat = isinstance(prompt, ChatPrompt)
        chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(prompt, ())
        params.check()
        self._check_ids(chat.tokens, params.sampling)
        self._check_so_far(tokens_so_far)
        most_tokens = self._max_tokens(chat.tokens, params.max_tokens)
        # One at least is computed: of an answer that was at its end, the last one ends it again.
        tokens_so_far = tokens_so_far[: most_tokens - 1]
        request = Request(
            chat.tokens + tokens_so_far,
            most_tokens - len(tokens_so_far),
            params.sampling,
            self.tokenizer.stop_tokens,
            chat.borders,
        )
        reader = self.tokenizer.reader(
            params.stop, tools=tools, is_chat=is_chat, prompt=chat.tokens
        )
        return Generation(reader, request, self._leader, on_news, tokens_so_far)

    def chunks(self, generation: Generation) -> Iterator[Chunk]:
        """The chunks of a generation as they come. Leaving early cancels it."""
        try:
            while not generation.is_finished:
                if chunk := generation.take():
                    yield chunk
                elif threading.get_ident() == self._owner:
                    self._leader.turn()
                else:
                    generation.wait()
        finally:
            generation.cancel()

    def run(self) -> None:
        """Serve what other threads open, until all is done after `drain`."""
        self._leader.run()

    def drain(self) -> None:
        """Take no new prompts, from any thread; `run` returns when the last is done."""
        self._leader.drain()

    def before_end(self, say: Callable[[], None]) -> None:
        """Call `say` once, for 200 ms at most, if this process ends otherwise than in order."""
        self._session.world.ending.before(say)

    def stats(self) -> Stats:
        """What is going on, in numbers, from any thread."""
        with self._leader.held():
            return stats_of(self._leader, self._reports)

    def _begin(
        self,
        prompt: ChatPrompt | tuple[int, ...],
        params: dict[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Generation:
        max_tokens, stop = params.pop("max_tokens", None), params.pop("stop", ())
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        try:
            sampling = Sampling(**params)
        except TypeError as error:
            raise RequestError(f"there is no such parameter: {error}") from None
        return self.open(prompt, Params(max_tokens, sampling, stops), tools=tools)

    def _max_tokens(self, prompt: tuple[int, ...], asked: int | None) -> int:
        """What is asked for, as far as the model's context and the KV memory leave it.

        Raises PromptTooLongError if they leave nothing.
        """
        context = self.tokenizer.context_tokens
        if context is not None and len(prompt) >= context:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens and the model takes {context} with the "
                "answer; shorten it"
            )
        limits = [] if asked is None else [asked]
        if context is not None:
            limits.append(context - len(prompt))
        if asked is None:
            most = self._leader.scheduler.ledger.most_tokens() - len(prompt)
            limits.append(max(1, min(most, _MOST_UNASKED)))
        return min(limits)

    def _check_so_far(self, tokens: tuple[int, ...]) -> None:
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise RequestError("the answer so far has a token that the model does not know")

    def _check_ids(self, prompt: tuple[int, ...], sampling: Sampling) -> None:
        vocab_size = self.vocab_size
        if not prompt:
            raise RequestError("the prompt has no tokens; give it some text")
        for name, ids in (("the prompt", prompt), ("logit_bias", sampling.logit_bias)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} names token {token} and the model has ids 0 to {vocab_size - 1}"
                    )


def _leader(session: Session, rank: Rank, reports: list[Report], case: Case | None) -> Leader:
    """A leader with the configured batching or one that is chosen by measuring."""
    config, slots = session.config, rank.stage.slots
    batching = parse_batching(config.batching) or _measured(session, rank, reports, case)
    if not slots.can_batch:
        _log(f"{session.files.name}: this family's caches cannot be batched: one sequence each")
    return session.leader(rank, reports, batching, config.max_queue, config.reuse_prefixes)


def _measured(session: Session, rank: Rank, reports: list[Report], case: Case | None) -> Batching:
    """The batching that is best by measured step times; logged beside what was predicted."""
    start = time.monotonic()
    most = _MOST_SEQUENCES if rank.stage.slots.can_batch else 1
    context_tokens = session.tokenizer.context_tokens if session.tokenizer else None
    times, is_remembered = calibrate.remembered(
        session.facts
        | {
            "layers": [(r.layers, r.slice) for r in reports],
            "hosts": session.world.hosts,
            "cores": os.cpu_count(),
            "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
            "--kv-memory-gb": session.config.kv_memory_gb,
        },
        session.leader(rank, reports, Batching()),
        most,
        context_tokens or _LONGEST_PROMPT,
        is_fresh=session.config.batching == "measure",
    )
    batching = choose(times, len(session.layout.pipe), most, _cached_s(reports, case))
    how = "from an earlier start" if is_remembered else f"in {time.monotonic() - start:.1f} s"
    num_streams = batching.num_microbatches * batching.max_sequences
    rate = times.tokens_per_s(batching.num_microbatches, batching.max_sequences)
    _log(
        f"microbatches in flight: {batching.num_microbatches}, of up to "
        f"{batching.max_sequences} sequences; prompts in steps of {batching.prefill_chunk} "
        f"tokens; one stream {times.tokens_per_s(1, 1):.1f} tokens/s, {num_streams} together "
        f"{rate:.1f}, by step times measured {how}"
    )
    if case is not None:
        workload = replace(case.workload, num_sequences=num_streams)
        predicted = replace(case, workload=workload).predicted(session.layout.shares)
        _log(
            f"the plan had predicted {predicted.stream_tokens_per_s:.1f} and "
            f"{predicted.total_tokens_per_s:.1f}, limited by {predicted.limit}"
        )
    return batching


def _cached_s(reports: list[Report], case: Case | None) -> float:
    """Seconds in which the slowest rank reads what it caches of a token."""
    if case is None:
        return 0.0
    return max(
        sum(num_bytes for num_bytes, _ in report.kv_cost.growing)
        / case.machines[report.rank].speeds.stream_bytes_per_s
        for report in reports
    )


def _log(line: str) -> None:
    print(f"mlx-dist: {line}", file=sys.stderr, flush=True)
