"""An LLM without a model, to test what stands in front of one.

It answers with the characters of `text`, one a step, to every request at once, as the real one
does from its own thread.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx2
import openai

from mlx_dist.engine.reader import Piece, ToolCall
from mlx_dist.engine.text import ChatPrompt
from mlx_dist.errors import PromptTooLongError, QueueFullError, RequestError
from mlx_dist.messages import Logprobs
from mlx_dist.serve.generation import Chunk, TokenInfo, Usage
from mlx_dist.serve.http import HttpServer
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.stats import RankInfo, Stats

STATS = Stats(
    num_waiting=3,
    num_active=2,
    num_slots=8,
    num_microbatches=2,
    kv_reserved_bytes=(10, 20),
    kv_budget_bytes=(100, 200),
    prefix_bytes=5,
    prefix_entries=1,
    prefix_hits=4,
    prefix_queries=9,
    prefix_hit_tokens=40,
    prompt_tokens=77,
    completion_tokens=88,
    busy_s=(1.5, 2.5),
    rank_slots=(2, 2),
    rank_kv_bytes=(7, 8),
    rank_digests=(9, 9),
    last_step_age_s=0.1,
    is_draining=False,
    ranks=(RankInfo(0, "a", (0, 2), 1000), RankInfo(1, "b", (2, 4), 2000)),
)


class FakeTokenizer:
    """A token is a character."""

    has_chat_template = has_tools = has_reasoning = True
    context_tokens = 500
    stop_tokens = frozenset()
    call_markers = ((1,), (2,))

    def encode_text(self, text):
        if len(text) >= self.context_tokens:
            raise PromptTooLongError(f"the prompt has {len(text)} tokens")
        return tuple(map(ord, text))

    def encode_chat(self, messages, tools=None, template_args=None):
        self.seen = (messages, tools, template_args)
        if messages[0].get("content") == "refuse":
            raise RequestError("the template refuses")
        return ChatPrompt(self.encode_text(" ".join(m.get("content", "") for m in messages)), ())

    def open_reasoning(self, prompt):
        return (3,) if chr(prompt[-1]) == "?" else ()

    def token_text(self, token):
        return chr(token)

    def token_bytes(self, token):
        return chr(token).encode()


class FakeGrammars:
    def check(self, grammar):
        if "bad" in grammar:
            raise RequestError("the schema is unusable")


class FakeGeneration:
    def __init__(self, prompt, params, tools, on_news, answer):
        self.prompt = getattr(prompt, "tokens", prompt)
        self.params, self.tools, self.on_news = params, tools, on_news
        self.left = deque(answer)
        self.num_tokens = 0
        self.is_cancelled = self.is_over = self.is_finished = False
        self.news = deque()

    def step(self):
        """One token, or the end of a generation that has been cancelled."""
        text = "" if self.is_cancelled else self.left.popleft()
        reason, tokens = None, ()
        if text:
            self.num_tokens += 1
            tokens = (TokenInfo(ord(text[0]), self.logprobs(text)),)
        if self.is_cancelled:
            reason = "cancelled"
        elif self.num_tokens == self.params.max_tokens:
            reason = "length"
        elif not self.left:
            reason = "tool_calls" if text == "<" else "stop"
        self.is_over = reason is not None
        # "<" stands for a tool call, capitals for reasoning.
        piece = Piece(text)
        if text == "<":
            piece = Piece(tool_calls=(ToolCall("f", f'{{"a":{self.num_tokens}}}'),))
        elif text.isupper():
            piece = Piece(reasoning=text)
        usage = Usage(len(self.prompt), self.num_tokens, 2)
        self.news.append(Chunk(piece, tokens, reason, usage))
        self.on_news()

    def logprobs(self, text):
        most = self.params.sampling.num_logprobs
        if most is None:
            return None
        return Logprobs(-0.5, [(ord(text[0]), -0.5), (ord("~"), float("-inf"))][:most])

    def take(self):
        taken = []
        while self.news:
            taken.append(self.news.popleft())
        if not taken:
            return None
        self.is_finished = taken[-1].finish_reason is not None
        pieces = [chunk.piece for chunk in taken]
        return replace(
            taken[-1],
            piece=Piece(
                "".join(piece.text for piece in pieces),
                "".join(piece.reasoning for piece in pieces),
                tuple(call for piece in pieces for call in piece.tool_calls),
            ),
            tokens=tuple(token for chunk in taken for token in chunk.tokens),
        )

    def cancel(self):
        self.is_cancelled = True


class FakeLLM:
    """`open_limit` generations are taken, then the queue is full; `run` cleared holds all back."""

    name = "org/tiny"
    vocab_size = sys.maxunicode + 1

    def __init__(self, text="hello", step_s=0.0, open_limit=None):
        self.tokenizer, self.grammars = FakeTokenizer(), FakeGrammars()
        self.text, self.step_s, self.open_limit = text, step_s, open_limit
        self.opened = []
        self.stats_now = STATS
        self.error = None
        self.is_full = False
        self.run = threading.Event()
        self.run.set()
        self.is_over = False
        threading.Thread(target=self.loop, daemon=True).start()

    def check_room(self, num):
        if self.is_full:
            raise QueueFullError("the queue is full", 1.5)

    def open(self, prompt, params, *, tools=None, on_news, tokens_so_far=()):
        if self.error is not None:
            raise self.error
        if any(token > sys.maxunicode for token in getattr(prompt, "tokens", prompt)):
            raise RequestError("the prompt has a token that the model does not know")
        if self.open_limit is not None and len(self.opened) >= self.open_limit:
            raise QueueFullError("the queue is full", 1.5)
        answer = self.text if isinstance(self.text, str) else self.text(prompt, params)
        generation = FakeGeneration(prompt, params, tools, on_news, answer)
        generation.num_so_far = len(tokens_so_far)
        for _ in tokens_so_far:
            generation.step()
        self.opened.append(generation)
        return generation

    def stats(self):
        return self.stats_now

    def set_stats(self, **changes):
        self.stats_now = replace(STATS, **changes)

    @property
    def active(self):
        return [generation for generation in list(self.opened) if not generation.is_over]

    def loop(self):
        while not self.is_over:
            for generation in self.active:
                if self.run.is_set() or generation.is_cancelled:
                    generation.step()
            time.sleep(self.step_s or 0.0005)

    def wait_until_idle(self, timeout_s=2.0):
        """Whether every generation has ended in time."""
        until = time.monotonic() + timeout_s
        while self.active and time.monotonic() < until:
            time.sleep(0.005)
        return not self.active


class Served:
    """A server, and clients of it that close with it."""

    def __init__(self, server, clients):
        self.host, self.port = server.address
        self.stop = server.stop
        self.url = f"http://{self.host}:{self.port}"
        self.clients = clients

    def openai(self, key="none", **options):
        options = {"max_retries": 0, "timeout": 20} | options
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)
        return self.clients.enter_context(client)

    def http(self, **options):
        options = {"base_url": self.url, "timeout": 20} | options
        return self.clients.enter_context(httpx2.Client(**options))

    def raw(self, *parts):
        """A connection that has sent `parts`."""
        connection = socket.create_connection((self.host, self.port), timeout=20)
        self.clients.enter_context(connection).sendall(b"".join(parts))
        return connection


def post(path, body, *headers):
    """The bytes of a POST request with a JSON body."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@contextmanager
def served(llm, **settings):
    """`llm` behind the shim, on a free port."""
    server = HttpServer(llm, HttpConfig(**({"port": 0} | settings)))
    server.start()
    try:
        with ExitStack() as clients:
            yield Served(server, clients)
    finally:
        llm.is_over = True
        server.stop()
