"""What a step costs one machine, by the model's costs and the machine's speeds. Pure.

A matrix costs what its weights were measured to cost with so many tokens at once; attention reads
what is cached and multiplies with it; everything else is counted in small operations and elements.
docs/plans.md has the formulas.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from mlx_dist.cluster.costs import LayerCost, ModelCosts, Products
from mlx_dist.messages import KvCost, Speeds

# Bits of scales and biases beside each weight that was measured: groups of 64 with two of 16 bits.
_SCALE_BITS = 0.5


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a step goes: memory, products, small operations, a group's collectives."""

    memory_s: float = 0.0
    products_s: float = 0.0
    operations_s: float = 0.0
    collectives_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.memory_s + self.products_s + self.operations_s + self.collectives_s

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.memory_s + other.memory_s,
            self.products_s + other.products_s,
            self.operations_s + other.operations_s,
            self.collectives_s + other.collectives_s,
        )

    def times(self, factor: float) -> Seconds:
        return Seconds(
            self.memory_s * factor,
            self.products_s * factor,
            self.operations_s * factor,
            self.collectives_s * factor,
        )


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step of `num_sequences` with `tokens_each` new tokens after `cached_tokens` of theirs.

    `num_sampled` tokens go through the head.
    """

    num_sequences: int
    tokens_each: int
    cached_tokens: int
    num_sampled: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.tokens_each


def stage_time(
    speeds: Speeds, costs: ModelCosts, start: int, end: int, shape: StepShape
) -> Seconds:
    """Seconds of the stage [start, end), the head included in the last one."""
    seconds = Seconds()
    for layer, equal in groupby(costs.layers[start:end]):
        seconds += layer_time(speeds, layer, shape).times(sum(1 for _ in equal))
    return seconds + head_time(speeds, costs, shape) if end == costs.num_layers else seconds


def head_time(speeds: Speeds, costs: ModelCosts, shape: StepShape) -> Seconds:
    """Seconds of turning the sampled tokens' hidden states into logits."""
    return _products_time(speeds, costs.head, shape.num_sampled)


def layer_time(speeds: Speeds, layer: LayerCost, shape: StepShape) -> Seconds:
    """Seconds of one layer."""
    num_tokens = shape.num_tokens
    operations_s = layer.num_activations * num_tokens * speeds.element_s
    operations_s += layer.num_ops * speeds.op_s
    return (
        _products_time(speeds, layer.dense, num_tokens)
        + _experts_time(speeds, layer, num_tokens)
        + _attention_time(speeds, layer, shape)
        + Seconds(operations_s=operations_s)
    )


def interpolate(curve: Mapping[int, float], size: float) -> float:
    """The value at `size`, on straight lines between what was measured and beyond its end.

    Below the least size it is that of the least; a single size stands for all.
    """
    sizes = sorted(curve)
    if len(sizes) == 1 or size <= sizes[0]:
        return curve[sizes[0]]
    right = min(bisect_left(sizes, size), len(sizes) - 1)
    a, b = sizes[right - 1], sizes[right]
    return max(curve[a] + (size - a) / (b - a) * (curve[b] - curve[a]), 0.0)


def _products_time(speeds: Speeds, products: Products, num_tokens: float) -> Seconds:
    """Seconds of multiplying with each matrix; what one token costs is the reading of it."""
    if not products.num_weights or num_tokens <= 0:
        return Seconds()
    is_quantized = products.is_quantized and bool(speeds.quantized_s)
    curve = speeds.quantized_s if is_quantized else speeds.product_s
    one_s, all_s = interpolate(curve, 1), interpolate(curve, num_tokens)
    if is_quantized:
        # Other bits take longer or shorter to read, once, and as long to multiply with.
        scaled_s = one_s * products.bits / (speeds.bits + _SCALE_BITS)
        one_s, all_s = scaled_s, all_s - one_s + scaled_s
    read_s = min(one_s, all_s)
    return Seconds(read_s, all_s - read_s).times(products.num_weights)


def _experts_time(speeds: Speeds, layer: LayerCost, num_tokens: int) -> Seconds:
    """Seconds of the experts that so many tokens meet, each choosing its own at random."""
    if not layer.num_experts or not num_tokens:
        return Seconds()
    missed = (1 - layer.experts_per_token / layer.num_experts) ** num_tokens
    num_met = layer.num_experts * (1 - missed)
    tokens_each = num_tokens * layer.experts_per_token / num_met
    return _products_time(speeds, layer.expert, tokens_each).times(num_met)


def _attention_time(speeds: Speeds, layer: LayerCost, shape: StepShape) -> Seconds:
    """Seconds of reading what is cached, once a sequence, and of scores at the rate of products.

    Where attention is several operations, a softmax costs an exponential for each score, and each
    head of a sequence is a product of its own with keys, and one with values.
    """
    all_tokens = shape.cached_tokens + shape.tokens_each
    read_bytes = layer.kv.bytes_for(all_tokens) * shape.num_sequences
    # Each new token looks at those before it and at itself.
    mean_keys = _keys(layer.kv, shape.cached_tokens + (shape.tokens_each + 1) / 2)
    num_flops = layer.score_flops * mean_keys * shape.num_tokens
    most = max(speeds.product_s)
    flops_per_s = 2 * most / speeds.product_s[most]
    num_scores = layer.num_scores * mean_keys * shape.num_tokens
    num_products = 2 * layer.num_scores * shape.num_sequences
    return Seconds(
        read_bytes / speeds.stream_bytes_per_s,
        num_flops / flops_per_s,
        num_scores * speeds.element_s + num_products * speeds.head_s,
    )


def _keys(kv: KvCost, num_tokens: float) -> float:
    """How many of `num_tokens` a new one looks at: none where nothing grows with them."""
    return max(
        (num_tokens if window is None else min(num_tokens, window) for _, window in kv.growing),
        default=0.0,
    )
