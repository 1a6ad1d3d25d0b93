"""The shim over a real socket: what users of OpenAI's client see, and what the engine is asked."""

import openai
import pytest

from mlx_dist.errors import NotReadyError
from tests.fake_llm import FakeLLM, served

HI = [{"role": "user", "content": "hi"}]
MODEL = "org/tiny"


@pytest.fixture
def llm():
    return FakeLLM()


@pytest.fixture
def client(llm):
    with served(llm) as server:
        yield server.openai()


def chat(client, **options):
    return client.chat.completions.create(**({"model": MODEL, "messages": HI} | options))


def complete(client, **options):
    return client.completions.create(**({"model": MODEL, "prompt": "hi"} | options))


def test_chat(client, llm):
    answer = chat(client, model="tiny")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 5, 7)
    assert usage.prompt_tokens_details.cached_tokens == 2
    sampling = llm.opened[0].params.sampling
    assert sampling.temperature == 1.0
    assert llm.opened[0].params.max_tokens is None


def test_an_answer_can_be_sent_back_as_history(client, llm):
    llm.text = "Ok<"
    first = chat(client, tools=[tool("f")]).choices[0].message
    called = first.tool_calls[0].id
    result = {"role": "tool", "tool_call_id": called, "content": [{"type": "text", "text": "7"}]}
    chat(client, messages=[*HI, first, result, {"role": "developer", "content": "be brief"}])
    messages, _, _ = llm.tokenizer.seen
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":3}'}
    assert messages[1]["reasoning_content"] == "O"
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": called, "content": "7"},
        {"role": "developer", "content": "be brief"},
    ]


def test_chat_stream(client):
    chunks = list(chat(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "hello"
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"


def test_usage_comes_last_if_asked_for(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5


def test_choices_have_seeds_in_a_row_and_interleave(client, llm):
    llm.step_s = 0.01
    llm.text = lambda _, params: str(params.sampling.seed)[-3:]
    chunks = list(chat(client, n=3, seed=(1 << 64) - 2, stream=True))
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["614", "615", "0"]
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order)


def test_seeds(client, llm):
    chat(client, seed=-1)
    chat(client)
    chat(client)
    seeds = [generation.params.sampling.seed for generation in llm.opened]
    assert seeds[0] == (1 << 64) - 1
    assert seeds[1] != seeds[2]


def test_completions_of_many_prompts(client, llm):
    llm.text = lambda prompt, params: f"{chr(prompt[0])}{params.sampling.seed}"
    answer = complete(client, prompt=["ab", "c"], n=2, seed=5)
    assert [choice.text for choice in answer.choices] == ["a5", "a6", "c5", "c6"]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert llm.opened[0].params.max_tokens == 16
    assert [c.text for c in complete(client, prompt=[97, 98], seed=1).choices] == ["a1"]
    assert [c.text for c in complete(client, prompt=[[97], [98]], seed=1).choices] == ["a1", "b1"]


def test_completion_stream(client):
    chunks = list(complete(client, stream=True, max_tokens=3))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hel"
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_chat_logprobs(client, is_streamed):
    answer = chat(client, logprobs=True, top_logprobs=2, stream=is_streamed)
    chunks = answer if is_streamed else [answer]
    content = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert "".join(entry.token for entry in content) == "hello"
    assert content[0].bytes == [ord("h")]
    assert [top.token for top in content[0].top_logprobs] == ["h", "~"]
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -9999.0]


def test_chat_logprobs_without_top(client, llm):
    answer = chat(client, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert llm.opened[0].params.sampling.num_logprobs == 0


def test_completion_logprobs(client):
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == list("hello")
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.top_logprobs[0] == {"h": -0.5, "~": -9999.0}
    chunks = list(complete(client, logprobs=0, stream=True))
    offsets = [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2, 3, 4]


def test_every_sampling_parameter_reaches_the_engine(client, llm):
    chat(
        client,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": -100, "8": 2.5},
        stop=["a", "b"],
        max_completion_tokens=9,
        seed=3,
        user="me",
        metadata={"a": "b"},
        extra_body={
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    params = llm.opened[0].params
    assert (params.max_tokens, params.stop) == (9, ("a", "b"))
    sampling = params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 4)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert (sampling.logit_bias, sampling.seed) == ({7: -100, 8: 2.5}, 3)
    assert llm.tokenizer.seen[2] == {"enable_thinking": False}
    complete(client, stop="x")
    assert llm.opened[1].params.stop == ("x",)


def tool(name, **more):
    return {"type": "function", "function": {"name": name, "parameters": {}} | more}


def test_tool_calls(client, llm):
    llm.text = "Hmk<<"
    answer = chat(client, tools=[tool("f")])
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.arguments for call in message.tool_calls] == ['{"a":4}', '{"a":5}']
    assert len({call.id for call in message.tool_calls}) == 2
    assert (message.reasoning_content, message.content) == ("H", "mk")
    assert llm.opened[0].tools == [tool("f")]
    assert llm.opened[0].params.sampling.grammar is None


def test_tool_calls_in_a_stream(client, llm):
    llm.text = "<<"
    calls = [
        call
        for chunk in chat(client, tools=[tool("f")], stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    assert [call.index for call in calls] == [0, 1]
    assert [call.function.name for call in calls] == ["f", "f"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_one_call_at_a_time_ends_after_the_first(client, llm, is_streamed):
    llm.text, llm.step_s = "<" * 1000, 0.002
    answer = chat(client, tools=[tool("f")], parallel_tool_calls=False, stream=is_streamed)
    choices = [chunk.choices[0] for chunk in (answer if is_streamed else [answer])]
    said = [choice.delta if is_streamed else choice.message for choice in choices]
    assert sum(len(words.tool_calls or []) for words in said) == 1
    assert choices[-1].finish_reason == "tool_calls"
    assert llm.wait_until_idle()


def test_tool_choice(client, llm):
    tools = [tool("f"), tool("g", strict=True)]
    chat(client, tools=tools, tool_choice="required")
    chat(client, tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    chat(client, tools=tools, tool_choice="none")
    grammars = [generation.params.sampling.grammar for generation in llm.opened]
    assert grammars[0] and grammars[1] and grammars[0] != grammars[1]
    assert grammars[2] is None
    assert llm.opened[2].tools is None


def test_response_formats(client, llm):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "n", "schema": schema}
    chat(client, response_format={"type": "json_schema", "json_schema": named})
    chat(client, response_format={"type": "json_object"})
    chat(client, response_format={"type": "text"})
    grammars = [generation.params.sampling.grammar for generation in llm.opened]
    assert grammars[0] and grammars[1] and grammars[2] is None


def refusal(client, **options):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **options)
    return caught.value


def test_errors_have_openai_types_and_codes(llm):
    with served(llm, api_key="secret") as server:
        wrong, right = server.openai("wrong"), server.openai("secret")
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as caught:
            chat(right, model="other")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as caught:
            chat(right, temperature=101)
        assert caught.value.param == "temperature"
        assert caught.value.type == "invalid_request_error"
        too_long = refusal(right, messages=[{"role": "user", "content": "x" * 500}])
        assert (too_long.status_code, too_long.code) == (413, "context_length_exceeded")
        assert refusal(right, messages=[{"role": "user", "content": "refuse"}]).param == "messages"
        llm.open_limit = 0
        with pytest.raises(openai.RateLimitError) as caught:
            chat(right)
        assert caught.value.response.headers["retry-after"] == "2"
        llm.error = NotReadyError("draining")
        unready = refusal(right, stream=True)
        assert unready.status_code == 503
        assert "retry-after" in unready.response.headers
        assert server.http().get("/v1/nothing").json()["error"]["message"]
        assert server.http().get("/health").status_code == 200


def test_unknown_routes_and_methods(llm):
    with served(llm) as server:
        http = server.http()
        assert http.get("/nothing").status_code == 404
        assert http.get("/v1/models/").status_code == 404
        response = http.get("/v1/completions")
        assert response.status_code == 405
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "mlx-dist")
    assert client.models.retrieve(MODEL).id == client.models.retrieve("tiny").id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_ready_follows_the_ranks(llm):
    with served(llm, ready_age_s=6.0) as server:
        http = server.http()
        assert http.get("/ready").status_code == 200
        for stats in ({"last_step_age_s": 6.5}, {"is_draining": True}):
            llm.set_stats(**stats)
            response = http.get("/ready")
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert http.get("/health").status_code == 200


def test_metrics(llm):
    with served(llm) as server:
        http = server.http()
        chat(server.openai())
        text = http.get("/metrics").text
    for line in (
        "mlx_dist_requests_waiting 3.0",
        "mlx_dist_sequences_active 2.0",
        'mlx_dist_kv_reserved_bytes{rank="1"} 20.0',
        'mlx_dist_busy_seconds_total{rank="0"} 1.5',
        "mlx_dist_completion_tokens_total 88.0",
        "mlx_dist_time_to_first_token_seconds_count 1.0",
        "mlx_dist_inter_token_seconds_count 4.0",
        'mlx_dist_http_responses_total{status="200"} 1.0',
    ):
        assert line in text.splitlines()


def test_cluster(llm):
    with served(llm) as server:
        http = server.http()
        cluster = http.get("/cluster").json()
    assert cluster["model"] == MODEL
    assert cluster["ranks"][1] == {"rank": 1, "host": "b", "layers": [2, 4], "weights_bytes": 2000}
    assert cluster["stats"]["kv_budget_bytes"] == [100, 200]


def test_a_grammar_waits_for_the_end_of_reasoning_that_the_prompt_begins(client, llm):
    for content in ("so", "so?"):
        messages = [{"role": "user", "content": content}]
        chat(client, messages=messages, response_format={"type": "json_object"})
    plain, later = (generation.params.sampling.grammar for generation in llm.opened)
    assert "reasoning" not in plain
    assert "reasoning" in later


def test_the_api_describes_itself(llm):
    with served(llm) as server:
        described = server.http().get("/openapi.json").json()
    shapes = described["components"]["schemas"]
    assert "chat_template_kwargs" in shapes["ChatRequest"]["properties"]
    assert "/v1/completions" in described["paths"]
