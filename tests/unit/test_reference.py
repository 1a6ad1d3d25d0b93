"""The judge of answers: what one process says is right, and nothing else but a near tie is."""

from __future__ import annotations

import pytest

from benchmarks import reference as judging
from benchmarks.reference import Question, Reference
from mlx_dist import LLM
from mlx_dist.demo import MODEL_DIR
from mlx_dist.messages import Sampling
from mlx_dist.params import Params

NUM_TOKENS = 12
PROMPT = (40, 300, 7)
SAMPLINGS = {
    "greedy": Sampling(),
    "seeded": Sampling(temperature=1.0, seed=3),
    "biased": Sampling(temperature=0.7, seed=4, logit_bias={300: -100.0, 41: 3.0}),
}


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL_DIR)


@pytest.fixture(scope="module")
def said():
    """The program's own answers."""
    with LLM(str(MODEL_DIR)) as llm:

        def text(sampling):
            chunks = llm.chunks(llm.open(PROMPT, Params(NUM_TOKENS, sampling)))
            return "".join(chunk.piece.text for chunk in chunks)

        return {kind: text(sampling) for kind, sampling in SAMPLINGS.items()}


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_what_one_process_says_is_right(reference, said, kind):
    question = Question(PROMPT, NUM_TOKENS, SAMPLINGS[kind])
    assert reference.could_say(question, said[kind])
    assert reference.could_say(question, said[kind][:5], is_whole=False)


@pytest.mark.parametrize("change", [str.swapcase, lambda text: text[:-1], lambda text: text + "a"])
def test_what_it_does_not_say_is_wrong(reference, said, change):
    question = Question(PROMPT, NUM_TOKENS, SAMPLINGS["seeded"])
    assert not reference.could_say(question, change(said["seeded"]))


def test_another_seed_or_another_temperature_is_another_answer(reference, said):
    for sampling in (Sampling(temperature=1.0, seed=4), Sampling(temperature=0.9, seed=3)):
        question = Question(PROMPT, NUM_TOKENS, sampling)
        assert not reference.could_say(question, said["seeded"])


def test_an_answer_may_take_either_way_at_a_near_tie(reference, said, monkeypatch):
    """As if all tokens were as near to each other as two of them seldom are."""
    question = Question(PROMPT, 1, Sampling())
    texts = [reference.tokenizer.decode([token]) for token in (41, 300)]
    assert sum(reference.could_say(question, text) for text in texts) < 2
    monkeypatch.setattr(judging, "NEARLY_EQUAL", 1e9)
    assert all(reference.could_say(question, text) for text in texts)
