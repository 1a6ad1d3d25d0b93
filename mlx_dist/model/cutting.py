"""Leaving of a model's tensors what one rank of a tensor group holds. Knows files and graphs.

The tensors that files hold are called raw. Where a parameter is a raw tensor, or a stack of some,
only the ranges of these that the rank needs are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dist.cluster.placement import Slice
from mlx_dist.errors import FamilyError
from mlx_dist.model.families import Anatomy, Graph
from mlx_dist.model.files import ModelFiles
from mlx_dist.model.ranges import read_part
from mlx_dist.model.slicing import Cut
from mlx_dist.model.tensor import Slicing
from mlx_dist.model.verdicts import SLICED

# A graph is shown with a limited number of names, of outputs and raw tensors together.
_SHOWN = 256

RawTensors = dict[str, mx.array]
# The part of a raw tensor of this name that a cut leaves.
PartOf = Callable[[str, Cut], mx.array]


def slicing_of(name: str, model: nn.Module, anatomy: Anatomy, slice_: Slice) -> Slicing:
    """What a rank holds of `model`, called `name`. Raises FamilyError where it is not proven."""
    family = type(model).__module__.rpartition(".")[2]
    if family not in SLICED:
        raise FamilyError(
            f"{name}: model family {family!r} is not proven for tensor parallelism; use --parallel "
            "pipeline, or one of those that docs/families.md lists as sliced"
        )
    try:
        return Slicing(model, anatomy, slice_)
    except FamilyError as error:
        raise FamilyError(f"{name}: {error}; use --parallel pipeline") from None


def cut(model: nn.Module, slicing: Slicing) -> None:
    """Leave of every parameter what the slicing does; nothing is read yet."""
    cuts = slicing.cuts
    whole = parameters_of(model)
    changed = [(name, _part(whole[name], cut)) for name, cut in cuts.items()]
    model.update(tree_unflatten(changed))


def _part(whole: mx.array, cut: Cut) -> mx.array:
    ranges = [mx.arange(*range_) for range_ in cut.entries(whole.shape[cut.axis])]
    return mx.take(whole, mx.concatenate(ranges), axis=cut.axis)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a slice of a parameter is made of: the cut of one raw tensor, or of a stack of some."""

    names: tuple[str, ...]
    cut: Cut
    are_stacked: bool

    def made(self, part_of: PartOf) -> mx.array:
        """The slice, of these parts."""
        parts = [part_of(name, self.cut) for name in self.names]
        return mx.stack(parts) if self.are_stacked else parts[0]


def pieces_of(model: nn.Module, raw: RawTensors, slicing: Slicing) -> dict[str, Pieces]:
    """Of which raw tensors parts are enough for a parameter's slice, by the parameter's name.

    A parameter that is computed from raw tensors in another way needs them whole.
    """
    made = _sanitized(model, raw)
    # Each for one parameter only.
    name_of = {id(array): name for name, array in raw.items()}
    pieces: dict[str, Pieces] = {}
    others: dict[str, mx.array] = {}
    for name, cut in slicing.cuts.items():
        if (array := made.get(name)) is None:
            continue
        if source := name_of.pop(id(array), None):
            pieces[name] = Pieces((source,), cut, are_stacked=False)
        elif cut.axis > 0:
            others[name] = mx.stop_gradient(array)
    sources = sources_of(raw, others)
    stacks = {
        name: sources[name]
        for name, array in others.items()
        if [raw[each].shape for each in sources[name]] == [array.shape[1:]] * array.shape[0]
    }
    for name, order in _orders(model, raw, stacks).items():
        cut = slicing.cuts[name]
        inside = Cut(cut.axis - 1, cut.ranges, cut.num_parts)
        pieces[name] = Pieces(order, inside, are_stacked=True)
    return pieces


def _orders(
    model: nn.Module, raw: RawTensors, stacks: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The raw tensors of each stack in its order: seen by giving each a number for its content.

    What is no plain stack of them shows, and is left out.
    """
    numbers = {
        name: mx.full((1,) * raw[name].ndim, number, mx.float32)
        for names in stacks.values()
        for number, name in enumerate(names)
    }
    try:
        made = _sanitized(model, raw | numbers)
        found = {name: [int(n) for n in np.array(made[name]).reshape(-1)] for name in stacks}
    except (ValueError, RuntimeError, IndexError, KeyError):
        return {}
    return {
        name: tuple(names[number] for number in found[name])
        for name, names in stacks.items()
        if sorted(found[name]) == list(range(len(names)))
    }


def _sanitized(model: nn.Module, raw: RawTensors) -> RawTensors:
    """The parameters that mlx-lm makes of raw tensors. Nothing is computed."""
    if not hasattr(model, "sanitize"):
        return raw
    made: RawTensors = model.sanitize(dict(raw))
    return made


def parts_of_files(files: ModelFiles) -> PartOf:
    """Parts of raw tensors, read from the files."""
    entries = {name: (f, entry) for f in files.weights for name, entry in f.tensors().items()}

    def part_of(name: str, cut: Cut) -> mx.array:
        file, entry = entries[name]
        assert file.path is not None
        return read_part(file.path, file.data_start, entry, cut)

    return part_of


def sources_of(raw: RawTensors, outputs: dict[str, mx.array]) -> dict[str, tuple[str, ...]]:
    """The raw tensors that each output is made of, sorted, by its name."""
    sources: dict[str, tuple[str, ...]] = {}
    for names in (list(outputs)[i : i + _SHOWN] for i in range(0, len(outputs), _SHOWN)):
        graph = Graph(raw, [outputs[name] for name in names])
        for name in names:
            sources[name] = tuple(sorted(graph.leads_to(outputs[name], None)))
    return sources


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """The model's parameters by name."""
    return dict(tree_flatten(model.parameters()))
