"""What a user of the real openai client finds at a server of three ranks."""

import json
import re
import signal
import threading
import time

import httpx2
import openai
import pytest

from tests.launching import mlx_dist
from tests.models import write_tool_model
from tests.serving import serving

MESSAGES = [{"role": "user", "content": "Which rank holds the last layers of the model?"}]
MODEL = "model"


@pytest.fixture(scope="module")
def server():
    with serving("--max-queue", "50", num_ranks=3) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, **options):
    defaults = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**(defaults | options))


def text(answer):
    return answer.choices[0].message.content


def test_chat_answers_and_counts(client):
    answer = ask(client)
    assert text(answer)
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 24


def test_a_stream_says_the_same_piece_by_piece(client):
    stream = ask(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len(pieces) > 3
    answer = ask(client)
    assert "".join(pieces) == text(answer)
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    finished = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in finished if reason] == [answer.choices[0].finish_reason]


def test_several_answers_to_one_prompt(client):
    answer = ask(client, n=3, temperature=3.0, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = ask(client, n=3, temperature=3.0, seed=5)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_a_seed_makes_sampling_repeatable(client):
    texts = [text(ask(client, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings_are_not_part_of_the_text(client):
    whole = text(ask(client))
    stop = whole[6:9]
    answer = ask(client, stop=[stop])
    assert text(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_of_the_likeliest(client):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        # Greedy takes the likeliest.
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == text(answer)


def test_completions_continue_a_text_or_tokens(client):
    for prompt in (["Once", "A rank"], [[5, 6], [7, 8, 9]]):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=4, temperature=0, logprobs=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert len(answer.choices[0].logprobs.tokens) <= 4


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"rank": {"type": "integer"}, "ok": {"type": "boolean"}},
        "required": ["rank", "ok"],
        "additionalProperties": False,
    }
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "report", "schema": schema, "strict": True},
    }
    for seed in range(3):
        answer = ask(
            client, response_format=response_format, temperature=1.0, seed=seed, max_tokens=60
        )
        if answer.choices[0].finish_reason == "stop":
            report = json.loads(text(answer))
            assert type(report["rank"]) is int
            assert type(report["ok"]) is bool


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
    ],
)
def test_a_bad_value_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert param in str(caught.value.body)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="nonesuch"):
        ask(client, model="nonesuch")


def test_a_prompt_beyond_the_context_is_too_large(client):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert caught.value.status_code == 413


def test_a_full_queue_says_when_to_come_again(server):
    refused = []

    def one():
        try:
            ask(server.client(), n=20, temperature=1.0, max_tokens=200)
        except openai.RateLimitError as error:
            refused.append(error.response.headers["retry-after"])

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused
    assert all(float(seconds) > 0 for seconds in refused)
    server.settled()


def test_a_client_that_leaves_frees_its_slot(server, client):
    stream = ask(client, stream=True, max_tokens=400, logit_bias={"0": -100}, temperature=1.0)
    next(iter(stream))
    stream.close()
    stats = server.settled()
    assert sum(stats["kv_reserved_bytes"]) == 0


def test_the_second_turn_of_a_chat_prefills_only_what_is_new(client):
    system = {"role": "system", "content": "Answer briefly, whatever the question may be."}
    question = {"role": "user", "content": "Tell me of the pipeline."}
    first = ask(client, messages=[system, question], max_tokens=16)
    history = [system, question, {"role": "assistant", "content": text(first)}]
    second = ask(client, messages=[*history, {"role": "user", "content": "And then?"}])
    cached = second.usage.prompt_tokens_details.cached_tokens
    # All of the first prompt at least; the answer too as far as it tokenizes the same again.
    assert first.usage.prompt_tokens - 2 <= cached < second.usage.prompt_tokens
    assert cached >= first.usage.prompt_tokens + first.usage.completion_tokens - 4


def test_models_health_readiness_metrics_and_cluster(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert server.get("/health")
    assert server.get("/ready")
    metrics = server.get("/metrics")
    names = set(re.findall(r"^(mlx_dist_\w+)", metrics, re.MULTILINE))
    assert {"mlx_dist_completion_tokens_total", "mlx_dist_kv_bytes"} <= names
    ranks = server.get("/cluster")["ranks"]
    assert [rank["layers"] for rank in ranks] == [[0, 2], [2, 4], [4, 6]]


def test_an_idle_server_stays_ready(server):
    time.sleep(6)
    assert server.stats["last_step_age_s"] < 6
    assert httpx2.get(f"{server.url}/ready").status_code == 200


def test_a_key_is_asked_for_and_is_in_no_message():
    with serving(num_ranks=2, MLX_DIST_API_KEY="s3cret", MLX_DIST_TRACE="1") as server:
        assert text(ask(server.client(api_key="s3cret")))
        for key in ("wrong", ""):
            with pytest.raises(openai.AuthenticationError):
                ask(server.client(api_key=key or "x"))
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.get(f"{server.url}/metrics").status_code == 401
    assert any(" frame " in line for line in server.log)
    assert not any("s3cret" in line for line in server.log)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called(tmp_path):
    with serving("--model", write_tool_model(tmp_path / "tools"), num_ranks=2) as server:
        client = server.client()
        named = {"type": "function", "function": {"name": "weather"}}
        for choice in ("required", named):
            answer = ask(
                client,
                model="tools",
                tools=[WEATHER],
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=80,
            )
            [call] = answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "tool_calls"
            assert call.function.name == "weather"
            assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        # Called and answered, in a stream.
        stream = ask(
            client, model="tools", tools=[WEATHER], tool_choice=named, max_tokens=80, stream=True
        )
        calls = [c for chunk in stream for c in chunk.choices[0].delta.tool_calls or ()]
        assert "".join(c.function.name or "" for c in calls) == "weather"
        told = [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        assert ask(client, model="tools", messages=told, tools=[WEATHER]).choices


def test_draining_finishes_what_is_under_way():
    with serving(num_ranks=2) as server:
        client = server.client()
        stream = ask(client, stream=True, max_tokens=300, temperature=3.0, seed=1)
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            ask(client)
        assert [c.choices[0].finish_reason for c in chunks][-1] in ("length", "stop")
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batching", "nonsense"), "--batching 'nonsense'"),
        (("--kv-memory-gb", "0.0001"), "--kv-memory-gb more"),
        (("--host", "0.0.0.0"), "--api-key"),
        (("--max-queue", "8"), "--max-choices 32 is more than"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_server_that_cannot_be_says_why(arguments, words):
    done = mlx_dist("serve", "--port", "0", *arguments, num_ranks=2)
    assert done.code == 1
    [line] = done.error_lines
    assert words in line
