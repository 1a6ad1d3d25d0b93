"""A request that is not right is refused by name, and never reaches the engine."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_llm import FakeLLM, served

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "org/tiny", "messages": [USER]}
TEXT = {"model": "org/tiny", "prompt": "hi"}
PATHS = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}
TOOL = {"type": "function", "function": {"name": "f"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.fixture(scope="module")
def llm():
    return FakeLLM("ok")


@pytest.fixture(scope="module")
def http(llm):
    with served(llm, max_json_depth=20, max_choices=4, max_stops=2, max_tools=3) as server:
        yield server.http()


@pytest.fixture
def post(llm, http):
    """Posts what differs from a good body of this kind; tells the answer and what was opened."""
    llm.opened.clear()

    def send(kind, **changes):
        path, good = PATHS[kind]
        return http.post(path, json=good | changes)

    return send


BOTH = {
    "temperature": [-0.1, 100.1, 0.005, "1", True, [], 10**400],
    "top_p": [0, 1.1, "x"],
    "top_k": [-1, 1.5, (1 << 31) + 1, True],
    "min_p": [-1, 2],
    "repetition_penalty": [0, 101],
    "presence_penalty": [101, "0"],
    "frequency_penalty": [-101],
    "n": [0, -1, 5, 1.0, 10**30],
    "max_tokens": [0, -1, "5", 1 << 31],
    "seed": [1.5, "1", 1 << 64, -(1 << 63) - 1],
    "stop": ["", [""], [1], ["a", "b", "c"], {}],
    "logit_bias": [[], {"a": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"1" * 30: 1}],
    "stream": ["true", 1],
    "stream_options": [{}, {"include_usage": 1}, {"other": 1}],
    "model": [None, 5, []],
    "user": [5],
    "metadata": [{"a": 1}, "x"],
    "nonsense": [1, None],
}
CHAT_ONLY = {
    "messages": [None, [], "hi", [{}], [5], [USER | {"role": "robot"}], [{"role": "user"}]],
    "max_completion_tokens": [0],
    "logprobs": [1, "yes"],
    "top_logprobs": [1],
    "tools": [[TOOL] * 4, [{}], [{"type": "web"}], [TOOL | {"extra": 1}], [STRICT]],
    "tool_choice": ["required", "maybe", {"type": "function"}, {"type": "function", "x": 1}],
    "parallel_tool_calls": [1],
    "response_format": [
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "n"}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": "bad"}}},
        {"type": "json_object", "json_schema": {"name": "n", "schema": {}}},
    ],
    "chat_template_kwargs": [
        {"a": {}},
        {"A-b": 1},
        [],
        {f"k{'x' * i}": 1 for i in range(33)},
    ],
    "functions": [[]],
    "function_call": ["auto"],
    "store": [True],
    "service_tier": ["flex"],
    "modalities": [["audio"]],
    "audio": [{}],
    "prediction": [{}],
    "reasoning_effort": ["low"],
    "verbosity": ["low"],
    "web_search_options": [{}],
}
TEXT_ONLY = {
    "prompt": [None, [], [[]], 5, [1, "a"], ["a", [1]], [True], [1.5], {}, ["a"] * 5],
    "logprobs": [-1, 21, True],
    "best_of": [2],
    "echo": [True],
    "suffix": ["x"],
    "messages": [[USER]],
}
WRONG = [
    pytest.param(kind, field, value, id=f"{kind} {field} {str(value)[:30]}")
    for kind, table in (
        ("chat", BOTH | CHAT_ONLY),
        ("text", BOTH | TEXT_ONLY),
    )
    for field, values in table.items()
    for value in values
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_a_wrong_field_is_named(post, llm, kind, field, value):
    response = post(kind, **{field: value})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert error["param"] in error["message"] or field in error["message"]
    assert not llm.opened


HARMLESS = {
    "temperature": [None, 0, 0.01, 100],
    "n": [None, 1],
    "stop": [None, []],
    "logit_bias": [None, {}],
    "seed": [None, 0, -(1 << 63), (1 << 64) - 1],
    "stream": [None, False],
    "stream_options": [None],
    "user": ["me", None],
    "metadata": [{"a": "b"}, {}],
    "prompt_cache_key": ["k"],
    "safety_identifier": ["s"],
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, value)
        for kind, table in (
            (
                "chat",
                HARMLESS
                | {
                    "logprobs": [None, False],
                    "tools": [None, []],
                    "tool_choice": [None, "auto", "none"],
                    "parallel_tool_calls": [True, False, None],
                    "response_format": [{"type": "text"}, None],
                    "chat_template_kwargs": [{"a": None, "b": 1.5, "c": "x", "d": False}],
                    "functions": [None],
                    "store": [False],
                    "service_tier": ["auto", "default"],
                    "modalities": [["text"]],
                    "verbosity": ["medium", None],
                    "reasoning_effort": [None],
                    "max_completion_tokens": [5],
                },
            ),
            (
                "text",
                HARMLESS
                | {"best_of": [1], "echo": [False], "suffix": [None], "logprobs": [None, 0, 20]},
            ),
        )
        for field, values in table.items()
        for value in values
    ],
)
def test_what_has_no_effect_is_taken(post, kind, field, value):
    assert post(kind, **{field: value}).status_code == 200


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": ["hi"]},
        {"role": "user", "content": None},
        {"role": "user", "content": "x", "extra": 1},
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        {"role": "user", "content": "x", "tool_call_id": "1"},
        {"role": "tool", "content": "x"},
        {"role": "assistant"},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]},
        {"role": "assistant", "content": "x", "audio": {"id": "x"}},
        {"role": "function", "name": "f", "content": "x"},
    ],
)
def test_a_wrong_message_is_named(post, llm, message):
    response = post("chat", messages=[USER, message])
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages[1]")
    assert not llm.opened


@pytest.mark.parametrize(
    "message",
    [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "developer", "content": "x", "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "assistant", "content": "x", "annotations": [], "audio": None},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ],
)
def test_messages_of_every_role_are_taken(post, message):
    assert post("chat", messages=[message, USER]).status_code == 200


def test_fields_that_contradict_each_other(post):
    def param(**changes):
        response = post("chat", **changes)
        assert response.status_code == 400
        return response.json()["error"]["param"]

    as_json = {"type": "json_object"}
    other = {"type": "function", "function": {"name": "g"}}
    assert param(max_tokens=1, max_completion_tokens=2) == "max_tokens"
    assert param(logprobs=True, top_logprobs=21) == "top_logprobs"
    assert param(tools=[TOOL], response_format=as_json) == "response_format"
    assert param(tools=[TOOL], tool_choice=other) == "tool_choice"
    assert post("chat", max_tokens=1, max_completion_tokens=1).status_code == 200
    assert post("chat", tools=[TOOL], tool_choice="none", response_format=as_json).is_success


BODIES = {
    "nothing": b"",
    "not JSON": b"{",
    "more than JSON": b"{} {}",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "NaN": b'{"model":"org/tiny","prompt":"a","temperature":NaN}',
    "infinity": b'{"model":"org/tiny","prompt":"a","temperature":Infinity}',
    "too large for a float": b'{"model":"org/tiny","prompt":"a","temperature":1e999}',
    "a huge integer": b'{"model":"org/tiny","prompt":"a","seed":' + b"9" * 10_000 + b"}",
    "a huge token": b'{"model":"org/tiny","prompt":[' + b"9" * 4000 + b"]}",
    "half a pair": b'{"model":"org/tiny","prompt":"\\ud83d"}',
    "the other half": b'{"model":"org/tiny","prompt":"\\ude00"}',
    "half a pair in a key": b'{"model":"org/tiny","prompt":"a","\\ud83d":1}',
    "not UTF-8": b'{"model":"org/tiny","prompt":"\xff"}',
    "UTF-16": '{"model":"org/tiny","prompt":"a"}'.encode("utf-16"),
    "with a mark": b'\xef\xbb\xbf{"model":"org/tiny","prompt":"a"}',
    "a little too deep": b'{"model":"org/tiny","prompt":' + b"[" * 20 + b"]" * 20 + b"}",
    "much too deep": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "many lists": b'{"model":"org/tiny","prompt":[' + b"[1]," * 200_000 + b"[1]]}",
    "many keys": json.dumps({"model": "org/tiny"} | {str(i): 1 for i in range(2000)}).encode(),
    "a control character": b'{"model":"org/tiny","prompt":"\x01"}',
    "a long name": b'{"' + b"x" * 100_000 + b'":1}',
    "a comment": b'{"model":"org/tiny",/**/"prompt":"a"}',
    "a comma": b'{"model":"org/tiny","prompt":"a",}',
}


@pytest.mark.parametrize("path", [path for path, _ in PATHS.values()])
@pytest.mark.parametrize("name", BODIES)
def test_a_wrong_body_is_refused(http, llm, name, path):
    llm.opened.clear()
    headers = {"content-type": "application/json"}
    response = http.post(path, content=BODIES[name], headers=headers)
    assert response.status_code == 400
    assert len(response.content) < 1000
    assert response.json()["error"]["message"]
    assert not llm.opened


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "content", "role", "x"]), children
        )
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from(sorted(BOTH | CHAT_ONLY | TEXT_ONLY))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(PATHS)), st.dictionaries(FIELDS, json_values, max_size=3))
def test_nothing_is_an_internal_error(http, kind, changes):
    path, good = PATHS[kind]
    body = json.dumps(good | changes).encode()
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
