"""The relay before shims that come and go: what clients get, and what they do not notice."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from http.client import parse_headers

import httpx2
import openai
import pytest
import uvicorn

from mlx_dist.serve.http import HttpServer
from mlx_dist.serve.relayed import Relayed
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.sockets import listen, uvicorn_config
from mlx_dist.supervise.gate import Gate, Upstream
from mlx_dist.supervise.relay import relay_app
from tests.fake_llm import FakeLLM

SECRET = "open sesame"
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 400}
TEXT = "hello, this is an answer that takes a while"


class Front:
    """A relay in a thread of its own, and shims behind it."""

    def __init__(self, stack, resume_s=5.0, **settings):
        self.stack = stack
        self.settings = {"port": 0, "keep_alive_s": 0.2} | settings
        self.config = HttpConfig(**self.settings)
        self.gate = Gate(lambda: None)
        self.upstreams = []
        listening = listen(self.config.host, 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = relay_app(self.gate, self.config, resume_s)
        self.server = uvicorn.Server(uvicorn_config(app, self.config, lifespan="off"))
        self.loop = None

        async def main():
            self.loop = asyncio.get_running_loop()
            await self.server.serve([listening])

        self.thread = threading.Thread(target=asyncio.run, args=(main(),))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def tell(self, function, *arguments):
        """Call a function of the gate where it belongs, and wait until it is done."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
        assert done.wait(5)

    def open(self, port):
        self.upstreams.append(Upstream.at(port, SECRET))
        self.tell(self.gate.open, self.upstreams[-1])

    def shut(self):
        self.tell(self.gate.shut)

    def shim(self, llm):
        """A shim of `llm` behind the relay."""
        server = HttpServer(llm, self.config, SECRET)
        server.start()

        def stop():
            llm.is_over = True
            server.stop()

        self.stack.callback(stop)
        self.open(server.address[1])
        return server

    def client(self, **options):
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return self.stack.enter_context(openai.OpenAI(**(defaults | {"timeout": 20} | options)))

    def http(self):
        return self.stack.enter_context(httpx2.Client(base_url=self.url, timeout=20))

    def close(self):
        self.tell(self.gate.end)
        for upstream in self.upstreams:
            asyncio.run_coroutine_threadsafe(upstream.pool.aclose(), self.loop).result(5)
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def front():
    fronts = []
    with ExitStack() as stack:

        def make(**settings):
            fronts.append(Front(stack, **settings))
            return fronts[-1]

        yield make
    for one in fronts:
        one.close()


@contextmanager
def broken(chunks):
    """A shim that sends these pieces of a stream and is gone: its port."""

    def answer(server):
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as request:
            # All of it: what is left unread resets the connection, and takes along what was sent.
            request.readline()
            request.read(int(parse_headers(request)["content-length"]))
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for chunk in chunks:
                connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def part(text, tokens):
    told = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny"}
    comment = " ".join(map(str, [":t 0", *tokens])) + "\n"
    return (comment + "data: " + json.dumps(head | {"choices": [told]}) + "\n\n").encode()


def test_a_stream_goes_on_with_the_next_shim_from_its_tokens(front):
    relay, llm = front(), FakeLLM(TEXT)
    with broken([part("he", [104, 101]), part("ll", [108, 108]), b'data: {"cho']) as port:
        relay.open(port)
        stream = relay.client().completions.create(stream=True, **BODY)
        texts = [next(stream).choices[0].text for _ in range(2)]
        relay.shut()
        relay.shim(llm)
        rest = list(stream)
    assert "".join(texts + [one.choices[0].text for one in rest]) == TEXT
    assert rest[-1].choices[0].finish_reason == "stop"
    # The last token is computed again.
    assert [generation.num_so_far for generation in llm.opened] == [3]


def test_the_same_id_and_seed_are_asked_for_again(front):
    relay, llm = front(), FakeLLM(TEXT)
    relay.shim(llm)
    answer = relay.client().completions.create(**BODY)
    seed = llm.opened[0].params.sampling.seed
    assert answer.choices[0].text == TEXT
    first = Relayed("a" * 24, 5, 11)
    headers, _ = first.stamp(SECRET.encode(), b"")
    port = relay.gate.upstream.port
    for again in range(2):
        response = (
            relay.http()
            .post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, headers=headers)
            .json()
        )
        assert (response["id"], response["created"]) == ("cmpl-" + "a" * 24, 5)
        assert llm.opened[1 + again].params.sampling.seed == 11 != seed
    named = relay.http().post(
        f"http://127.0.0.1:{port}/v1/completions", json=BODY | {"seed": 4}, headers=headers
    )
    assert named.status_code == 200
    assert llm.opened[3].params.sampling.seed == 4


def test_a_client_cannot_speak_as_the_relay(front):
    relay, llm = front(), FakeLLM(TEXT)
    relay.shim(llm)
    relayed = Relayed("b" * 24, 5, 11, [[104]])
    headers, body = relayed.stamp(SECRET.encode(), json.dumps(BODY).encode())
    forged = [*headers, (b"content-type", b"application/json")]
    through = relay.http().post("/v1/completions", content=body, headers=forged)
    assert through.status_code == 400  # The tokens behind the body are no JSON.
    wrong = [(name, b"x" if value == SECRET.encode() else value) for name, value in forged]
    port = relay.gate.upstream.port
    direct = relay.http().post(
        f"http://127.0.0.1:{port}/v1/completions", content=body, headers=wrong
    )
    assert direct.status_code == 400
    assert llm.opened == []


def test_another_text_is_an_error_and_no_answer(front):
    relay = front()
    with broken([part("other", [1])]) as port:
        relay.open(port)
        stream = relay.client().completions.create(stream=True, **BODY)
        next(stream)
        relay.shut()
        relay.shim(FakeLLM(TEXT))
        with pytest.raises(openai.APIError, match="could not be told again"):
            list(stream)


def test_who_waits_hears_comments_and_at_last_an_error(front):
    relay = front(resume_s=0.6)
    with broken([part("he", [104])]) as port:
        relay.open(port)
        start = time.monotonic()
        with relay.http().stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            relay.shut()
            rest = list(lines)
    assert 0.5 < time.monotonic() - start < 5
    assert rest.count(": keep-alive") >= 2
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("not_ready", "server_error")


def test_what_was_not_begun_is_asked_of_the_next_shim(front):
    relay, held, llm = front(), FakeLLM(TEXT), FakeLLM(TEXT)
    first = relay.shim(held)
    held.run.clear()
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(relay.client().completions.create(**BODY))
    )
    asking.start()
    while not held.opened:
        time.sleep(0.005)
    first.end_now()
    relay.shut()
    relay.shim(llm)
    asking.join()
    assert answers[0].choices[0].text == TEXT
    assert len(llm.opened) == 1


def test_a_request_that_fails_the_ranks_each_time_is_given_up(front):
    relay = front()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def fall():
            for _ in range(4):
                connection, _ = server.accept()
                connection.recv(65536)
                relay.shut()
                connection.close()
                relay.open(port)

        falling = threading.Thread(target=fall)
        falling.start()
        relay.open(port)
        answer = relay.http().post("/v1/completions", json=BODY)
        falling.join()
    assert answer.status_code == 503
    assert "failed 3 times" in answer.text


def test_refusals_are_those_of_the_shim(front):
    relay = front(api_key="key", max_body_bytes=1000)
    relay.shim(FakeLLM(TEXT))
    http = relay.http()
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/v1/models").status_code == 401
    key = {"authorization": "Bearer key"}
    assert http.get("/v1/models", headers=key).json()["data"][0]["id"] == "org/tiny"
    assert http.get("/v1/models?x=%20y", headers=key | {"host": "evil.example"}).status_code == 403
    large = http.post("/v1/completions", json=BODY | {"user": "u" * 999}, headers=key)
    assert large.status_code == 413
    unknown = http.post("/v1/completions", json=BODY | {"what": 1}, headers=key)
    assert unknown.json()["error"]["param"] == "what"
    assert http.get("/nowhere", headers=key).status_code == 404
    assert "mlx_dist_slots" in http.get("/metrics", headers=key).text


def test_without_ranks_it_says_so(front):
    relay = front()
    http = relay.http()
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json=BODY).status_code == 503
    relay.shim(FakeLLM(TEXT))
    assert http.get("/ready").status_code == 200
    relay.shut()
    ready = http.get("/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "2")
    relay.tell(relay.gate.drain)
    drained = http.post("/v1/completions", json=BODY)
    assert (drained.status_code, drained.json()["error"]["code"]) == (503, "not_ready")


def test_a_client_that_goes_is_not_served_on(front):
    relay, llm = front(), FakeLLM("x" * 10_000, step_s=0.002)
    relay.shim(llm)
    stream = relay.client().completions.create(stream=True, **BODY)
    next(stream)
    stream.close()
    assert llm.wait_until_idle()
    assert llm.opened[0].is_cancelled
    deadline = time.monotonic() + 2
    while relay.gate.num_requests and time.monotonic() < deadline:
        time.sleep(0.005)
    assert relay.gate.num_requests == 0


def test_pages_of_other_origins_get_their_headers_once(front):
    relay = front(cors_origins=("https://a.example",))
    relay.shim(FakeLLM(TEXT))
    answer = relay.http().get("/v1/models", headers={"origin": "https://a.example"})
    assert answer.headers.get_list("access-control-allow-origin") == ["https://a.example"]
