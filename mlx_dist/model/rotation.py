"""Rotary position embeddings on the CPU. Knows mlx-lm's rotations; knows no families and no ranks.

On the CPU `mx.fast.rope` is some forty operations, most of which find the same angles again for
queries and keys of every layer. Here they are found once for all that ask with the same offset.
"""

# B sequences, H heads, L tokens, D of a head, R pairs that are rotated

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import Llama3RoPE

Offset = int | mx.array


class Angles:
    """The cosines and sines of positions, of which the last are remembered."""

    def __init__(self, find_frequencies: Callable[[], mx.array], scale: float) -> None:
        self._find_frequencies = find_frequencies
        self._scale = scale
        self._last: tuple[Offset, int, mx.Dtype] | None = None
        self._found: tuple[mx.array, mx.array]

    def forget(self) -> None:
        """A step begins. An array that is an offset becomes that of the next in place."""
        self._last = None

    def of(self, offset: Offset, num_tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Cosines and sines (L, R), or (B, 1, L, R) of offsets (B,)."""
        if not self._is_last(offset, num_tokens, dtype):
            self._found = self._find(offset, num_tokens, dtype)
            self._last = offset, num_tokens, dtype
        return self._found

    def _is_last(self, offset: Offset, num_tokens: int, dtype: mx.Dtype) -> bool:
        if self._last is None or self._last[1:] != (num_tokens, dtype):
            return False
        last = self._last[0]
        # Arrays are not looked into: that would wait for them.
        return last is offset or (type(last) is type(offset) is int and last == offset)

    def _find(self, offset: Offset, num_tokens: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        # Operation by operation what `mx.fast.rope` does, so that it rounds alike.
        if isinstance(offset, mx.array) and offset.size > 1:
            offset = mx.expand_dims(offset, (-1, -2))
        positions = (mx.arange(num_tokens, dtype=mx.float32) + offset) * self._scale
        angles = positions[..., None] * self._find_frequencies()
        return mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)


class Rotation:
    """Takes the place of a rotation whose `angles` others share, and passes for it."""

    def __init__(self, rope: nn.Module, angles: Angles) -> None:
        self._rope = rope
        self._num_pairs = rope.dims // 2
        self._angles = angles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rope, name)

    def __call__(self, x: mx.array, offset: Offset = 0) -> mx.array:
        """`x` (B, H, L, D), whose first token is at `offset` or, of each sequence, at its own."""
        if x.ndim != 4:
            rotated: mx.array = self._rope(x, offset)
            return rotated
        left, right, rest = mx.split(x, (self._num_pairs, 2 * self._num_pairs), axis=-1)
        turned = _turn(left, right, *self._angles.of(offset, x.shape[-2], x.dtype))
        return mx.concatenate([*turned, rest] if rest.size else [*turned], axis=-1)


def share_angles(layers: Iterable[nn.Module]) -> list[Angles]:
    """Have the rotations in `layers` share their angles, as far as they are alike: those.

    None where a rotation is one kernel, as on GPUs.
    """
    shared: dict[tuple[Any, ...], Angles] = {}
    if mx.default_device() != mx.cpu:
        return []
    for layer in layers:
        for module in layer.modules():
            for name, rope in list(module.items()):
                if type(rope) in (nn.RoPE, Llama3RoPE) and not rope.traditional:
                    key, find_frequencies, scale = _facts(rope)
                    angles = shared.setdefault(key, Angles(find_frequencies, scale))
                    setattr(module, name, Rotation(rope, angles))
    return list(shared.values())


def _facts(rope: nn.Module) -> tuple[tuple[Any, ...], Callable[[], mx.array], float]:
    """What tells whether two rotations are alike, their frequencies (R,), and what scales them."""
    if isinstance(rope, nn.RoPE):
        key = rope.dims, rope.base, rope.scale
        return key, partial(_geometric, rope.dims // 2, rope.base), rope.scale
    # mlx-lm calls the wavelengths so.
    wavelengths = rope._freqs
    return (rope.dims, *wavelengths.tolist()), lambda: mx.reciprocal(wavelengths), 1.0


def _geometric(num_pairs: int, base: float) -> mx.array:
    steps = mx.arange(0, -num_pairs, -1, dtype=mx.float32)
    return mx.exp(steps * mx.array(math.log(base) / num_pairs, mx.float32))


def _turn(
    left: mx.array, right: mx.array, cosines: mx.array, sines: mx.array
) -> tuple[mx.array, mx.array]:
    return left * cosines - right * sines, left * sines + right * cosines
