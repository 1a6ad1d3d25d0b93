"""What a model costs, layer by layer, and what machines and links offer. Pure: knows numbers only.

A model's costs are read off its config or its files (`model.costing`), a machine's speeds are
measured (`cluster.hardware`) or looked up for a chip (`cluster.chips`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_dist.messages import KvCost, Speeds


@dataclass(frozen=True, slots=True)
class Products:
    """Weight matrices that activations are multiplied with: elements, and bits of each as stored.

    Bits include scales and biases: 4.5 for 4-bit weights in groups of 64 with 16-bit scales.
    """

    num_weights: int = 0
    bits: float = 16.0

    @property
    def is_quantized(self) -> bool:
        return 0 < self.bits < 16


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer. `dense` is what every token meets; of `num_experts` experts it meets some.

    `expert` is a single expert's matrices. `score_flops` are those of one query and one key, all
    heads together; `num_scores` are the elements whose exponential they cost, where attention is
    not one operation. `num_activations` are the elements of activation functions a token. Of a
    slice, `sums` are the bytes of each sum over its tensor group, for a token.
    """

    weights_bytes: int
    dense: Products
    kv: KvCost
    score_flops: int = 0
    num_scores: int = 0
    num_activations: int = 0
    num_ops: int = 0
    expert: Products = Products()
    num_experts: int = 0
    experts_per_token: int = 0
    sums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutsideCost:
    """Parameters outside the layers: their bytes, and where they are used.

    `users` are layer numbers, -1 before the first layer, or the number of layers after the last.
    """

    weights_bytes: int
    users: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A model, or a slice of it.

    `head` turns the last hidden state into logits, for each token that is sampled. `hidden_bytes`
    is one token's hidden state, as it crosses a cut. `matrix` are the outputs and inputs of the
    layers' largest matrix, for whoever measures how fast such are. Of a slice, `entry_sums` are the
    bytes of sums over its tensor group before the first layer, for a token, and `logits_bytes`
    those of the logits that its ranks gather, for a token that is sampled.
    """

    name: str
    dtype: str
    layers: tuple[LayerCost, ...]
    outside: tuple[OutsideCost, ...]
    head: Products
    hidden_bytes: int
    vocab_size: int
    context_tokens: int | None = None
    matrix: tuple[int, int] | None = None
    entry_sums: tuple[int, ...] = ()
    logits_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def bits(self) -> int:
        """Bits of the largest quantized matrices, without their scales, or 0 if there are none."""
        parts = [part for layer in self.layers for part in (layer.dense, layer.expert)]
        quantized = [part for part in parts if part.is_quantized]
        return int(max(quantized, key=lambda part: part.num_weights).bits) if quantized else 0

    def weights_bytes(self, start: int, end: int) -> int:
        """Bytes of the parameters that the stage [start, end) holds."""
        first = -1 if start == 0 else start
        last = self.num_layers if end == self.num_layers else end - 1
        own = sum(layer.weights_bytes for layer in self.layers[start:end])
        return own + sum(
            part.weights_bytes
            for part in self.outside
            if any(first <= user <= last for user in part.users)
        )

    def kv_bytes(self, start: int, end: int, num_tokens: int) -> int:
        """Bytes of one sequence's caches of `num_tokens` in the stage [start, end)."""
        return sum(layer.kv.bytes_for(num_tokens) for layer in self.layers[start:end])


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that may hold a stage. `usable_bytes` is what weights and caches may take."""

    name: str
    chip: str
    memory_bytes: int
    usable_bytes: int
    speeds: Speeds


@dataclass(frozen=True, slots=True)
class Link:
    """From one machine to another: seconds of an empty message one way, and bytes a second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a placement: tokens of each sequence, prompt included, and how many run."""

    context_tokens: int = 4096
    num_sequences: int = 1
    prompt_tokens: tuple[int, ...] = field(default=(128, 2048))
