"""The generations behind one HTTP request: opened, listened to, cancelled together.

Everything here runs on the HTTP thread's event loop but `Desk.ring`, which the engine's thread
calls. Knows no HTTP beyond the message that says that the client has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive

from mlx_dist.engine.reader import Piece
from mlx_dist.serve.failures import ApiError, not_ready, timed_out
from mlx_dist.serve.generation import Chunk, Generation, Usage
from mlx_dist.serve.jobs import Job
from mlx_dist.serve.metrics import Metrics

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is left to answer."""


class Desk:
    """Where the requests under way wait: wakes those that have news, once a step for all."""

    def __init__(self) -> None:
        self.waiting: set[Choices] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Why nobody is served any more, once it is so.
        self._closed: asyncio.Future[ApiError] | None = None
        self._rung: deque[Choices] = deque()
        self._is_waking = False

    def open(self) -> None:
        """Wake requests on the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()

    def ring(self, choices: Choices) -> None:
        """From the engine's thread: there is news of `choices`."""
        self._rung.append(choices)
        if not self._is_waking:
            self._is_waking = True
            self._call(self._wake)

    def close(self, failure: ApiError) -> None:
        """From any thread: end whatever is under way, and what comes from now on."""
        self._call(partial(self._end_all, failure))

    async def unless_closed(self, work: Awaitable[T]) -> T:
        """The result of `work`, which a request needs before it waits here. Raises ApiError."""
        assert self._closed is not None
        doing = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [doing, self._closed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._closed.done():
            raise self._closed.result()
        return await doing

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # The loop is closed: nobody is left to wake.
            self._loop.call_soon_threadsafe(function)

    def _wake(self) -> None:
        # Before reading: whoever rings from here on wakes the loop again.
        self._is_waking = False
        while self._rung:
            self._rung.popleft().wake()

    def _end_all(self, failure: ApiError) -> None:
        assert self._closed is not None
        if not self._closed.done():
            self._closed.set_result(failure)
        for choices in self.waiting:
            choices.end(failure)


class Choices:
    """What comes for one job. `usage` grows as it comes."""

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self._job = job
        self._metrics = metrics
        self._news = asyncio.Event()
        self._failure: Exception | None = None
        self._running: dict[int, Generation] = {}
        self._usages = [Usage(0, 0, 0)] * job.num_choices
        self._last_s = [job.arrived_s] * job.num_choices
        self._num_calls = [0] * job.num_choices

    @property
    def is_finished(self) -> bool:
        return not self._running

    @property
    def usage(self) -> Usage:
        """Each prompt is counted once, however many answers it has."""
        firsts = self._usages[:: self._job.n]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
            completion_tokens=sum(usage.completion_tokens for usage in self._usages),
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
        )

    def start(self, llm: LLM, desk: Desk) -> None:
        """Raises MlxDistError if any of the choices cannot be taken, and what `next` raises."""
        if self._failure is not None:
            raise self._failure
        on_news = partial(desk.ring, self)
        for index in range(self._job.num_choices):
            prompt = self._job.prompts[index // self._job.n]
            self._running[index] = llm.open(
                prompt,
                self._job.params_of(index),
                tools=self._job.tools,
                on_news=on_news,
                tokens_so_far=self._job.tokens_of(index),
            )

    async def next(self, patience_s: float | None) -> list[tuple[int, Chunk]]:
        """What came since the last call, and for which choice; nothing after `patience_s`.

        Raises ClientGoneError, and ApiError if the time is over or the server stops.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while True:
                    await self._news.wait()
                    self._news.clear()
                    if self._failure is not None:
                        raise self._failure
                    if news := self._take():
                        return news
        return []

    async def watch(self, receive: Receive, timeout_s: float) -> None:
        """Fail when the client goes or the time is over, whatever else is being waited for."""
        try:
            async with asyncio.timeout(self._job.arrived_s + timeout_s - time.monotonic()):
                while (await receive())["type"] != "http.disconnect":
                    pass
            self.end(ClientGoneError())
        except TimeoutError:
            self.end(timed_out(timeout_s))

    def wake(self) -> None:
        """Let `next` look for what has come."""
        self._news.set()

    def end(self, failure: Exception) -> None:
        """Cancel what is not finished; `next` raises `failure`."""
        self._failure = failure
        self.cancel()
        self.wake()

    def cancel(self) -> None:
        """Take effect at the engine's next step; choices that are finished stay so."""
        for generation in self._running.values():
            generation.cancel()

    def _take(self) -> list[tuple[int, Chunk]]:
        news = []
        for index, generation in list(self._running.items()):
            if (chunk := generation.take()) is None:
                continue
            chunk = self._until_last_call(index, chunk)
            self._count(index, chunk.usage)
            if chunk.finish_reason is not None:
                del self._running[index]
            if chunk.finish_reason == "cancelled":
                raise not_ready("the server ended the answer before its end")
            news.append((index, chunk))
        return news

    def _until_last_call(self, index: int, chunk: Chunk) -> Chunk:
        """`chunk`, or its beginning if the most tool calls have come."""
        calls = chunk.piece.tool_calls
        self._num_calls[index] += len(calls)
        most = self._job.max_calls
        if most is None or self._num_calls[index] < most:
            return chunk
        self._running[index].cancel()
        piece = Piece(chunk.piece.text, chunk.piece.reasoning, calls[:most])
        return replace(chunk, piece=piece, finish_reason="tool_calls")

    def _count(self, index: int, usage: Usage) -> None:
        now_s = time.monotonic()
        num_before = self._usages[index].completion_tokens
        num_new = usage.completion_tokens - num_before
        self._usages[index] = usage
        if num_new > 0:
            gap_s = now_s - self._last_s[index]
            self._last_s[index] = now_s
            self._metrics.count_tokens(gap_s, num_new, is_first=num_before == 0)


@asynccontextmanager
async def open_choices(
    llm: LLM, job: Job, receive: Receive, timeout_s: float, desk: Desk, metrics: Metrics
) -> AsyncIterator[Choices]:
    """The choices of `job`. Whatever is not finished when the block is left is cancelled."""
    choices = Choices(job, metrics)
    watch = asyncio.create_task(choices.watch(receive, timeout_s))
    desk.waiting.add(choices)
    try:
        # Lets `watch` see a client that went while its prompt was encoded.
        await desk.unless_closed(asyncio.sleep(0))
        choices.start(llm, desk)
        yield choices
    finally:
        watch.cancel()
        desk.waiting.discard(choices)
        choices.cancel()
