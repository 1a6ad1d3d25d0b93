"""A model run without computing: what each layer keeps of a sequence, and launches for a token.

Knows mlx-lm's caches and MLX's graphs; knows no weights. A prompt of two tokens fills the caches,
and a step of one token follows. Each layer runs apart from the others, on an input that comes
from nowhere, so that the graph of what it puts out is its own.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dist.messages import KvCost
from mlx_dist.model.cache import SlotCaches
from mlx_dist.model.families import Anatomy, StandIn
from mlx_dist.model.rotation import share_angles

# Operations of a graph that compute nothing: other shapes of what is there, or constants.
_VIEWS = frozenset(
    {
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "ExpandDims",
        "Flatten",
        "Full",
        "NumberOfElements",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    }
)
_LABEL = re.compile(r'\[label ?= ?"(\w+)"')


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What a layer's caches cost, and how many operations it launches for a token.

    `keys_values` are the elements of a key and of a value of one head, in each of its caches
    that has them. `sums` are the bytes of each sum over a tensor group, for a token.
    """

    kv: KvCost
    keys_values: tuple[tuple[int, int], ...]
    num_ops: int
    sums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class QuietGroup:
    """Stands for a tensor group of `size` ranks that nobody has met; notes what it is asked for.

    `sums` and `gathers` are bytes, those of a gather from all ranks together.
    """

    size: int
    sums: list[int] = field(default_factory=list)
    gathers: list[int] = field(default_factory=list)

    def sum(self, array: mx.array) -> mx.array:
        """The array itself: a sum is no operation of the model's."""
        self.sums.append(array.nbytes)
        return array

    def gather(self, array: mx.array) -> mx.array:
        """As many of the array as there are ranks."""
        self.gathers.append(self.size * array.nbytes)
        return mx.concatenate([array] * self.size, axis=0)


def run(
    model: nn.Module, anatomy: Anatomy, *, fused: bool, group: QuietGroup | None = None
) -> list[LayerRun]:
    """Run `model` for one sequence and say of each layer what it did. Computes nothing.

    With `fused`, norms, rotations and attention are one operation each, as GPUs launch them,
    else as many as on this device. Of what the model asks its `group` for a token, that has in
    the end what no layer did.
    """
    group = QuietGroup(1) if group is None else group
    slots, caches = _caches_by_layer(model, anatomy)
    layers = anatomy.layers
    if not fused:
        share_angles(layers)  # As stages do.
    apart = [
        _Apart(layer, [caches[i] for i in indices], group)
        for layer, indices in zip(layers, anatomy.caches_of_layer, strict=True)
    ]
    originals, layers[:] = list(layers), apart
    try:
        model(mx.zeros((1, 2), mx.int32), cache=caches)
        # Here as `Stage.kv_cost` has it, after as many tokens.
        kv = [of_layer.cost(0) for of_layer in slots]
        group.sums.clear()
        group.gathers.clear()
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    finally:
        layers[:] = originals
    surplus = _surplus_ops(anatomy.hidden_dtypes[-1]) if fused else {}
    runs = []
    for layer, cost in zip(apart, kv, strict=True):
        keys_values = tuple(_keys_values(layer.caches))
        num_marks = Counter(layer.ops)
        # Experts are chosen by a softmax, too, and exponentials are in other things than rotations.
        num_marks["Softmax"] = min(num_marks["Softmax"], len(keys_values))
        num_marks["Exp"] = min(num_marks["Exp"], num_marks["Cos"])
        num_surplus = sum(num_marks[mark] * surplus[mark] for mark in surplus)
        num_ops = layer.ops.total() - num_surplus
        runs.append(LayerRun(cost, keys_values, num_ops, layer.sums))
    return runs


class _Apart(StandIn):
    """Stands for a layer, which it runs on an input that comes from nowhere."""

    def __init__(self, layer: nn.Module, caches: list[Any], group: QuietGroup) -> None:
        super().__init__(layer)
        self.caches = caches
        self.sums: tuple[int, ...] = ()
        self._group = group
        self.ops: Counter[str] = Counter()
        self._weights = _arrays(layer.parameters())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_blank(args[0]), *args[1:])
        else:
            first, hidden = next(iter(kwargs.items()))
            kwargs[first] = _blank(hidden)
        given = [*self._weights, *self._kept(), *_arrays((args, kwargs))]
        before, num_sums = _ops(given), len(self._group.sums)
        output = self._layer(*args, **kwargs)
        self.sums = tuple(self._group.sums[num_sums:])
        del self._group.sums[num_sums:]
        self.ops = _ops([*given, *self._kept(), *_arrays(output)]) - before
        return output

    def _kept(self) -> list[mx.array]:
        return _arrays([cache.state for cache in self.caches if not cache.empty()])


def _blank(array: mx.array) -> mx.array:
    return mx.zeros(array.shape, array.dtype)


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for leaf in dict(tree_flatten(tree)).values() if isinstance(leaf, mx.array)]


def _caches_by_layer(model: nn.Module, anatomy: Anatomy) -> tuple[list[SlotCaches], list[Any]]:
    """The slots of a stage for each layer, and the caches in them all as the model takes them."""
    slots = [SlotCaches(model, anatomy, i, i + 1) for i in range(anatomy.num_layers)]
    for of_layer in slots:
        of_layer.open(0, [0], [None])
    caches = list(slots[0].of(0, [0]))
    for of_layer, indices in zip(slots, anatomy.caches_of_layer, strict=True):
        own = of_layer.of(0, [0])
        for i in indices:
            caches[i] = own[i]
    return slots, caches


def _keys_values(caches: list[Any]) -> Iterator[tuple[int, int]]:
    for cache in caches:
        for part in getattr(cache, "caches", (cache,)):
            if (keys := getattr(part, "keys", None)) is not None:
                yield keys.shape[-1], part.values.shape[-1]


def _ops(arrays: list[mx.array]) -> Counter[str]:
    """The operations in the graph of `arrays`, by name, without those that compute nothing."""
    dot = io.StringIO()
    mx.export_to_dot(dot, arrays)
    return Counter(label for label in _LABEL.findall(dot.getvalue()) if label not in _VIEWS)


def _surplus_ops(dtype: mx.Dtype) -> dict[str, int]:
    """How many operations this device needs beyond the one that a GPU launches.

    By the operation that shows it: the root of a norm, the cosine of a rotation, the exponential
    of one whose frequencies are not given, the softmax of attention.
    """
    x_BHLD, scale_D = mx.zeros((1, 1, 1, 32), dtype), mx.ones((32,), dtype)
    rotate = partial(mx.fast.rope, x_BHLD, 32, traditional=False, scale=1.0, offset=1)
    frequencies = mx.ones((16,), mx.float32)
    attend = mx.fast.scaled_dot_product_attention
    rotated = _ops([rotate(base=None, freqs=frequencies)]).total()
    return {
        "Rsqrt": _ops([mx.fast.rms_norm(x_BHLD, scale_D, 1e-5)]).total() - 1,
        "Cos": rotated - 1,
        "Exp": _ops([rotate(base=1e4)]).total() - rotated,
        "Softmax": _ops([attend(x_BHLD, x_BHLD, x_BHLD, scale=1.0)]).total() - 1,
    }
