"""What a model costs, layer by layer, read off its config or its files. Reads no weights.

Knows mlx-lm's modules; knows no machines. Sizes are those of the model's own arrays, which are
never computed; what their families call things is all that is written down here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_dist.cluster.costs import LayerCost, ModelCosts, OutsideCost, Products
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.config import Dtype
from mlx_dist.model import blueprint, dry_run
from mlx_dist.model.cutting import parameters_of, slicing_of
from mlx_dist.model.dry_run import LayerRun, QuietGroup
from mlx_dist.model.families import Anatomy
from mlx_dist.model.files import ModelFiles
from mlx_dist.model.tensor import Slicing
from mlx_dist.model.weights import build

# The number of experts that a token meets.
_CHOSEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
# The number of query heads, and modules in which it is of something else.
_HEADS_KEYS = ("num_attention_heads", "n_heads", "num_heads", "n_head", "q_num_heads")
_OTHER_HEADS = ("indexer", "linear", "mamba", "rg_lru")
# The part of a layer that mixes tokens; the rest is an MLP or experts.
_MIXING = ("attn", "attention", "conv", "mamba", "mixer", "rg_lru", "temporal")
_BESIDE_WEIGHTS = ("bias", "biases", "scales")


def costs_of_config(
    config: dict[str, Any],
    *,
    name: str,
    bits: int | None = None,
    group_size: int = 64,
    dtype: Dtype = Dtype.auto,
    fused: bool = True,
    slice_: Slice = WHOLE,
) -> ModelCosts:
    """The costs of the model that a config.json describes, whatever its size, or of a slice.

    Quantized to `bits`, if given, in groups of `group_size`, as `mlx_lm.convert` does it; else as
    the config says. What is not quantized is of `dtype` or, for `auto`, of the config's. With
    `fused`, norms, rotations and attention are one operation each, as GPUs launch them, else as
    many as on this device. Raises FamilyError for a family that is not proven, or that nobody knows
    how to slice, and ModelError if the config makes no model.
    """
    model, anatomy = blueprint.build(
        config, name=name, bits=bits, group_size=group_size, dtype=dtype
    )
    return _costs(name, config, model, anatomy, fused, slice_)


def costs_of_files(
    files: ModelFiles, dtype: Dtype, *, fused: bool = True, slice_: Slice = WHOLE
) -> ModelCosts:
    """The costs of a model by its files' headers; of a model on the hub, nothing is fetched.

    Bytes are those that a stage has once it is loaded. `fused` is as for `costs_of_config`.
    Raises ModelError as `load_stage` does, and FamilyError where nobody knows how to slice it.
    """
    model, anatomy = build(files, dtype)
    return _costs(files.name, files.config, model, anatomy, fused, slice_)


def _costs(
    name: str,
    config: dict[str, Any],
    model: nn.Module,
    anatomy: Anatomy,
    fused: bool,
    slice_: Slice,
) -> ModelCosts:
    group, dropped, slicing = QuietGroup(slice_.size), set[str](), None
    if slice_.size > 1:
        slicing = slicing_of(name, model, anatomy, slice_)
        _narrow(model, slicing)
        dropped = slicing.dropped
    # By the names that parameters have before the model joins a group.
    outside, head = _outside(model, anatomy, dropped), _head(model, anatomy)
    if slicing is not None:
        slicing.join(group)
    runs = dry_run.run(model, anatomy, fused=fused, group=group)
    num_chosen = _num_chosen(config, model)
    hidden = anatomy.hidden_dtypes[-1]
    layers = [
        _layer_cost(layer, run, anatomy.hidden_tail[-1], num_chosen[i % len(num_chosen)], fused)
        for i, (layer, run) in enumerate(zip(anatomy.layers, runs, strict=True))
    ]
    return ModelCosts(
        name=name,
        dtype=str(hidden).removeprefix("mlx.core."),
        layers=tuple(layers),
        outside=outside,
        head=head,
        hidden_bytes=math.prod(anatomy.hidden_tail) * hidden.size,
        vocab_size=anatomy.vocab_size,
        context_tokens=blueprint.context_tokens(config),
        matrix=_largest(anatomy.layers),
        entry_sums=tuple(group.sums),
        logits_bytes=sum(group.gathers),
    )


def _narrow(model: nn.Module, slicing: Slicing) -> None:
    """Leave of the parameters' shapes what the slicing does."""
    whole = parameters_of(model)
    narrow = [
        (name, mx.broadcast_to(mx.array(0, whole[name].dtype), cut.shape(whole[name].shape)))
        for name, cut in slicing.cuts.items()
    ]
    model.update(tree_unflatten(narrow))


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight that activations are multiplied with, of (..., outputs, inputs).

    `name` and `path` are its own and its module's.
    """

    name: str
    path: str
    num_weights: int
    num_bytes: int
    shape: tuple[int, ...]
    is_expert: bool

    @property
    def num_inputs(self) -> int:
        return self.num_weights // math.prod(self.shape[:-1])


def _matrices(root: nn.Module) -> Iterator[_Matrix]:
    """The matrices in a layer or a model, embeddings included."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Conv1d):
            continue
        for key, array in module.items():
            if not isinstance(array, mx.array) or array.ndim < 2 or key in _BESIDE_WEIGHTS:
                continue
            num_weights, num_bytes = array.size, array.nbytes
            if key == "weight" and "scales" in module:
                num_weights = array.size * 32 // module.bits
                num_bytes += sum(module[k].nbytes for k in ("scales", "biases") if k in module)
            yield _Matrix(
                name=f"{path}.{key}" if path else key,
                path=path,
                num_weights=num_weights,
                num_bytes=num_bytes,
                shape=array.shape,
                is_expert=isinstance(module, SwitchLinear | QuantizedSwitchLinear),
            )


def _largest(layers: Sequence[nn.Module]) -> tuple[int, int] | None:
    """Outputs and inputs of the largest matrix, that of a single expert where there are some."""
    shapes = [(m.shape[-2], m.num_inputs) for layer in layers for m in _matrices(layer)]
    return max(shapes, key=math.prod, default=None)


def _products(matrices: list[_Matrix], num_parts: int = 1) -> Products:
    """One of `num_parts` equal parts of the matrices, all of them together."""
    num_weights = sum(matrix.num_weights for matrix in matrices)
    if not num_weights:
        return Products()
    bits = 8 * sum(matrix.num_bytes for matrix in matrices) / num_weights
    return Products(num_weights // num_parts, bits)


def _layer_cost(
    layer: nn.Module, run: LayerRun, hidden_size: int, num_chosen: int, fused: bool
) -> LayerCost:
    """`num_chosen` is the number of experts that a token meets, or 0 for all that there are."""
    matrices = list(_matrices(layer))
    experts = [matrix for matrix in matrices if matrix.is_expert]
    num_experts = experts[0].shape[0] if experts else 0
    num_chosen = min(num_chosen or num_experts, num_experts)
    return LayerCost(
        weights_bytes=sum(a.nbytes for a in dict(tree_flatten(layer.parameters())).values()),
        dense=_products([matrix for matrix in matrices if not matrix.is_expert]),
        kv=run.kv,
        score_flops=_score_flops(layer, run.keys_values),
        num_scores=0 if fused else _num_scores(layer, run.keys_values),
        num_activations=_num_activations(matrices, bool(run.keys_values), hidden_size, num_chosen),
        num_ops=run.num_ops,
        expert=_products(experts, num_experts),
        num_experts=num_experts,
        experts_per_token=num_chosen,
        sums=run.sums,
    )


def _score_flops(layer: nn.Module, keys_values: tuple[tuple[int, int], ...]) -> int:
    """Multiplications and additions for a query and a key: their product, and the value's weight.

    Latent attention is counted as in a step of one token, where keys and values are not unpacked.
    An indexer, which chooses the keys to look at, is left out.
    """
    num_flops = 0
    for (num_heads, rank), (key, value) in zip(_heads(layer), keys_values, strict=False):
        # A latent is key and value in one, and what rotates is cached beside it.
        num_flops += 2 * num_heads * (key + value + (key if key == rank else 0))
    return num_flops


def _num_scores(layer: nn.Module, keys_values: tuple[tuple[int, int], ...]) -> int:
    """Of how many numbers the softmax is for a query and a key: one for each head."""
    return sum(heads for (heads, _), _ in zip(_heads(layer), keys_values, strict=False))


def _heads(layer: nn.Module) -> Iterator[tuple[int, int | None]]:
    """Query heads, and elements of a latent if there are any, of each attention in a layer."""
    for path, module in layer.named_modules():
        if not path or any(word in path for word in _OTHER_HEADS):
            continue
        heads = [getattr(module, key, None) for key in _HEADS_KEYS]
        if found := [number for number in heads if isinstance(number, int)]:
            yield found[0], getattr(module, "kv_lora_rank", None)


def _num_activations(
    matrices: list[_Matrix], mixes: bool, hidden_size: int, num_chosen: int
) -> int:
    """Elements between the two halves of a layer's MLPs, for a token.

    They are the inputs of each MLP's way back to the hidden state. `mixes` says whether a part of
    the layer mixes tokens, whose way back this is not.
    """
    inputs = {
        matrix.path.rpartition(".")[0]: matrix.num_inputs * (num_chosen if matrix.is_expert else 1)
        for matrix in matrices
        if matrix.shape[-2] == hidden_size
        and not (mixes and any(word in matrix.path for word in _MIXING))
    }
    return sum(inputs.values())


def _num_chosen(config: dict[str, Any], model: nn.Module) -> list[int]:
    """The number of experts that a token meets in each layer, or in all; 0 if none is said."""
    text_config = config.get("text_config") or {}
    defaults = [vars(module.args) for module in model.modules() if "args" in vars(module)]
    found = [s[key] for s in (text_config, config, *defaults) for key in _CHOSEN_KEYS if s.get(key)]
    chosen = found[0] if found else 0
    return chosen if isinstance(chosen, list) else [chosen]


def _outside(model: nn.Module, anatomy: Anatomy, dropped: set[str]) -> tuple[OutsideCost, ...]:
    num_bytes: dict[frozenset[int], int] = defaultdict(int)
    for name, array in parameters_of(model).items():
        if name in anatomy.users and name not in dropped:
            num_bytes[anatomy.users[name]] += array.nbytes
    return tuple(OutsideCost(total, users) for users, total in num_bytes.items())


def _head(model: nn.Module, anatomy: Anatomy) -> Products:
    """What is used after the last layer: a head, or the embedding once more."""
    after = anatomy.num_layers
    return _products([m for m in _matrices(model) if after in anatomy.users.get(m.name, ())])
