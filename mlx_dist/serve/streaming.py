"""Answers a job: as server-sent events while the engine works, or in one piece when it is done.

Per token a stream costs one small struct and one write; what its events have in common is encoded
once.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from mlx_dist.serve.choices import Choices, ClientGoneError, Desk, open_choices
from mlx_dist.serve.failures import ApiError
from mlx_dist.serve.generation import Chunk, completion_of
from mlx_dist.serve.jobs import Job
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.relayed import Relayed, relayed_of, tokens_comment
from mlx_dist.serve.replies import Writer, reply_head, usage_reply
from mlx_dist.serve.settings import HttpConfig

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

_encode = msgspec.json.Encoder().encode
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks proxies of the nginx kind not to collect what should flow.
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Shim:
    """What all requests share."""

    llm: LLM
    config: HttpConfig
    metrics: Metrics
    desk: Desk


class Answer(Response):
    """Runs `job` when it is sent: the generations live no longer than the sending."""

    def __init__(self, shim: Shim, job: Job, writer: type[Writer]) -> None:
        super().__init__()
        self._shim = shim
        self._job = job
        self._writer = writer
        # What tokens alone do not tell again must be computed again: then nobody needs them.
        sampling = job.params.sampling
        self._can_go_on = sampling.grammar is None and sampling.num_logprobs is None
        self._tells_tokens = False

    def _begin(self, relayed: Relayed | None) -> None:
        self._tells_tokens = relayed is not None and self._can_go_on
        answer_id, created_s = secrets.token_hex(12), int(time.time())
        if relayed is not None:
            self._job = self._job.relayed(relayed)
            answer_id, created_s = relayed.answer_id, relayed.created_s
        job, llm, writer = self._job, self._shim.llm, self._writer
        self._writers = [writer(i, llm.tokenizer, answer_id) for i in range(job.num_choices)]
        self._head = reply_head(writer, job.is_streamed, answer_id, created_s, llm.name)
        self._event_head = b"data: " + _encode(self._head)[:-1] + b',"choices":['
        self._event_tail = b'],"usage":null}\n\n' if job.includes_usage else b"]}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError or MlxDistError if nothing has been sent yet."""
        self._begin(relayed_of(scope))
        shim = self._shim
        try:
            async with open_choices(
                shim.llm,
                self._job,
                receive,
                shim.config.request_timeout_s,
                shim.desk,
                shim.metrics,
            ) as choices:
                if self._job.is_streamed:
                    await self._stream(choices, send)
                else:
                    whole = Response(await self._collect(choices), media_type="application/json")
                    await whole(scope, receive, send)
        except ClientGoneError:
            pass

    async def _collect(self, choices: Choices) -> bytes:
        chunks: list[list[Chunk]] = [[] for _ in self._writers]
        while not choices.is_finished:
            for index, chunk in await choices.next(None):
                chunks[index].append(chunk)
        answers = map(completion_of, chunks)
        wholes = [w.whole(answer) for w, answer in zip(self._writers, answers, strict=True)]
        return _encode(self._head | {"choices": wholes, "usage": usage_reply(choices.usage)})

    async def _stream(self, choices: Choices, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            while not choices.is_finished:
                news = await choices.next(self._shim.config.keep_alive_s)
                if events := self._events(news) if news else _KEEP_ALIVE:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            end = self._usage_event(choices) + _DONE
        except ApiError as error:
            end = b"data: " + error.body + b"\n\n"
        await send({"type": "http.response.body", "body": end})

    def _events(self, news: list[tuple[int, Chunk]]) -> bytes:
        """One event for each choice that has something to show."""
        events = []
        for index, chunk in news:
            tokens = [info.token for info in chunk.tokens] if self._tells_tokens else []
            part = self._writers[index].part(chunk)
            if tokens:
                events.append(tokens_comment(index, tokens))
            if part is not None:
                events.append(self._event_head + _encode(part) + self._event_tail)
            elif tokens:
                events.append(b"\n")
        return b"".join(events)

    def _usage_event(self, choices: Choices) -> bytes:
        if not self._job.includes_usage:
            return b""
        usage = _encode(usage_reply(choices.usage))
        return self._event_head + b'],"usage":' + usage + b"}\n\n"
