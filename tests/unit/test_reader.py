"""Text, reasoning and calls come out as they were generated, however the tokens cut them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine

from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.reader import Piece, Reader, ToolCall, _Calls
from mlx_dist.engine.text import Tokenizer
from tests.models import write_tool_model

CONFIG = {"max_position_embeddings": 2048}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
MARKERS = {
    "normal": [("<think>", "reasoning"), ("<tool_call>", "tool")],
    "reasoning": [("</think>", "normal"), ("<tool_call>", "tool")],
    "tool": [("</tool_call>", "normal")],
}
CALLS = _Calls("<tool_call>", "</tool_call>", json.loads)
ADD = '{"name": "add", "arguments": {"x": 1}}'


class Pieces:
    """A detokenizer whose tokens are indices into a list of pieces."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.last_segment = ""

    def add_token(self, token):
        self.last_segment = self.pieces[token]

    def finalize(self):
        self.last_segment = ""


def joined(pieces):
    return Piece(
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        tuple(call for piece in pieces for call in piece.tool_calls),
    )


def read(pieces, stop=(), state="normal", is_chat=True):
    machine = TextStateMachine(MARKERS) if is_chat else None
    reader = Reader(Pieces(pieces), tuple(stop), machine, state, CALLS if is_chat else None)
    return joined([*map(reader.add, range(len(pieces))), reader.finish()])


# Stop strings.

letters = st.text("abc", max_size=3)


def up_to_stop(text, stop):
    """`text` before the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))]
    return text


@settings(deadline=None)
@given(st.lists(letters, max_size=12), st.lists(st.text("abc", min_size=1), max_size=3))
def test_stop_strings_end_the_text_across_any_token_border(pieces, stop):
    assert read(pieces, stop, is_chat=False) == Piece(up_to_stop("".join(pieces), stop))


def test_nothing_of_a_stop_string_is_shown_early():
    reader = Reader(Pieces(["one", " E", "N", "D", " two"]), ("END",))
    assert [reader.add(i).text for i in range(4)] == ["one", " ", "", ""]
    assert reader.is_stopped
    assert reader.add(4) == reader.finish() == Piece()


def test_what_only_looked_like_a_stop_string_is_shown():
    reader = Reader(Pieces(["one E", "N", "OUGH", " EN"]), ("END",))
    assert "".join(reader.add(i).text for i in range(4)) == "one ENOUGH "
    assert reader.finish() == Piece("EN")
    assert not reader.is_stopped


# Reasoning and calls.

parts = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", ADD, "{}", "ab", "<", "</t", "a<b", " "]
)


def whole(text, stop, state):
    """What a reader should make of `text`, read in one go."""
    events = []
    while True:
        found = [(text.find(m), m, to) for m, to in MARKERS[state] if m in text]
        at, marker, target = min(found, default=(len(text), "", None))
        events.append((state, text[:at], target is not None))
        if target is None:
            break
        text, state = text[at + len(marker) :], target
    visible, reasoning, calls = "", "", ()
    for kind, part, is_ended in events:
        if kind == "reasoning":
            reasoning += part
            continue
        if kind == "tool":
            read_calls = CALLS.read(part)
            calls += read_calls
            part = "" if read_calls else f"<tool_call>{part}{'</tool_call>' if is_ended else ''}"
        visible += part
        if (cut := up_to_stop(visible, stop)) != visible or any(s in visible for s in stop):
            return Piece(cut, reasoning, calls)
    return Piece(visible, reasoning, calls)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(parts, max_size=8).map("".join),
    st.data(),
    st.lists(st.sampled_from(["b", "ab<", "<t", " a", "</tool_call>", "}"]), max_size=2),
    st.sampled_from(["normal", "reasoning"]),
)
def test_pieces_make_up_the_whole_answer_at_any_token_borders(text, data, stop, state):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces, stop, state) == whole(text, stop, state)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MODEL_DIR, CONFIG)


@pytest.fixture(scope="module")
def reasons(tmp_path_factory):
    return Tokenizer(write_tool_model(tmp_path_factory.mktemp("reasons"), reasons=True), CONFIG)


def answer(tokenizer, text, **options):
    reader = tokenizer.reader((), **options)
    tokens = tokenizer.encode_text(text) if text else ()
    return joined([*map(reader.add, tokens), reader.finish()])


CALL = f"<tool_call>\n{ADD}\n</tool_call>"


def test_reasoning_and_calls_are_told_from_the_text(reasons):
    text = f"<think>Hm.</think>So:{CALL}\n{CALL} done"
    call = ToolCall("add", '{"x": 1}')
    assert answer(reasons, text, is_chat=True, tools=TOOLS) == Piece(
        "So:\n done", "Hm.", (call, call)
    )


def test_a_call_comes_as_soon_as_it_is_whole(reasons):
    reader = reasons.reader((), is_chat=True, tools=TOOLS)
    pieces = list(map(reader.add, reasons.encode_text(CALL)))
    assert pieces[-1] == Piece(tool_calls=(ToolCall("add", '{"x": 1}'),))
    assert set(pieces[:-1]) == {Piece()}


def test_without_tools_a_call_is_text(reasons):
    text = f"<think>a {CALL}</think>b {CALL} c"
    assert answer(reasons, text, is_chat=True) == Piece(f"b {CALL} c", f"a {CALL}")


def test_without_a_chat_all_is_text(reasons):
    text = f"<think>a</think>{CALL}"
    assert answer(reasons, text, tools=TOOLS) == Piece(text)


def test_a_prompt_that_opens_the_reasoning_is_heeded(reasons):
    chat = [{"role": "user", "content": "Hello"}]
    opened = reasons.encode_chat(chat).tokens
    assert answer(reasons, "Hm.</think>So.", is_chat=True, prompt=opened) == Piece("So.", "Hm.")
    closed = reasons.encode_chat(chat, template_args={"enable_thinking": False}).tokens
    assert answer(reasons, "So.", is_chat=True, prompt=closed) == Piece("So.")


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "{",
        "[]",
        "3",
        '{"name": "add"',
        '{"arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "add", "arguments": "{"}',
        '{"name": "add", "arguments": NaN}',
        '{"name": "\\ud800", "arguments": {}}',
        "[" * 5000,
    ],
)
def test_what_is_no_call_is_given_back_as_text(inside):
    text = f"a<tool_call>{inside}</tool_call>b"
    assert read([text]) == Piece(text)
    assert read([text.removesuffix("</tool_call>b")]) == Piece(text.removesuffix("</tool_call>b"))


@pytest.mark.parametrize(
    ("inside", "calls"),
    [
        ('{"name": "f"}', [("f", "{}")]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
        ('[{"name": "f", "arguments": {}}, {"name": "g"}]', [("f", "{}"), ("g", "{}")]),
        ('{"name": "f", "arguments": {"é": "日"}}', [("f", '{"é": "日"}')]),
    ],
)
def test_calls_come_in_several_forms(inside, calls):
    assert read([f"<tool_call>{inside}"]) == Piece(tool_calls=tuple(ToolCall(*c) for c in calls))


def test_a_stop_string_ends_neither_reasoning_nor_calls(reasons):
    reader = reasons.reader(("1", "Hm"), is_chat=True, tools=TOOLS)
    tokens = reasons.encode_text(f"<think>Hm 1</think>a{CALL}b1c")
    assert joined([*map(reader.add, tokens)]) == Piece("ab", "Hm 1", (ToolCall("add", '{"x": 1}'),))
    assert reader.is_stopped


# Characters.


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_tokens_become_the_same_text_again(tokenizer, text):
    prompt = tokenizer.encode_text("Q: ")
    assert answer(tokenizer, text, prompt=prompt) == Piece(text)


@pytest.mark.parametrize("prompt", ["Hello", "Hello ", "日", "a\n", "<|user|>"])
@pytest.mark.parametrize("text", [" world", "world", "  x", "\n", "🙂"])
def test_a_text_goes_on_where_its_prompt_ends(tokenizer, prompt, text):
    tokens = tokenizer.encode_text(prompt)
    assert answer(tokenizer, text, prompt=tokens) == Piece(text)


def test_no_character_comes_in_parts(tokenizer):
    # One token a byte.
    byte_of = {tokenizer.token_bytes(t): t for t in range(768)}
    tokens = [byte_of[bytes([byte])] for byte in "é🙂".encode()]
    reader = tokenizer.reader((), is_chat=True)
    texts = [reader.add(token).text for token in tokens]
    assert texts == ["", "é", "", "", "", "🙂"]
    assert reader.finish() == Piece()


def test_a_character_without_its_end_is_shown_as_such_at_the_end(tokenizer):
    byte_of = {tokenizer.token_bytes(t): t for t in range(768)}
    reader = tokenizer.reader((), is_chat=True)
    assert [reader.add(byte_of[bytes([byte])]) for byte in "🙂".encode()[:3]] == [Piece()] * 3
    assert reader.finish() == Piece("\ufffd")
