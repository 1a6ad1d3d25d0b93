"""Load for any OpenAI-compatible endpoint. Knows HTTP and clocks; knows no server and no model.

    python -m benchmarks.load http://127.0.0.1:8100 --concurrency 16

Closed loop: each worker sends its next request when its last answer is complete, every request on a
connection of its own. Plain sockets, for the load shares its cores with the servers it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from string import ascii_lowercase
from typing import Any
from urllib.parse import urlsplit

# The benchmark model's tokenizer has a token for each of these with a space before it.
WORDS = tuple(islice(map("".join, product(ascii_lowercase, repeat=3)), 7233))

_MAX_RETRIES = 20
_RETRY_WAIT_S = 0.2


class LoadError(Exception):
    """An answer that is not what was asked for; its text is short enough to count by."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the name of the model there."""

    host: str
    port: int
    model: str
    timeout_s: float = 300


@dataclass(slots=True)
class Completion:
    """A streamed request, filled in as its answer comes. Times are time.perf_counter()'s."""

    prompt: str
    max_tokens: int
    sent_s: float = 0.0
    piece_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    error: str | None = None

    @property
    def first_piece_s(self) -> float:
        """Time to first token, retries included."""
        return self.piece_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> Iterator[float]:
        return (after - before for before, after in pairwise(self.piece_times_s))

    async def run(self, endpoint: Endpoint, max_retries: int = _MAX_RETRIES) -> Completion:
        """Send the request, again if its connection breaks, and read the answer to its end."""
        self.sent_s = time.perf_counter()
        while True:
            self.piece_times_s.clear()
            try:
                async with asyncio.timeout(endpoint.timeout_s):
                    await self._attempt(endpoint)
                self.error = None
            except (OSError, asyncio.IncompleteReadError, LoadError) as error:
                self.error = _reason(error)
            self.ended_s = time.perf_counter()
            if self.error not in ("reset", "refused", "cut off") or max_retries == 0:
                return self
            self.retries[self.error] += 1
            max_retries -= 1
            await asyncio.sleep(_RETRY_WAIT_S)

    async def _attempt(self, endpoint: Endpoint) -> None:
        body = {
            "model": endpoint.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async for event in events(endpoint, json.dumps(body).encode()):
            if usage := event.get("usage"):
                self.prompt_tokens = usage["prompt_tokens"]
                self.completion_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                self.cached_tokens = details.get("cached_tokens") or 0
            elif "error" in event:
                raise LoadError("error in stream")
            elif event["choices"] and event["choices"][0].get("text"):
                self.piece_times_s.append(time.perf_counter())
        if self.completion_tokens != self.max_tokens or not self.piece_times_s:
            raise LoadError(f"{self.completion_tokens} of {self.max_tokens} tokens")


def _reason(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "timeout"
        case ConnectionRefusedError():
            return "refused"
        case ConnectionError():
            return "reset"
        case asyncio.IncompleteReadError():
            return "cut off"
        case _:
            return str(error)


async def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """The status and the body of GET `path`. Raises OSError, also if the answer breaks off."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        status, is_chunked = await _response_head(reader)
        body = [data async for data in _body(reader, is_chunked)]
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("the answer broke off") from error
    finally:
        writer.close()
    return status, b"".join(body)


async def events(endpoint: Endpoint, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of a POST of `body` to /v1/completions, up to [DONE]."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint.host}:{endpoint.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status, is_chunked = await _response_head(reader)
        if status != 200:
            raise LoadError(f"HTTP {status}")
        rest = b""
        async for data in _body(reader, is_chunked):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    if line[5:].strip() == b"[DONE]":
                        return
                    yield json.loads(line[5:])
        raise asyncio.IncompleteReadError(rest, None)
    finally:
        writer.close()


async def _response_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body is chunked."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    return int(head.split(" ", 2)[1]), "transfer-encoding: chunked" in head


async def _body(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    if not is_chunked:
        while data := await reader.read(65536):
            yield data
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


class Prompts:
    """Prompts of random words, no two of which begin alike: no server's prefix cache helps."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._first = self._random.sample(WORDS, len(WORDS))

    def take(self, num_words: int) -> str:
        if not self._first:
            raise ValueError(f"only {len(WORDS)} prompts begin with different words")
        words = [self._first.pop(), *self._random.choices(WORDS, k=num_words - 1)]
        return " " + " ".join(words)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one closed loop measured. Seconds, and tokens a second."""

    concurrency: int
    num_requests: int
    tokens_per_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    retries: dict[str, int]
    errors: dict[str, int]
    prompt_tokens: float
    cached_tokens: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` % of them do not exceed; nan for none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


async def closed_loop(
    endpoint: Endpoint,
    prompts: Prompts,
    *,
    concurrency: int,
    requests_per_worker: int,
    prompt_words: int,
    max_tokens: int,
) -> LoadResult:
    """Run `concurrency` workers of `requests_per_worker` requests each, after a warm-up round."""

    async def worker(num_requests: int) -> list[Completion]:
        requests = [Completion(prompts.take(prompt_words), max_tokens) for _ in range(num_requests)]
        return [await request.run(endpoint) for request in requests]

    await asyncio.gather(*(worker(1) for _ in range(concurrency)))
    answers = await asyncio.gather(*(worker(requests_per_worker) for _ in range(concurrency)))
    return summarize(concurrency, [answer for row in answers for answer in row])


def summarize(concurrency: int, answers: Sequence[Completion]) -> LoadResult:
    """The rate is all tokens over the time from the first request sent to the last byte read."""
    good = [answer for answer in answers if answer.error is None]
    wall_s = max(a.ended_s for a in answers) - min(a.sent_s for a in answers)
    first_s = [answer.first_piece_s for answer in good]
    gaps_s = [gap for answer in good for gap in answer.gaps_s]
    return LoadResult(
        concurrency=concurrency,
        num_requests=len(answers),
        tokens_per_s=sum(answer.completion_tokens for answer in good) / wall_s,
        first_token_p50_s=percentile(first_s, 50),
        first_token_p99_s=percentile(first_s, 99),
        gap_p50_s=percentile(gaps_s, 50),
        gap_p99_s=percentile(gaps_s, 99),
        retries=dict(sum((answer.retries for answer in answers), Counter())),
        errors=dict(Counter(answer.error for answer in answers if answer.error)),
        prompt_tokens=sum(answer.prompt_tokens for answer in good) / max(1, len(good)),
        cached_tokens=sum(answer.cached_tokens for answer in good),
    )


async def burst(endpoint: Endpoint, prompts: Prompts, num_connections: int) -> dict[str, int]:
    """Open `num_connections` at once with a request of one token each; count how they ended."""
    requests = [Completion(prompts.take(1), 1) for _ in range(num_connections)]
    await asyncio.gather(*(request.run(endpoint, max_retries=0) for request in requests))
    return dict(Counter(request.error or "ok" for request in requests))


async def first_model(host: str, port: int) -> str:
    """The first model that /v1/models names."""
    _, body = await get(host, port, "/v1/models")
    return str(json.loads(body)["data"][0]["id"])


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests-per-stream", type=int, default=3)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--burst", type=int, help="instead: so many connections at once")
    options = parser.parse_args()
    url = urlsplit(options.url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    endpoint = Endpoint(host, port, options.model or await first_model(host, port))
    prompts = Prompts(time.time_ns())
    if options.burst:
        print(await burst(endpoint, prompts, options.burst))
        return
    result = await closed_loop(
        endpoint,
        prompts,
        concurrency=options.concurrency,
        requests_per_worker=options.requests_per_stream,
        prompt_words=options.prompt_words,
        max_tokens=options.max_tokens,
    )
    print(result)


if __name__ == "__main__":
    asyncio.run(_main())
