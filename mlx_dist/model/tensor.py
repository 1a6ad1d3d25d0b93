"""A model cut for a tensor group: of every layer, each rank has a slice. Knows mlx-lm's modules.

Attention and MLP of a layer put out what their slice contributes, and the group adds that up. All
else of mlx-lm's code stays as it is; what it reads of itself, its number of heads, is its slice's.
A part of a model whose name nobody has looked at is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dist.cluster.placement import Slice
from mlx_dist.errors import FamilyError
from mlx_dist.model.families import Anatomy
from mlx_dist.model.slicing import Cut, Heads, Range, heads, parts, width_block
from mlx_dist.model.together import (
    Group,
    InTurn,
    Silent,
    SlicedEmbedding,
    SlicedHead,
    Summed,
    SummedNorm,
)

_ATTENTION = "self_attn"
_MLPS = ("mlp", "block_sparse_moe", "feed_forward")
# Of latents, keys and values are for a head of queries each; so is what gates its output.
_OF_QUERIES = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "g_proj")
_NUM_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_NUM_KV_HEADS = ("n_kv_heads", "num_key_value_heads")
_NUM_REPEATS = ("repeats", "num_key_value_groups")
# What every rank computes alike: norms of one head, rotations, latents, routers.
_ALIKE_IN_ATTENTION = {
    *("q_norm", "k_norm", "query_layernorm", "key_layernorm", "rope", "indexer"),
    *("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"),
}
_NORMS = ("q_norm", "k_norm")
_ALIKE_IN_MLP = {"gate", "router", "shared_expert_gate", "coefficient", "act_fn"}
_ALIKE_IN_MLP |= {"e_score_correction_bias", "expert_bias"}
# Of what is stored by rows of outputs; a bias has no other axis.
_MATRICES = ("weight", "scales", "biases")


class Slicing:
    """What one rank of a tensor group holds of `model`, noted before anything of it is cut.

    `cuts` are by name what it holds of the parameters that are divided, and `dropped` the names of
    those that another rank has: a bias is added once. Raises FamilyError for a model with a part
    that nobody has looked at.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, slice_: Slice) -> None:
        self.cuts: dict[str, Cut] = {}
        self.dropped: set[str] = set()
        self._slice = slice_
        self._changes: list[Callable[[Group], None]] = []
        for index, layer in enumerate(anatomy.layers):
            for name, block in layer.items():
                path = f"{anatomy.layers_path}.{index}.{name}"
                if name == _ATTENTION:
                    self._cut_attention(layer, block, path)
                elif name in _MLPS:
                    self._cut_mlps(layer, name, path)
                elif not (name.endswith("norm") and isinstance(block, nn.Module)):
                    _check_empty(block, path)
        self._cut_vocabulary(model, anatomy)

    def join(self, group: Group) -> None:
        """Make the model, whose parameters are cut by now, this rank's part of `group`."""
        for change in self._changes:
            change(group)

    def _cut_attention(self, layer: nn.Module, attention: nn.Module, path: str) -> None:
        if "o_proj" not in attention or not any(hasattr(attention, n) for n in _NUM_HEADS):
            raise FamilyError(f"tensor parallelism does not know {path}")
        num_heads = _number(attention, _NUM_HEADS)
        # Of a latent for all heads, every rank has all.
        num_kv_heads = _number(attention, _NUM_KV_HEADS, num_heads)
        of_ranks = heads(num_heads, num_kv_heads, self._slice, _block(attention.o_proj, num_heads))
        own = of_ranks[self._slice.place]
        q, kv = (own.queries.start, own.queries.end), own.keys
        wide_norms: list[str] = []
        for name, part in attention.items():
            inside = f"{path}.{name}"
            if name in _OF_QUERIES:
                self._cut_outputs(part, inside, [q], num_heads)
            elif name in ("k_proj", "v_proj"):
                self._cut_outputs(part, inside, [kv], num_kv_heads)
            elif name == "qkv_proj":
                borders = (num_heads, num_heads + num_kv_heads)
                ranges = [q, *((at + kv[0], at + kv[1]) for at in borders)]
                self._cut_outputs(part, inside, ranges, num_heads + 2 * num_kv_heads)
            elif name == "o_proj":
                self._cut_inputs(part, inside, q, num_heads)
                self._keep_bias_once(part, inside, [each.queries.is_idle for each in of_ranks])
            elif name in ("embed_q", "unembed_out"):
                cut = Cut(0, (q,), num_heads)
                self.cuts |= {f"{inside}.{key}": cut for key, _ in _arrays(part)}
            elif name in ("sinks", "attention_sink_bias"):
                self.cuts[inside] = Cut(0, (q,), num_heads)
            elif name in _NORMS and _is_wide(attention, name, num_heads):
                # Both at once, further down.
                wide_norms.append(name)
            elif name not in _ALIKE_IN_ATTENTION:
                _check_empty(part, inside)
        if wide_norms:
            self._cut_norms(attention, wide_norms, path, own, (num_heads, num_kv_heads))

        def change(group: Group) -> None:
            _set_heads(attention, q[1] - q[0], kv[1] - kv[0])
            part = Silent(attention) if own.queries.is_idle else attention
            layer[_ATTENTION] = Summed(part, group)

        self._changes.append(change)

    def _cut_norms(
        self,
        attention: nn.Module,
        names: Sequence[str],
        path: str,
        own: Heads,
        num_heads: tuple[int, int],
    ) -> None:
        """Cut norms that go over all heads: of queries, of keys."""
        queries = (own.queries.start, own.queries.end)
        ranges = {"q_norm": queries, "k_norm": own.keys}
        counts = {"q_norm": not own.queries.is_idle, "k_norm": own.own_keys}
        sizes = {name: attention[name].weight.size for name in names}
        for name in names:
            self.cuts[f"{path}.{name}.weight"] = Cut(
                0, (ranges[name],), num_heads[name == "k_norm"]
            )

        def change(group: Group) -> None:
            sums = InTurn(group)
            for name, size in sizes.items():
                norm, is_first = attention[name], name == "q_norm"
                attention[name] = SummedNorm(norm, size, counts[name], sums, is_first)

        self._changes.append(change)

    def _cut_mlps(self, layer: nn.Module, name: str, path: str) -> None:
        """Cut a block that is an MLP, or has some: experts, or one that all tokens share."""
        for inside, owner, key, module in _walk(layer, name, path):
            if "down_proj" in module:
                self._cut_mlp(owner, key, module, inside)
            elif key not in _ALIKE_IN_MLP:
                for own, array in _arrays(module):
                    if own not in _ALIKE_IN_MLP:
                        _check_empty(array, f"{inside}.{own}")

        def change(group: Group) -> None:
            # An idle MLP has taken its place by now.
            layer[name] = Summed(layer[name], group)

        self._changes.append(change)

    def _cut_mlp(self, owner: nn.Module, key: str, mlp: nn.Module, path: str) -> None:
        down = mlp.down_proj
        width = _num_inputs(down)
        group_size = down.group_size if "scales" in down else None
        of_ranks = parts(width, self._slice, width_block(width, group_size))
        own = of_ranks[self._slice.place]
        range_ = (own.start, own.end)
        for name, part in mlp.items():
            inside = f"{path}.{name}"
            if name in ("gate_proj", "up_proj"):
                self._cut_outputs(part, inside, [range_], width)
            elif name == "gate_up_proj":
                ranges = [range_, (width + own.start, width + own.end)]
                self._cut_outputs(part, inside, ranges, 2 * width)
            elif name == "down_proj":
                self._cut_inputs(part, inside, range_, width)
                self._keep_bias_once(part, inside, [each.is_idle for each in of_ranks])
            elif name not in _ALIKE_IN_MLP:
                _check_empty(part, inside)
        if own.is_idle:

            def change(_group: Group) -> None:
                owner[key] = Silent(mlp)

            self._changes.append(change)

    def _cut_vocabulary(self, model: nn.Module, anatomy: Anatomy) -> None:
        size = anatomy.vocab_size
        tokens = parts(size, self._slice, width_block(size, None))
        own = tokens[self._slice.place]
        paths = {name.rpartition(".")[0] for name in anatomy.users}
        for path in sorted(paths):
            owner_path, _, name = path.rpartition(".")
            owner = _at(model, owner_path)
            module = owner.get(name)
            if name == "norm" or module is None:
                continue
            if name not in ("embed_tokens", "lm_head"):
                raise FamilyError(f"tensor parallelism does not know {path}")
            if module.weight.shape[0] != size:
                raise FamilyError(f"{path} has another number of tokens than the logits, {size}")
            cut = Cut(0, ((own.start, own.end),), size)
            self.cuts |= {f"{path}.{key}": cut for key, _ in _arrays(module)}

            def change(group: Group, owner: nn.Module = owner, name: str = name) -> None:
                if name == "lm_head":
                    owner[name] = SlicedHead(owner[name], tokens, group)
                else:
                    owner[name] = SlicedEmbedding(owner[name], tokens, self._slice.place, group)

            self._changes.append(change)

    def _cut_outputs(
        self, linear: nn.Module, path: str, ranges: Sequence[Range], num_parts: int
    ) -> None:
        for name, array in _arrays(linear):
            if name in (*_MATRICES, "bias"):
                axis = array.ndim - (1 if name == "bias" else 2)
                self.cuts[f"{path}.{name}"] = Cut(axis, tuple(ranges), num_parts)

    def _cut_inputs(self, linear: nn.Module, path: str, range_: Range, num_parts: int) -> None:
        for name, array in _arrays(linear):
            if name in _MATRICES:
                self.cuts[f"{path}.{name}"] = Cut(array.ndim - 1, (range_,), num_parts)

    def _keep_bias_once(self, linear: nn.Module, path: str, are_idle: list[bool]) -> None:
        """Leave the bias to the first rank whose result counts."""
        if "bias" in linear and self._slice.place != are_idle.index(False):
            self.dropped.add(f"{path}.bias")
            self._changes.append(lambda _group: linear.pop("bias"))


def _walk(owner: nn.Module, key: str, path: str) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(path, owner, key, module) of `owner[key]` and all modules in it, MLPs as one."""
    module = owner[key]
    if not isinstance(module, nn.Module):
        _check_empty(module, path)
        return
    yield path, owner, key, module
    if "down_proj" not in module and key not in _ALIKE_IN_MLP:
        for name in module.children():
            yield from _walk(module, name, f"{path}.{name}")


def _set_heads(attention: nn.Module, num_heads: int, num_kv_heads: int) -> None:
    for names, number in (
        (_NUM_HEADS, num_heads),
        (_NUM_KV_HEADS, num_kv_heads),
        (_NUM_REPEATS, num_heads // num_kv_heads),
    ):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, number)


def _number(module: nn.Module, names: Sequence[str], default: int | None = None) -> int:
    found = next((getattr(module, name) for name in names if hasattr(module, name)), default)
    assert isinstance(found, int)
    return found


def _block(o_proj: nn.Module, num_heads: int) -> int:
    """How many heads must stay together, for a group of quantized weights to do so."""
    if "scales" not in o_proj:
        return 1
    width = _num_inputs(o_proj) // num_heads
    return int(o_proj.group_size // math.gcd(o_proj.group_size, width))


def _num_inputs(linear: nn.Module) -> int:
    if "scales" in linear:
        return int(linear.scales.shape[-1] * linear.group_size)
    return int(linear.weight.shape[-1])


def _is_wide(attention: nn.Module, name: str, num_heads: int) -> bool:
    """Whether a norm goes over all heads together."""
    projection = attention[f"{name[0]}_proj"]
    return num_heads > 1 and attention[name].weight.size == projection.weight.shape[0]


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's own arrays, not its children's."""
    return [(name, value) for name, value in module.items() if isinstance(value, mx.array)]


def _check_empty(part: object, path: str) -> None:
    leaves: Any = tree_flatten(part)
    if any(isinstance(leaf, mx.array) for _, leaf in leaves):
        raise FamilyError(f"tensor parallelism does not know {path}")


def _at(model: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        model = model[name]
    return model
