"""Which mlx-lm families run split, and what a stage must know of a model's build.

Nothing here is written down per family except the verdict: a model is taken apart by watching
one forward pass of its own code, which builds a graph and computes nothing. The verdicts come
from `python -m benchmarks.families`, which proves each one at several cuts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

from mlx_dist.errors import FamilyError
from mlx_dist.model.verdicts import PROVEN, REFUSED


def family_of(config: dict[str, Any], *, require_proven: bool = True) -> str:
    """The name of the mlx-lm module that a model's config.json asks for.

    Raises FamilyError, naming the reason, if that family is not proven to run split and must be.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type; is this a language model's folder?")
    family: str
    for architecture in config.get("architectures") or ():
        if family := MODEL_ARCHITECTURE_REMAPPING.get((model_type, architecture)):
            break
    else:
        family = MODEL_REMAPPING.get(model_type, model_type)
    if require_proven and family not in PROVEN:
        reason = REFUSED.get(family, "mlx-lm has no such family, or it is newer than the proof")
        raise FamilyError(
            f"model family {model_type!r} is not proven to run split ({reason}); "
            "docs/families.md lists the families that are"
        )
    return family


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parts of a model are.

    `layers` is the model's own list, which its forward pass walks. `caches_of_layer[i]` are the
    indices, in the list that the model's `make_cache` returns, of the caches that layer i uses.
    `hidden_tail` and `hidden_dtypes[i]` are the shape after (B, L) and the dtype of what reaches
    layer i; layers put out `num_extras` values after it, which no other layer uses. Logits have
    `vocab_size` entries. `users` says of each parameter outside the layers where it is used: at
    the layers of these numbers, at -1 before the first, or at `num_layers` after the last.
    """

    layers: list[Any]
    layers_path: str
    caches_of_layer: tuple[tuple[int, ...], ...]
    hidden_tail: tuple[int, ...]
    hidden_dtypes: tuple[mx.Dtype, ...]
    num_extras: int
    vocab_size: int
    users: dict[str, frozenset[int]]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def owns(self, name: str, start: int, end: int) -> bool:
        """Whether the stage [start, end) needs the parameter called `name`."""
        if index := _layer_index(name, self.layers_path):
            return start <= int(index) < end
        first = -1 if start == 0 else start
        last = self.num_layers if end == self.num_layers else end - 1
        return any(first <= user <= last for user in self.users[name])


_WATCHED_SHAPE = (1, 2)  # one sequence, two tokens
_MOST_NAMES = 1024  # of arguments in a call of MLX


class StandIn:
    """Takes a layer's place in the model's list, where it passes for that layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    # A few models ask their layers for their class.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._layer.__class__


class _Watched(StandIn):
    """Stands for a layer during the watched forward pass and notes how it is called."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.arguments: tuple[Any, ...] = ()
        self.num_calls = 0
        self.num_extras = 0
        self.hidden: Any = None
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        self.hidden = hidden_argument(args, kwargs)
        self.arguments = (*args, *kwargs.values())
        output = self._layer(*args, **kwargs)
        self.output, *extras = output if isinstance(output, tuple) else (output,)
        self.num_extras = len(extras)
        if isinstance(self.output, mx.array):
            # A node of its own in the graph, even if the layer hands its input on.
            self.output = mx.stop_gradient(self.output)
        return (self.output, *extras) if extras else self.output

    def is_plain(self) -> bool:
        return all(
            isinstance(array, mx.array) and array.shape[:2] == _WATCHED_SHAPE
            for array in (self.hidden, self.output)
        )


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state, which comes first, in what a model calls a layer with."""
    return args[0] if args else next(iter(kwargs.values()))


def hidden_output(output: Any) -> Any:
    """The hidden state in what a layer puts out."""
    return output[0] if isinstance(output, tuple) else output


def dissect(model: nn.Module) -> Anatomy:
    """Take `model` apart. Computes nothing and reads no weights.

    Raises FamilyError if its layers cannot be cut apart.
    """
    layers_path, layers = _find_layers(model)
    caches = make_prompt_cache(model)
    originals = list(layers)
    watched = [_Watched(layer) for layer in originals]
    layers[:] = watched
    try:
        logits = model(mx.zeros(_WATCHED_SHAPE, mx.int32), cache=caches)
    finally:
        layers[:] = originals
    if any(w.num_calls != 1 for w in watched):
        raise FamilyError("its layers do not run one after another, once each")
    if not all(w.is_plain() for w in watched):
        raise FamilyError("its layers pass several tensors on")
    outputs = [w.output for w in watched]
    if len({(w.output.shape, w.num_extras) for w in watched}) > 1:
        raise FamilyError("its layers do not all pass on the same kind of tensor")
    index_of = {id(cache): index for index, cache in enumerate(caches)}
    return Anatomy(
        layers=layers,
        layers_path=layers_path,
        caches_of_layer=tuple(
            tuple(index_of[id(a)] for a in w.arguments if id(a) in index_of) for w in watched
        ),
        hidden_tail=outputs[0].shape[2:],
        hidden_dtypes=tuple(array.dtype for array in (watched[0].hidden, *outputs[:-1])),
        num_extras=watched[0].num_extras,
        vocab_size=logits.shape[-1],
        users=_find_users(model, layers_path, [watched[0].hidden, *outputs, logits]),
    )


def _find_users(
    model: nn.Module, layers_path: str, hidden: list[mx.array]
) -> dict[str, frozenset[int]]:
    """Where each parameter outside the layers is used, read off the graph of a forward pass.

    `hidden` are the hidden state before the first layer, what each layer puts out, and the
    logits. Raises FamilyError if a layer needs more of another than its hidden state.
    """
    parameters = dict(tree_flatten(model.parameters()))
    of_layer = {name: _layer_index(name, layers_path) for name in parameters}
    users: dict[str, set[int]] = {name: set() for name in parameters if not of_layer[name]}
    graph = Graph(parameters, hidden)
    before: list[mx.array | None] = [None, *hidden[:-1]]
    for user, (stop, output) in enumerate(zip(before, hidden, strict=True), start=-1):
        for name in graph.leads_to(output, stop):
            if name in users:
                users[name].add(user)
            elif of_layer[name] != str(user):
                raise FamilyError(
                    f"layer {user} uses more of layer {of_layer[name]} than its output"
                )
    last = frozenset({len(hidden) - 2})
    return {name: frozenset(found) or last for name, found in users.items()}


class Graph:
    """The graph that MLX has built and not computed, as `mx.export_to_dot` shows it.

    It takes a limited number of names, so that the graph is looked at for some of the parameters
    after others.
    """

    def __init__(self, parameters: dict[str, mx.array], outputs: list[mx.array]) -> None:
        names = {f"output {i}": array for i, array in enumerate(outputs)}
        self._node_of = {id(array): f'"{name}"' for name, array in names.items()}
        listed = list(parameters.items())
        num_more = _MOST_NAMES - len(names)
        assert num_more > 0
        self._views = [
            _View(dict(listed[start : start + num_more]), names)
            for start in range(0, len(listed), num_more)
        ]

    def leads_to(self, output: mx.array, stop: mx.array | None) -> Iterator[str]:
        """The names of the parameters that `output` is computed from, not looking past `stop`.

        Raises FamilyError if `output` does not come from `stop`.
        """
        stop_node = self._node_of[id(stop)] if stop is not None else None
        for view in self._views:
            yield from view.leads_to(self._node_of[id(output)], stop_node)


class _View:
    """A graph with the names of `parameters` and of `outputs`."""

    def __init__(self, parameters: dict[str, mx.array], outputs: dict[str, mx.array]) -> None:
        self._parameters = parameters
        dot = io.StringIO()
        mx.export_to_dot(dot, *outputs.values(), **parameters, **outputs)
        self._inputs: dict[str, list[str]] = {}
        # An operation shows as: {node [label=...]}, its inputs, its outputs. The number of the
        # node does not tell operations apart: the calls of a compiled function share it.
        inputs: list[str] = []
        for line in dot.getvalue().splitlines():
            source, _arrow, target = line.partition(" -> ")
            if "[label" in line:
                inputs = []
            elif target.startswith('"'):
                self._inputs[target] = inputs
            elif target:
                inputs.append(source)

    def leads_to(self, output_node: str, stop_node: str | None) -> Iterator[str]:
        seen: set[str] = set()
        ahead = [output_node]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            if node == stop_node:
                continue
            if (name := node.strip('"')) in self._parameters:
                yield name
            ahead += self._inputs.get(node, ())
        if stop_node not in (None, *seen):
            raise FamilyError(
                "its code computes while it runs, so that every stage would read the whole model"
            )


def _layer_index(name: str, layers_path: str) -> str | None:
    """The layer's number in a parameter's name, or None if it is of no layer."""
    if not name.startswith(layers_path + "."):
        return None
    return name.removeprefix(layers_path + ".").split(".", 1)[0]


def _find_layers(model: nn.Module) -> tuple[str, list[Any]]:
    """The path and the list of the model's layers, the very list that its forward pass walks."""
    shown = list(model.layers)
    for path, module in model.named_modules():
        for key, value in module.items():
            if (
                isinstance(value, list)
                and len(value) == len(shown) > 0
                and all(a is b for a, b in zip(value, shown, strict=True))
            ):
                return f"{path}.{key}" if path else key, value
    raise FamilyError("its layers are not one list")
