"""A token depends on its logits, its request and its position, and on nothing else."""

import mlx.core as mx
import pytest

from mlx_dist.messages import Sampling
from mlx_dist.model.sampling import SlotSampler

VOCAB = 50


def _logits(seed=0):
    return mx.random.normal((VOCAB,), key=mx.random.key(seed))


def _token(sampling, position=5, logits=None, seen=()):
    sampler = SlotSampler(sampling, VOCAB)
    sampler.observe(list(seen))
    return sampler.sample(_logits() if logits is None else logits, position).item()


def test_greedy_takes_the_likeliest():
    assert _token(Sampling()) == mx.argmax(_logits()).item()


def test_the_same_seed_and_position_give_the_same_token_whatever_came_between():
    sampling = Sampling(temperature=1.0, seed=42)
    first = [_token(sampling, position) for position in range(20)]
    mx.random.seed(7)
    mx.random.uniform(shape=(100,))
    assert [_token(sampling, position) for position in reversed(range(20))] == first[::-1]
    assert len(set(first)) > 3


def test_seeds_and_positions_are_independent():
    hot = [Sampling(temperature=3.0, seed=seed) for seed in range(30)]
    assert len({_token(sampling) for sampling in hot}) > 5
    # Neighbouring seeds at neighbouring positions must not repeat each other.
    a = [_token(hot[0], position) for position in range(1, 21)]
    b = [_token(hot[1], position) for position in range(20)]
    assert a != b


def test_tokens_are_drawn_by_their_probabilities():
    num, temperature = 4000, 0.7
    sampler = SlotSampler(Sampling(temperature=temperature, seed=1), VOCAB)
    drawn = mx.stack([sampler.sample(_logits(), position) for position in range(num)])
    counts_V = (drawn[:, None] == mx.arange(VOCAB)).sum(axis=0)
    expected_V = num * mx.softmax(_logits() / temperature)
    # Chi-square with 49 degrees of freedom: 85.4 is exceeded once in a thousand times.
    assert ((counts_V - expected_V) ** 2 / expected_V).sum().item() < 85.4


def test_rounding_exchanges_only_tokens_that_are_as_near_as_it_moves_them():
    most = 0.02
    moved_V = _logits() + most * mx.random.uniform(-1, 1, (VOCAB,), key=mx.random.key(1))
    sampling = Sampling(temperature=1.0, seed=1)
    num_exchanged = 0
    for position in range(500):
        token = _token(sampling, position, moved_V)
        if token != _token(sampling, position):
            num_exchanged += 1
            assert _token(sampling, position, _logits().at[token].add(2 * most)) == token
    assert num_exchanged > 0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1e-4),
    ],
)
def test_narrow_sampling_is_greedy(sampling):
    assert {_token(sampling, position) for position in range(10)} == {_token(Sampling())}


def test_a_top_k_of_the_whole_vocabulary_is_no_limit():
    for top_k in (VOCAB, VOCAB + 1, 10**6):
        assert _token(Sampling(temperature=1.0, top_k=top_k, seed=3)) == _token(
            Sampling(temperature=1.0, seed=3)
        )


def test_a_bias_decides():
    assert _token(Sampling(logit_bias={17: 100.0})) == 17
    assert _token(Sampling(logit_bias={_token(Sampling()): -100.0})) != _token(Sampling())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(presence_penalty=100),
        Sampling(frequency_penalty=100),
        Sampling(repetition_penalty=100),
    ],
)
def test_penalties_look_at_what_was_seen(sampling):
    best = _token(Sampling())
    assert _token(sampling) == best
    assert _token(sampling, seen=[best]) != best
    # mlx-lm's penalties look back 20 tokens.
    assert _token(sampling, seen=[best, *[best + 1] * 20]) == best
