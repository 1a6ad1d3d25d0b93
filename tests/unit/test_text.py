"""Text comes out as it was generated, up to the first stop string and no further."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.text import TextStream, Tokenizer
from mlx_dist.errors import ModelError, RequestError

CONFIG = {"max_position_embeddings": 64}


class Pieces:
    """A detokenizer whose tokens are indices into a list of pieces."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.last_segment = ""

    def reset(self):
        pass

    def add_token(self, token):
        self.last_segment = self.pieces[token]

    def finalize(self):
        self.last_segment = ""


letters = st.text("abc", max_size=3)


@given(st.lists(letters, max_size=12), st.lists(st.text("abc", min_size=1), max_size=3))
def test_stop_strings_end_the_text_across_any_token_border(pieces, stop):
    stream = TextStream(Pieces(pieces), tuple(stop))
    shown = ""
    for token in range(len(pieces)):
        shown += stream.add(token)
        if stream.is_stopped:
            break
    shown += stream.finish()
    whole = "".join(pieces)
    ends = [whole.find(text) for text in stop if text in whole]
    if not ends:
        assert shown == whole
        return
    # The stop string that is complete first ends the text, where the earliest of them begins.
    first_complete = min(whole.find(text) + len(text) for text in stop if text in whole)
    assert whole.startswith(shown)
    assert not any(text in shown for text in stop)
    assert len(shown) <= first_complete


def test_nothing_of_a_stop_string_is_shown_early():
    stream = TextStream(Pieces(["one", " E", "N", "D", " two"]), ("END",))
    assert [stream.add(i) for i in range(4)] == ["one", " ", "", ""]
    assert stream.is_stopped
    assert stream.add(4) == stream.finish() == ""


def test_what_only_looked_like_a_stop_string_is_shown():
    stream = TextStream(Pieces(["one E", "N", "OUGH", " EN"]), ("END",))
    assert "".join(stream.add(i) for i in range(4)) == "one ENOUGH "
    assert stream.finish() == "EN"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MODEL_DIR, CONFIG)


def test_a_prompt_is_a_chat_unless_raw(tokenizer):
    chat = tokenizer.encode_prompt("Hello", None)
    assert chat == tokenizer.encode_prompt("Hello", chat=True)
    raw = tokenizer.encode_prompt("Hello", chat=False)
    assert len(raw) < len(chat)


@pytest.mark.parametrize("text", ["Hello there", "Grüße, 日本 🙂", "a\n\tb  c\\"])
def test_tokens_become_the_same_text_again(tokenizer, text):
    stream = tokenizer.text_stream(())
    shown = "".join(map(stream.add, tokenizer.encode_prompt(text, chat=False)))
    assert shown + stream.finish() == text


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(RequestError, match="the prompt is empty"):
        tokenizer.encode_prompt("", None)


def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(RequestError, match="the model takes 64"):
        tokenizer.encode_prompt("word " * 100, None)


def test_the_answer_ends_with_the_context(tokenizer):
    prompt = tokenizer.encode_prompt("Hello", None)
    assert tokenizer.limit(prompt, 1000) == 64 - len(prompt)
    assert tokenizer.limit(prompt, 5) == 5


def test_another_models_tokenizer_is_refused(tokenizer):
    tokenizer.check_vocabulary(10_000)
    with pytest.raises(ModelError, match="belongs to another model"):
        tokenizer.check_vocabulary(100)


def test_a_chat_without_a_template_is_refused(tmp_path):
    shutil.copy(MODEL_DIR / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    bare = Tokenizer(tmp_path, CONFIG)
    assert bare.encode_prompt("Hello", None) == bare.encode_prompt("Hello", chat=False)
    with pytest.raises(RequestError, match="no chat template"):
        bare.encode_prompt("Hello", chat=True)


@pytest.mark.parametrize("damage", ["missing", "no json", "wrong json"])
def test_a_damaged_tokenizer_is_named(tmp_path, damage):
    shutil.copy(MODEL_DIR / "tokenizer_config.json", tmp_path)
    if damage == "no json":
        (tmp_path / "tokenizer.json").write_text("{")
    if damage == "wrong json":
        (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"the tokenizer in .* does not load"):
        Tokenizer(tmp_path, CONFIG)
