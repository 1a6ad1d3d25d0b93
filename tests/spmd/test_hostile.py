"""Requests that mean harm, at a real server of two ranks.

Each is refused or harmless; none is a fault of the server's, ends a rank, or leaves memory behind.
What single parts refuse is told by test_guard.py, test_protocol.py and test_grammar.py.
"""

import asyncio
import gzip
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from benchmarks.disconnects import leave_many, left_behind
from benchmarks.hostile_requests import sweep
from benchmarks.load import Endpoint
from benchmarks.overload import overloaded
from benchmarks.servers import Running, rss_bytes
from tests.fake_llm import post
from tests.models import write_tool_model
from tests.serving import serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
ASK_CHAT = {"model": "tools", "messages": HI, "max_tokens": 2}
ASK_TEXT = {"model": "tools", "prompt": "hi", "max_tokens": 2}
# More than malloc's ups and downs, less than one of the large bodies leaves if it stays.
FLAT_BYTES = 24 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tool_model(tmp_path_factory.mktemp("hostile") / "tools")
    limits = ("--body-timeout-s", "3", "--kv-memory-gb", "0.02", "--max-choices", "4")
    queue = ("--batching", "fixed:2,4,64", "--max-queue", "8")
    with serving("--model", model, *limits, *queue, num_ranks=2) as server:
        yield server


@pytest.fixture
def endpoint(server):
    at = urlsplit(server.url)
    return Endpoint(at.hostname, at.port, "tools")


def answers(server, *parts, is_half_closed=False):
    """All that comes back for these bytes: the statuses, and the whole."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port), timeout=30) as connection:
        # The server may have enough before all of it is sent.
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
            if is_half_closed:
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                received += data
    lines = [line for line in received.split(b"\r\n") if b"HTTP/1.1 " in line]
    return [int(line.split(b"HTTP/1.1 ")[1][:3]) for line in lines], received


def ask(server, path, body, *headers):
    """The status of a POST on a connection of its own."""
    [status], received = answers(server, post(path, body, "Connection: close", *headers))
    assert len(received) < 100_000
    return status


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def formatted(schema):
    named = {"name": "n", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def pattern(regex):
    return formatted({"type": "string", "pattern": regex})


def tool(name, schema):
    return {"type": "function", "function": {"name": name, "parameters": schema}}


# What is wrong with a chat, and with a completion.
REFUSED_CHATS = {
    "n": {"n": 10**9},
    "temperature": {"temperature": -1e308},
    "a huge integer": {"max_tokens": 10**400},
    "deep content": {"messages": [{"role": "user", "content": json.loads("[" * 60 + "]" * 60)}]},
    "stops": {"stop": [str(i) for i in range(5000)]},
    "tool names": {"tools": [tool("x" * 65, {})]},
    "many tools": {"tools": [tool(f"f{i}", {}) for i in range(1000)]},
    "giant tools": {"tools": [tool(f"f{i}", {"enum": ["x" * 8000]}) for i in range(100)]},
    "a prompt of megabytes": {"messages": [{"role": "user", "content": "a b" * 1_000_000}]},
    "100,000 messages": {"messages": HI * 100_000},
    "half a pair": b'{"model":"tools","messages":[{"role":"user","content":"\\ud83d"}]}',
    "half a pair in a tool": b'{"model":"tools","messages":[{"role":"user","content":"hi"}],'
    b'"tools":[{"type":"function","function":{"name":"f","description":"\\ude00"}}]}',
    "a template": {"chat_template_kwargs": {"chat_template": "{{ cycler.__init__.__globals__ }}"}},
    "the template's messages": {"chat_template_kwargs": {"messages": "x"}},
    "the template's output": {"chat_template_kwargs": {"tokenize": False}},
    "a tensor": {"chat_template_kwargs": {"return_tensors": "pt"}},
    "lookahead": pattern("(?=a)(?!b)c"),
    "a remote schema": formatted({"$ref": "http://127.0.0.1:9/schema"}),
    "a schema that is itself": formatted({"$ref": "#"}),
    "a file": formatted({"$ref": "file:///etc/passwd"}),
    "a schema of megabytes": formatted({"enum": [f"{i:0100}" for i in range(20_000)]}),
    "a deep schema": formatted(nested(40)),
}
REFUSED_TEXTS = {
    "a negative token": {"prompt": [-1]},
    "a token too many": {"prompt": [100_000]},
    "a wide token": {"prompt": [1 << 63]},
    "a million tokens": {"prompt": [5] * 1_000_000},
    "many prompts": {"prompt": ["a"] * 100_000},
    "an unknown bias": {"logit_bias": {"999999999": 1}},
    "a signed bias": {"logit_bias": {"-1": 1}},
    "a bias by name": {"logit_bias": {"__class__": 1}},
    "a bias in other digits": {"logit_bias": {"\uff11": 1}},
    "a thousand biases": {"logit_bias": {str(i): 1 for i in range(1025)}},
    "a prototype": {"__proto__": {"max_tokens": 5}},
    "NaN": b'{"model":"tools","prompt":"a","temperature":NaN}',
    "not UTF-8": b'{"model":"tools","prompt":"\xc0\xaf\xed\xa0\x80"}',
    "a zip bomb": gzip.compress(b" " * 50_000_000),
}
# What only looks like harm.
HARMLESS_CHATS = {
    "a regex that explodes": pattern(".*a.{40}b.{40}"),
    "repetitions of repetitions": pattern("((a{1,1000}){1,1000}){1,1000}"),
    "a template in the text": {"messages": [{"role": "user", "content": "{{ 7*7 }}{% raw %}"}]},
    "markers": {"messages": [{"role": "user", "content": "<|end|><|system|>\0<tool_call>"}]},
    "dunders": {"chat_template_kwargs": {"__class__": "x", "__init__": "{{ 7*7 }}"}},
    "any bytes": {"messages": [{"role": "user", "content": "\x00\x7f\u202e\ufffe\U0010ffff"}]},
    "a long stop": {"stop": ["x" * 1_000_000]},
}


@pytest.mark.parametrize("name", REFUSED_CHATS)
def test_a_hostile_chat_is_refused(server, name):
    body = REFUSED_CHATS[name]
    body = body if isinstance(body, bytes) else ASK_CHAT | body
    assert ask(server, CHAT, body) in (400, 413)


@pytest.mark.parametrize("name", REFUSED_TEXTS)
def test_a_hostile_completion_is_refused(server, name):
    body = REFUSED_TEXTS[name]
    body = body if isinstance(body, bytes) else ASK_TEXT | body
    assert ask(server, TEXT, body, "Content-Encoding: gzip") in (400, 413)


@pytest.mark.parametrize("name", HARMLESS_CHATS)
def test_what_looks_hostile_is_answered(server, name):
    assert ask(server, CHAT, ASK_CHAT | HARMLESS_CHATS[name]) == 200


def get(path, *headers, host="localhost", method="GET"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


HEAD = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# Whatever these are, they are one request, and not a good one.
WIRES = {
    "up": get("/v1/../../etc/passwd"),
    "up, encoded": get("/v1/models/..%2f..%2f..%2fetc%2fpasswd"),
    "up, encoded twice": get("/v1/models/%252e%252e%252fhealth"),
    "two slashes": get("//health"),
    "another server": get("http://evil.example/health", host="evil.example"),
    "a NUL": get("/health%00.json"),
    "bad UTF-8": get("/v1/models/%ff%fe"),
    "a long path": get("/" + "a" * 20_000),
    "a long name": get("/v1/models/" + "a" * 10_000),
    "a tunnel": get("localhost:22", method="CONNECT"),
    "a trace": get("/health", method="TRACE"),
    "a forged Host": get("/cluster", host="evil.example"),
    "a forged Host behind a proxy": get("/cluster", "X-Forwarded-Host: localhost", host="evil.org"),
    "two Hosts": get("/cluster", "Host: evil.example"),
    "a forged Origin": get("/cluster", "Origin: http://localhost.evil.example"),
    "no Origin": get("/cluster", "Origin: null"),
    "many headers": get("/health", *(f"X-{i}: {i}" for i in range(5000))),
    "a space in a name": get("/health", "X : a"),
    "a NUL in a header": get("/health", "X: a\0b"),
    "a length and chunks": HEAD
    + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "other chunks": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunks twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunks by another name": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a signed length": HEAD + b"Content-Length: +5\r\n\r\n" + SMUGGLED,
    "two lengths": HEAD + b"Content-Length: 5, 6\r\n\r\n" + SMUGGLED,
    "a huge chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 30 + b"\r\nabc",
    "a negative chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc" + SMUGGLED,
    "a declared gigabyte": HEAD + b"Content-Length: 1073741824\r\n\r\n{",
}


@pytest.mark.parametrize("name", WIRES)
def test_a_request_that_is_not_one_is_refused(server, name):
    statuses, _ = answers(server, WIRES[name])
    assert len(statuses) == 1, statuses
    assert 400 <= statuses[0] < 500


def gigabyte():
    yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    for _ in range(1 << 10):
        yield b"100000\r\n" + b" " * (1 << 20) + b"\r\n"


def test_a_gigabyte_in_chunks_is_not_read(server):
    statuses, _ = answers(server, *gigabyte())
    # The rest of what was sent may reset the connection before the answer is read.
    assert statuses in ([413], [])


def test_slow_requests_are_given_up(server):
    begun = [b"", b"GET /hea", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", get("/x")[:-2]]
    with ThreadPoolExecutor(len(begun)) as clients:
        for statuses, _ in clients.map(lambda sent: answers(server, sent), begun):
            assert statuses in ([], [408])


def test_many_requests_at_once_on_a_connection(server):
    last = post(TEXT, ASK_TEXT, "Connection: close")
    statuses, _ = answers(server, SMUGGLED * 50, post(TEXT, ASK_TEXT) * 3, last)
    assert statuses == [200] * 54


def test_half_of_a_connection(server):
    endless = ASK_TEXT | {"max_tokens": 2000, "stream": True, "logit_bias": {"0": -100}}
    for part in (post(TEXT, endless), post(TEXT, ASK_TEXT)[:-1], SMUGGLED[:-2], b""):
        statuses, _ = answers(server, part, is_half_closed=True)
        assert statuses in ([], [200], [400])
    server.settled()


def test_requests_of_the_servers_own_schema(server, tmp_path):
    found = sweep(server.url, examples=1, phases="coverage", seed=0, scratch=tmp_path)
    assert not found.failures, found.log
    assert found.num_cases > 500
    assert found.share_answered > 0.9


def long_request(draw):
    prompt = [draw.randrange(5, 700) for _ in range(8)]
    return {"prompt": prompt, "max_tokens": 300, "logit_bias": {"0": -100}}


def test_more_than_can_be_served(server, endpoint):
    given = asyncio.run(overloaded(endpoint, per_s=60, seconds=1.5, bodies=long_request))
    assert {answer.status for answer in given} <= {200, 429, 503}
    refused = [answer for answer in given if answer.status != 200]
    assert 0 < len(refused) < len(given)
    assert all(answer.has_retry_after for answer in refused)
    assert not left_behind(server.settled())


def test_clients_that_leave(server, endpoint):
    moments = asyncio.run(leave_many(endpoint, num=60, seed=0))
    assert len(moments) > 3
    assert not left_behind(server.settled())


def test_nothing_is_left_behind(server, endpoint):
    ranks = Running(endpoint, server.process.pid).rank_pids()
    assert len(ranks) == 2

    def all_of_it():
        for name, wrong in (REFUSED_TEXTS | HARMLESS_CHATS).items():
            body = wrong if isinstance(wrong, bytes) else ASK_TEXT | wrong
            assert ask(server, TEXT, body) in (200, 400, 413), name
        answers(server, *gigabyte())
        return [rss_bytes(pid) for pid in ranks]

    before, after = all_of_it(), all_of_it()
    assert all(now - then < FLAT_BYTES for then, now in zip(before, after, strict=True))
    assert server.client().completions.create(**ASK_TEXT).choices[0].text
    assert not any("Traceback" in line for line in server.log)
