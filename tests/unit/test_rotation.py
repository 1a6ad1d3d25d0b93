"""Rotations that share their angles are those of mlx-lm, to the last bit."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE

from mlx_dist.model.rotation import share_angles

_OFFSETS = {"int": 37, "one": mx.array([5]), "each its own": mx.array([0, 900, 17])}
_LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 1024}


class _Layer(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope


def _ropes():
    return {
        "plain": nn.RoPE(64, base=1e6),
        "linear": nn.RoPE(64, base=1e4, scale=0.25),
        "of a part": nn.RoPE(32),
        "llama3": Llama3RoPE(64, base=5e5, scaling_config=_LLAMA3),
        "traditional": nn.RoPE(64, traditional=True),
    }


def _x(num_tokens, dtype=mx.float32, seed=0):
    return mx.random.normal((3, 2, num_tokens, 64), key=mx.random.key(seed)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("offset", _OFFSETS.values(), ids=_OFFSETS)
@pytest.mark.parametrize("kind", _ropes())
def test_a_shared_rotation_is_mlx_lms(kind, offset, num_tokens, dtype):
    layers = [_Layer(_ropes()[kind]) for _ in range(2)]
    share_angles(layers)
    for seed, layer in enumerate(layers):
        x = _x(num_tokens, dtype, seed)
        expected = _ropes()[kind](x, offset=offset)
        assert layer.rope(x, offset=offset).dtype == dtype
        assert mx.array_equal(layer.rope(x, offset=offset), expected)


def test_alike_rotations_share_and_others_do_not():
    layers = [_Layer(rope) for _ in range(2) for rope in _ropes().values()]
    assert len(share_angles(layers)) == len(_ropes()) - 1  # A traditional one stays as it is.


def test_what_is_remembered_is_of_the_same_offset():
    layer = _Layer(nn.RoPE(64))
    share_angles([layer])
    x = _x(4)
    for offset in (3, 4, mx.array([3, 4, 5]), mx.array([4, 4, 4]), 4):
        assert mx.array_equal(layer.rope(x, offset=offset), nn.RoPE(64)(x, offset=offset))
    assert mx.array_equal(layer.rope(x[:, :, :2], offset=4), nn.RoPE(64)(x[:, :, :2], offset=4))


def test_an_offset_that_has_grown_in_place_is_another_in_the_next_step():
    layer = _Layer(nn.RoPE(64))
    [angles] = share_angles([layer])
    x, offset = _x(1), mx.array([3, 4, 5])
    layer.rope(x, offset=offset)
    offset += 1
    angles.forget()
    expected = nn.RoPE(64)(x, offset=mx.array([4, 5, 6]))
    assert mx.array_equal(layer.rope(x, offset=offset), expected)


def test_it_passes_for_the_rotation_whose_place_it_takes():
    rope = nn.RoPE(64, base=123.0)
    layer = _Layer(rope)
    share_angles([layer])
    assert layer.rope.base == 123.0
    without_heads = mx.random.normal((2, 5, 64))
    assert mx.array_equal(layer.rope(without_heads, offset=2), rope(without_heads, offset=2))
