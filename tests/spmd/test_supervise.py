"""`mlx-dist serve --supervise`: what clients see of ranks that die, and how a supervisor ends."""

from __future__ import annotations

import os
import secrets
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from mlx_dist.cluster import jobs
from tests.launching import mlx_dist
from tests.serving import serving

_FLAGS = ("--supervise", "--batching", "fixed:2,4,64")
# Token 0 would end the answer.
_ENDLESS = {"model": "model", "max_tokens": 400, "logit_bias": {"0": -100}}
_LONG = _ENDLESS | {"prompt": "Once upon a time", "temperature": 0}
_CHAT = _ENDLESS | {"messages": [{"role": "user", "content": "What is a rank?"}]}
_SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"type": "string"}, "minItems": 30}},
    "required": ["names"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "names", "schema": _SCHEMA}}
_USAGE = {"stream_options": {"include_usage": True}}


def long(client, on_token=lambda: None):
    """A stream that goes on for a while; `on_token` is called for each of its tokens."""
    text, reason = "", None
    for part in client.completions.create(stream=True, **_LONG):
        text += part.choices[0].text
        reason = part.choices[0].finish_reason or reason
        on_token()
    return text, reason


def several(client):
    """A stream of two seeded answers: their texts, how each ends, and what was counted."""
    texts, reasons, usage, ids = ["", ""], [None, None], None, set()
    sampled = _CHAT | {"temperature": 1, "seed": 7, "n": 2, "frequency_penalty": 0.5} | _USAGE
    for part in client.chat.completions.create(stream=True, **sampled):
        ids.add((part.id, part.created))
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert len(ids) == 1
    return texts, reasons, usage.prompt_tokens, usage.completion_tokens


def probabilities(client):
    """A stream with logprobs: the tokens of these, and the text."""
    text, tokens = "", []
    told = _CHAT | {"temperature": 1, "seed": 3, "logprobs": True, "max_tokens": 120}
    for part in client.chat.completions.create(stream=True, **told):
        text += part.choices[0].delta.content or ""
        if part.choices[0].logprobs:
            tokens += [one.token for one in part.choices[0].logprobs.content]
    return text, tokens


def schema(client):
    """A stream that must follow a grammar."""
    asked = _CHAT | {"temperature": 0, "max_tokens": 150, "response_format": _FORMAT}
    parts = client.chat.completions.create(stream=True, **asked)
    return "".join(part.choices[0].delta.content or "" for part in parts)


def whole(client):
    """An answer in one piece that ends with a stop string."""
    asked = _LONG | {"temperature": 0.7, "seed": 5, "stop": ["no such text"]}
    answer = client.completions.create(**asked)
    return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens


def rank_pids(job):
    """The process of each rank of `job`."""
    found = {}
    for pid in jobs.processes(job):
        for variable in Path("/proc", str(pid), "environ").read_bytes().split(b"\0"):
            if variable.startswith(b"OMPI_COMM_WORLD_RANK="):
                found[int(variable.rpartition(b"=")[2])] = pid
    return found


def nothing_left(job, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while jobs.processes(job) and time.monotonic() < deadline:
        time.sleep(0.05)
    return jobs.processes(job) == {}


@pytest.fixture
def job():
    job = secrets.token_hex(8)
    yield job
    assert nothing_left(job), jobs.processes(job)


def supervised(job, *flags, **options):
    return serving(*_FLAGS, *flags, **dict.fromkeys(jobs.VARIABLES, job), **options)


def test_answers_go_on_where_a_rank_was_killed(job):
    with supervised(job, num_ranks=2) as server, ThreadPoolExecutor() as pool:
        client = server.client()
        kinds = (several, probabilities, schema, whole)
        undisturbed = [long(client), *(kind(client) for kind in kinds)]
        for rank in (1, 0):
            others = [pool.submit(kind, client) for kind in kinds]
            num_tokens = 0

            def count(victim=rank):
                nonlocal num_tokens
                num_tokens += 1
                if num_tokens == 60:
                    os.kill(rank_pids(job)[victim], signal.SIGKILL)

            disturbed = [long(client, count), *(other.result() for other in others)]
            assert disturbed == undisturbed
            assert sum("serving again" in line for line in server.log) == 2 - rank
        assert server.get("/health") == {"status": "ok"}
        assert server.settled()["num_active"] == 0


def test_a_drain_answers_what_was_taken_and_nothing_new(job):
    with supervised(job) as server, ThreadPoolExecutor() as pool:
        client = server.client()
        due = long(client)
        stream = client.completions.create(stream=True, **_LONG)
        first = next(stream)
        server.process.send_signal(signal.SIGTERM)
        rest = pool.submit(lambda: list(stream))
        while not any("draining" in line for line in server.log):
            time.sleep(0.01)
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(**_LONG)
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        text = "".join(part.choices[0].text for part in (first, *rest.result()))
        assert text == due[0]
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_at_once(job):
    endless = _LONG | {"max_tokens": 1900}
    with pytest.raises(AssertionError, match="ended with 1"), supervised(job) as server:
        stream = server.client().completions.create(stream=True, **endless)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        # Two signals of a kind that come at once are one.
        while not any("draining" in line for line in server.log):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="ended before the answer"):
            list(stream)
        server.process.wait(20)


def test_an_error_of_the_first_start_is_not_tried_again(job):
    variables = dict.fromkeys(jobs.VARIABLES, job)
    done = mlx_dist("serve", "--supervise", "--port", "0", "--model", "/nowhere", env=variables)
    assert done.code == 1
    assert "--model /nowhere" in done.error_lines[0]
    assert "the server did not come up: --model /nowhere" in done.err
    assert done.err.count("--model /nowhere") == 2


def test_nothing_stays_of_a_supervisor_that_is_killed(job):
    with (
        pytest.raises(AssertionError, match="ended with -9"),
        supervised(job, num_ranks=2) as server,
    ):
        assert len(rank_pids(job)) == 2
        server.process.kill()
        assert nothing_left(job)
