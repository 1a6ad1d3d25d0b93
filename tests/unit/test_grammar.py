"""Whatever the logits, the answer fits its grammar; whatever the schema, the server lives."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm import load
from mlx_lm.generate import generate_step

from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.reader import ToolCall
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import RequestError
from mlx_dist.model.grammar import Grammars, after_reasoning, json_grammar, tool_grammar
from tests.models import write_tool_model

CONFIG = {"max_position_embeddings": 2048, "eos_token_id": 0}
END = 0
VOCAB_SIZE = 800

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "cake"]}, "maxItems": 3},
        "boss": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "boss"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "now", "description": "The time."}},
    {"type": "function", "function": {"name": "note", "parameters": {}}},
    {
        "type": "function",
        "function": {
            "name": 'add "two"',
            "parameters": {
                "$defs": {"number": {"type": "integer", "maximum": 99, "minimum": 0}},
                "properties": {k: {"$ref": "#/$defs/number"} for k in "xy"},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MODEL_DIR, CONFIG)


@pytest.fixture(scope="module")
def grammars():
    return Grammars(MODEL_DIR, CONFIG, VOCAB_SIZE)


@pytest.fixture(scope="module")
def tool_folder(tmp_path_factory):
    return write_tool_model(tmp_path_factory.mktemp("tools"), reasons=True)


def fits(value, schema, root=None):
    """Whether `value` fits `schema`, as far as these tests use JSON Schema."""
    root = root or schema
    if "$ref" in schema:
        return fits(value, root, root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    if kind == "object":
        known = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(known))
            and all(fits(v, known[k], root) for k, v in value.items() if k in known)
        )
    if kind == "array":
        most, least = schema.get("maxItems", 10**9), schema.get("minItems", 0)
        items = schema.get("items", {})
        return (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(fits(v, items, root) for v in value)
        )
    if kind == "string":
        return isinstance(value, str) and (
            len(value) <= schema.get("maxLength", 10**9)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        low, high = schema.get("minimum", -(10**99)), schema.get("maximum", 10**99)
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if kind == "boolean":
        return isinstance(value, bool)
    return value is None if kind == "null" else True


class Chance:
    """Random logits, from a seed. Tokens that close things are likelier, so that answers end."""

    def __init__(self, tokenizer, seed):
        self.random = np.random.default_rng(seed)
        texts = [tokenizer.token_bytes(t) for t in range(VOCAB_SIZE)]
        self.bias = np.array([2.0 * text.startswith((b'"', b"}", b"]")) for text in texts])
        self.bias[END] = 4

    def __call__(self):
        noise = self.random.gumbel(size=VOCAB_SIZE)
        return mx.array((noise + self.bias).astype(np.float32))[None]


def answer(grammars, grammar, logits, most=3000):
    """The tokens before the stop token, each the likeliest that the grammar allows."""
    matcher = grammars.matcher(grammar)
    tokens = []
    while True:
        token = int(mx.argmax(matcher.mask(logits())))
        matcher.consume(token)
        if token == END:
            return tokens
        tokens.append(token)
        assert len(tokens) < most, "the answer does not end"


def text_of(tokenizer, tokens):
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {},
        PERSON,
        {"type": "integer", "minimum": -5, "maximum": 1000},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        {"type": "string", "pattern": "^[a-f]{2,9}-[0-9]+$", "maxLength": 20},
        {"enum": ["a", 1, None, True, "日本"]},
    ],
    ids=str,
)
def test_an_answer_fits_its_schema_whatever_the_logits(tokenizer, grammars, schema):
    grammar = json_grammar(schema)
    grammars.check(grammar)
    wanted = {"type": "object"} if schema is None else schema
    for seed in range(8):
        value = json.loads(text_of(tokenizer, answer(grammars, grammar, Chance(tokenizer, seed))))
        assert fits(value, wanted), value


names = st.sampled_from(["a", "b", "long name", 'quo"te', "é"])
schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": 0, "maximum": 99},
            {"type": "string", "maxLength": 5},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["x", 7, "y z"]},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda one: {"type": "array", "items": one, "maxItems": 3}, inner),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3)),
        st.dictionaries(names, inner, max_size=4).flatmap(
            lambda known: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": known,
                    "required": required,
                    "additionalProperties": False,
                },
                st.lists(st.sampled_from(sorted(known)), unique=True) if known else st.just([]),
            )
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schemas, st.integers(0, 2**32))
def test_any_schema_is_kept_to(tokenizer, grammars, schema, seed):
    grammar = json_grammar(schema)
    grammars.check(grammar)
    text = text_of(tokenizer, answer(grammars, grammar, Chance(tokenizer, seed)))
    assert fits(json.loads(text), schema)


def test_white_space_ends(tokenizer, grammars):
    # A model that likes nothing better than spaces.
    liked = [t for t in range(768) if not tokenizer.token_bytes(t).strip()]
    logits = Chance(tokenizer, 0).bias.astype(np.float32)
    logits[liked] = 9
    tokens = answer(grammars, json_grammar(PERSON), lambda: mx.array(logits)[None])
    text = text_of(tokenizer, tokens)
    assert fits(json.loads(text), PERSON)
    assert len(text) < 1000


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_json_may_be_written_as_usual(tokenizer, grammars, indent):
    value = {"name": "a b", "age": 7, "likes": ["tea"], "boss": None}
    value |= {"boss": dict(value)}
    matcher = grammars.matcher(json_grammar(PERSON))
    for token in (*tokenizer.encode_text(json.dumps(value, indent=indent)), END):
        assert matcher.mask(mx.zeros((1, VOCAB_SIZE)))[0, token] == 0
        matcher.consume(token)


def test_after_the_end_only_stop_tokens_are_allowed(tokenizer, grammars):
    matcher = grammars.matcher(json_grammar({"const": 7}))
    for token in tokenizer.encode_text("7"):
        matcher.consume(token)
    masked = matcher.mask(mx.zeros((1, VOCAB_SIZE)))[0].tolist()
    assert [t for t, logit in enumerate(masked) if logit == 0] == [END]
    assert set(masked) == {0.0, -np.inf}
    matcher.consume(END)
    matcher.consume(END)
    assert int(mx.argmax(matcher.mask(mx.zeros((1, VOCAB_SIZE))))) == END


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_logits_keep_their_type(grammars, dtype):
    masked = grammars.matcher(json_grammar(None)).mask(mx.ones((1, VOCAB_SIZE), dtype))
    assert masked.dtype == dtype and masked.shape == (1, VOCAB_SIZE)


def test_a_token_that_does_not_fit_ends_the_answer(tokenizer, grammars):
    matcher = grammars.matcher(json_grammar(None))
    matcher.consume(tokenizer.encode_text("x")[0])
    assert int(mx.argmax(matcher.mask(mx.zeros((1, VOCAB_SIZE))))) == END


def test_sequences_of_one_grammar_do_not_meet(tokenizer, grammars):
    first, second = (grammars.matcher(json_grammar(PERSON)) for _ in range(2))
    for token in tokenizer.encode_text('{"name": "a'):
        first.consume(token)
    allowed = second.mask(mx.zeros((1, VOCAB_SIZE)))[0].tolist()
    assert [text_of(tokenizer, [t]) for t, x in enumerate(allowed) if x == 0] == ["{"]


def test_every_token_that_ends_an_answer_may_end_it():
    two = Grammars(MODEL_DIR, CONFIG | {"eos_token_id": [3, 10**6]}, VOCAB_SIZE)
    matcher = two.matcher(json_grammar({"const": 7}))
    matcher.consume(Tokenizer(MODEL_DIR, CONFIG).encode_text("7")[0])
    allowed = matcher.mask(mx.zeros((1, VOCAB_SIZE)))[0].tolist()
    assert [t for t, x in enumerate(allowed) if x == 0] == [0, 3]


# Calls.


@pytest.fixture(scope="module")
def caller(tool_folder):
    return Tokenizer(tool_folder, CONFIG), Grammars(tool_folder, CONFIG, VOCAB_SIZE)


def calls_in(tokenizer, tokens):
    reader = tokenizer.reader((), tools=TOOLS, is_chat=True)
    pieces = [*map(reader.add, tokens), reader.finish()]
    assert not "".join(piece.text for piece in pieces).strip()
    return [call for piece in pieces for call in piece.tool_calls]


def is_call_of(call, tool):
    arguments = json.loads(call.arguments)
    if tool["name"] == "now":
        return call.name == "now" and arguments == {}
    if tool["name"] == "note":
        return call.name == "note" and isinstance(arguments, dict)
    return (
        call.name == tool["name"]
        and set(arguments) == {"x", "y"}
        and all(isinstance(n, int) and 0 <= n <= 99 for n in arguments.values())
    )


@pytest.mark.parametrize("index", range(len(TOOLS)))
def test_a_named_tool_is_called_once(caller, index):
    tokenizer, grammars = caller
    tool = TOOLS[index]["function"]
    grammar = tool_grammar(TOOLS, tool["name"], tokenizer.call_markers)
    grammars.check(grammar)
    for seed in range(4):
        tokens = answer(grammars, grammar, Chance(tokenizer, seed))
        assert (tokens[0], tokens[-1]) == (768, 769)
        [call] = calls_in(tokenizer, tokens)
        assert is_call_of(call, tool)


def test_some_tools_are_called_if_a_call_is_required(caller):
    tokenizer, grammars = caller
    grammar = tool_grammar(TOOLS, None, tokenizer.call_markers)
    grammars.check(grammar)
    seen = set()
    for seed in range(12):
        calls = calls_in(tokenizer, answer(grammars, grammar, Chance(tokenizer, seed)))
        assert calls
        assert all(any(is_call_of(c, t["function"]) for t in TOOLS) for c in calls)
        seen |= {call.name for call in calls}
    assert len(seen) > 1


def test_markers_that_are_several_tokens_are_kept_to(tokenizer, grammars):
    markers = tokenizer.encode_text("<call>"), tokenizer.encode_text("</call>")
    grammar = tool_grammar(TOOLS, "now", markers)
    grammars.check(grammar)
    tokens = answer(grammars, grammar, Chance(tokenizer, 1))
    text = text_of(tokenizer, tokens)
    assert tuple(tokens[: len(markers[0])]) == markers[0]
    assert json.loads(text.removeprefix("<call>").removesuffix("</call>"))["name"] == "now"


def test_the_grammar_begins_where_reasoning_ends(caller):
    tokenizer, grammars = caller
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}]).tokens
    end = tokenizer.open_reasoning(prompt)
    for grammar in (json_grammar(PERSON), tool_grammar(TOOLS, "now", tokenizer.call_markers)):
        assert after_reasoning(grammar, ()) == grammar
        after = after_reasoning(grammar, end)
        grammars.check(after)
        chance = Chance(tokenizer, 3)
        chance.bias[end[0]] = 4
        reader = tokenizer.reader((), tools=TOOLS, is_chat=True, prompt=prompt)
        pieces = list(map(reader.add, answer(grammars, after, chance)))
        assert "".join(piece.reasoning for piece in pieces)
        calls = [call for piece in pieces for call in piece.tool_calls]
        text = "".join(piece.text for piece in pieces)
        assert calls == [ToolCall("now", "{}")] or fits(json.loads(text), PERSON)


def test_a_model_with_calls_of_another_form_is_refused(tokenizer):
    with pytest.raises(RequestError, match='not available for this model; use "auto"'):
        tool_grammar(TOOLS, None, tokenizer.call_markers)


# The embedded model itself.


def test_the_embedded_model_keeps_to_a_schema_and_ends(tokenizer):
    model, _ = load(str(MODEL_DIR))
    grammars = Grammars(MODEL_DIR, CONFIG, 768)
    schema = PERSON | {"required": ["name", "age"], "properties": dict(PERSON["properties"])}
    del schema["properties"]["boss"]
    matcher = grammars.matcher(json_grammar(schema))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Who are you?"}]).tokens
    tokens = []

    def consumed(seen, logits_1V):
        if len(seen) > len(prompt):
            matcher.consume(int(seen[-1]))
        return matcher.mask(logits_1V)

    steps = generate_step(mx.array(prompt), model, max_tokens=400, logits_processors=[consumed])
    for token, _ in steps:
        if token == END:
            break
        tokens.append(token)
    assert token == END, text_of(tokenizer, tokens)
    assert fits(json.loads(text_of(tokenizer, tokens)), schema)


# Schemas that mean harm, or do not mean to.


def chain(length, wrap):
    definitions = {str(i): wrap({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)}
    return {"$defs": definitions | {str(length): {}}, "$ref": "#/$defs/0"}


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def strings(patterns):
    return [{"type": "string", "pattern": pattern} for pattern in patterns]


COSTLY = {
    "references that overflow the stack": chain(
        900, lambda ref: {"type": "object", "properties": {"x": ref}}
    ),
    "patterns that take for ever to intersect": {
        "allOf": strings(f"[a-z]{i}.*" for i in range(32))
    },
    "pairs of patterns": {
        "type": "object",
        "patternProperties": {f"^a{i:04d}x.*": {} for i in range(400)},
    },
    "multiples that take much memory": {
        "prefixItems": [{"type": "integer", "multipleOf": 49_999 + 2 * i} for i in range(50)]
    },
}
UNUSABLE = {
    "too many bytes": ({"description": "x" * 140_000}, "140[0-9]{3} bytes; the most is"),
    "a large enum": ({"enum": [f"value {i}" for i in range(50_000)]}, "bytes; the most is"),
    "too many properties": ({"properties": {f"p{i}": {} for i in range(1001)}}, "more than 1000"),
    "too deep": (nested(100), "more than 64 deep"),
    "far too deep": (nested(900), "more than 64 deep"),
    "a regex too deep": (strings(["(" * 5000 + "a" + ")" * 5000])[0], "regex parse error"),
    "no regex": (strings(["("])[0], "regex parse error"),
    "look-ahead": (strings(["^(?=a)b"])[0], "regex parse error"),
    "a file": ({"$ref": "file:///etc/passwd"}, "not present in a registry"),
    "a URL": ({"$ref": "http://127.0.0.1:9/schema"}, "not present in a registry"),
    "no such type": ({"type": "banana"}, "Invalid type: banana"),
    "a keyword that is not supported": ({"not": {"type": "string"}}, "not"),
    "a format that is not known": ({"type": "string", "format": "color"}, "format: color"),
    "half a character": ({"const": "\ud800"}, ""),
    "no number": ({"const": float("nan")}, ""),
    "nothing fits": (
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        "Unsatisfiable",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_schema_that_takes_too_much_is_refused(grammars, name):
    grammar = json_grammar(COSTLY[name])
    with pytest.raises(RequestError, match="takes too much to compile"):
        grammars.check(grammar)


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_schema_that_cannot_be_used_is_refused(grammars, name):
    schema, reason = UNUSABLE[name]
    with pytest.raises(RequestError, match=f"JSON schema.*{reason}"):
        grammars.check(json_grammar(schema))


def test_the_arguments_of_a_tool_are_checked_too(caller):
    tokenizer, grammars = caller
    function = {"name": "f", "parameters": COSTLY["references that overflow the stack"]}
    grammar = tool_grammar([{"function": function}], "f", tokenizer.call_markers)
    with pytest.raises(RequestError, match="takes too much to compile"):
        grammars.check(grammar)


def test_options_for_the_compiler_are_not_the_users(tokenizer, grammars):
    schema = {"x-guidance": {"item_separator": ";", "whitespace_flexible": False}, "type": "array"}
    grammar = json_grammar(schema | {"items": {"enum": [1]}, "minItems": 2, "maxItems": 2})
    grammars.check(grammar)
    text = text_of(tokenizer, answer(grammars, grammar, Chance(tokenizer, 0)))
    assert json.loads(text) == [1, 1]


def test_objects_of_many_properties_work(tokenizer, grammars):
    schema = {"type": "object", "properties": {f"p{i}": {"enum": [i]} for i in range(1000)}}
    grammar = json_grammar(schema | {"additionalProperties": False})
    grammars.check(grammar)
    value = json.loads(text_of(tokenizer, answer(grammars, grammar, Chance(tokenizer, 0), 9000)))
    assert value and all(key == f"p{item}" for key, item in value.items())


def test_a_tokenizer_that_is_not_supported_is_said_to_be(tmp_path):
    vocabulary = {"<|end|>": 0, "a": 1, "b": 2}
    backend = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
    }
    backend |= {"added_tokens": [], "truncation": None, "padding": None, "normalizer": None}
    backend |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}'
    )
    with pytest.raises(RequestError, match="tokenizer does not support response_format"):
        Grammars(tmp_path, CONFIG, 3).check(json_grammar(None))
