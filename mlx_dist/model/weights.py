"""Loading a stage: its own tensors and no others. Knows arrays; knows no ranks and no network.

mlx-lm builds the model and maps names to modules; here every tensor stays lazy until it is known
to be this stage's, and is then read with few others, so that the peak is the shard plus one
tensor. The tensors that files hold are called raw: a stage's own may be made of several of them.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import _get_classes, load_model

from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.config import Dtype
from mlx_dist.errors import ModelError
from mlx_dist.model.cutting import (
    PartOf,
    RawTensors,
    cut,
    parameters_of,
    parts_of_files,
    pieces_of,
    slicing_of,
    sources_of,
)
from mlx_dist.model.families import Anatomy, dissect
from mlx_dist.model.files import ModelFiles, fetch
from mlx_dist.model.slicing import Cut
from mlx_dist.model.tensor import Slicing

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# What mlx-lm and MLX raise for a config or tensors that do not fit the family.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


# One tensor is read by one thread, which memory that is touched for the first time holds up;
# several are read by several.
_AHEAD_BYTES = 64 << 20

Change = Callable[[RawTensors], RawTensors]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model of which only the stage [start, end) is in memory, or what `slicing` is of it.

    It is as mlx-lm built it until the slicing has joined it to its group.
    """

    model: nn.Module
    anatomy: Anatomy
    weights_bytes: int
    slicing: Slicing | None = None


@dataclass(frozen=True, slots=True)
class OpenStage:
    """A model built, and the tensors of one stage of it, `own`, lazy until they are read.

    A slice is lazy as a part of its whole tensor, of which there may be a `cheaper` way to it.
    """

    name: str
    model: nn.Module
    anatomy: Anatomy
    own: dict[str, mx.array]
    slicing: Slicing | None = None
    cheaper: dict[str, Callable[[], mx.array]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.own.values())

    def read(self) -> Iterator[int]:
        """Read the tensors, a few at a time; yields the bytes of each once it is here.

        Raises ModelError if one cannot be read.
        """
        waiting = deque(self.own)
        ahead: deque[str] = deque()
        ahead_bytes = 0
        while waiting or ahead:
            with self._reading(ahead):
                while waiting:
                    num_bytes = self.own[waiting[0]].nbytes
                    if ahead and ahead_bytes + num_bytes > _AHEAD_BYTES:
                        break
                    ahead.append(waiting.popleft())
                    ahead_bytes += num_bytes
                    self._prepare(ahead[-1])
                    mx.async_eval(self.own[ahead[-1]])  # type: ignore[no-untyped-call]
                mx.eval(self.own[ahead[0]])
            num_bytes = self.own[ahead.popleft()].nbytes
            ahead_bytes -= num_bytes
            yield num_bytes

    def _prepare(self, name: str) -> None:
        """Have the tensor `name` made in the cheaper way, if there is one."""
        if make := self.cheaper.pop(name, None):
            array = make().astype(self.own[name].dtype)
            self.own[name] = array
            self.model.update(tree_unflatten([(name, array)]))

    def make(self, name: str) -> None:
        """Make the tensor `name` now. Raises ModelError if it cannot be read."""
        with self._reading([name]):
            self._prepare(name)
            mx.eval(self.own[name])

    @contextmanager
    def _reading(self, names: Collection[str]) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            _hear_all_failures()
            others = f" or one of the {len(names) - 1} after it" if len(names) > 1 else ""
            raise ModelError(
                f"{self.name}: tensor {next(iter(names))}{others} cannot be read: {error}"
            ) from None

    def loaded(self) -> LoadedModel:
        """The model, once all is read."""
        return LoadedModel(self.model, self.anatomy, self.num_bytes, self.slicing)


def _hear_all_failures() -> None:
    """Wait for the reads under way, so that no computation that comes later hears of a failure.

    MLX tells of each one at the next chance, whosever it is.
    """
    while True:
        with suppress(RuntimeError):
            mx.synchronize(mx.default_stream(mx.cpu))
            return


def load_stage(
    files: ModelFiles,
    start: int,
    end: int,
    dtype: Dtype,
    progress: Callable[[int, int], None],
    slice_: Slice = WHOLE,
) -> LoadedModel:
    """Build the model and read the tensors of the stage [start, end), of each the slice.

    `progress` is called with (bytes read, bytes in all). Raises ModelError if files or tensors
    are missing or damaged.
    """
    stage = open_stage(files, start, end, dtype, slice_=slice_)
    done_bytes, total_bytes = 0, stage.num_bytes
    for num_bytes in stage.read():
        done_bytes += num_bytes
        progress(done_bytes, total_bytes)
    return stage.loaded()


def open_stage(
    files: ModelFiles,
    start: int,
    end: int,
    dtype: Dtype,
    change: Change | None = None,
    slice_: Slice = WHOLE,
    part_of: PartOf | None = None,
) -> OpenStage:
    """Build the model for the stage [start, end); of a model on the hub, fetch its files first.

    `change` is given the raw tensors, all lazy, and answers others in the place of some. Of those
    that the slice needs parts of only, `part_of` answers these, or else they are read from the
    files, when their turn comes. Raises ModelError if files are missing or do not fit the family.
    """
    raw: RawTensors = {}

    def look(tensors: RawTensors) -> RawTensors:
        changed = tensors if change is None else change(tensors)
        raw.update(changed)
        return changed

    model, anatomy = build(files, dtype, look)
    if files.repo is not None and any(file.path is None for file in files.weights):
        own_names = {name for name, _ in _owned(model, anatomy, start, end)}
        files = fetch(files, _files_needed(files, own_names, anatomy, start, end))
        raw.clear()
        model, anatomy = build(files, dtype, look)
    slicing = None
    cheaper: dict[str, Callable[[], mx.array]] = {}
    if slice_.size > 1:
        slicing = slicing_of(files.name, model, anatomy, slice_)
        pieces = pieces_of(model, raw, slicing)
        cut(model, slicing)
        convert(model, dtype)
        get_part = part_of or parts_of_files(files)
        cheaper = {name: partial(each.made, get_part) for name, each in pieces.items()}
    # A class of mlx-lm's still knows them, and would keep what is read of them.
    raw.clear()
    dropped = set() if slicing is None else slicing.dropped
    owned = _owned(model, anatomy, start, end)
    own = {name: array for name, array in owned if name not in dropped}
    return OpenStage(files.name, model, anatomy, own, slicing, cheaper)


def raw_tensors_of(
    files: ModelFiles, start: int, end: int, dtype: Dtype, slice_: Slice = WHOLE
) -> tuple[dict[str, tuple[str, ...]], dict[str, Cut]]:
    """The raw tensors that each tensor of the stage [start, end) is made of, by its name.

    And, by their own, the cuts of those of which the slice needs parts only. Reads none. Raises
    ModelError, as `open_stage`.
    """
    raw: RawTensors = {}

    def look(tensors: RawTensors) -> RawTensors:
        raw.update(tensors)
        return tensors

    model, anatomy = build(files, dtype, look)
    own = dict(_owned(model, anatomy, start, end))
    cuts: dict[str, Cut] = {}
    if slice_.size > 1:
        slicing = slicing_of(files.name, model, anatomy, slice_)
        for pieces in pieces_of(model, raw, slicing).values():
            cuts |= dict.fromkeys(pieces.names, pieces.cut)
        own = {name: array for name, array in own.items() if name not in slicing.dropped}
    # A node of its own for each, for it may be the raw tensor itself.
    outputs = {name: mx.stop_gradient(array) for name, array in own.items()}
    return sources_of(raw, outputs), cuts


def build(
    files: ModelFiles, dtype: Dtype, change: Change | None = None
) -> tuple[nn.Module, Anatomy]:
    """The model with every tensor lazy."""
    try:
        with _folder_to_load(files) as (folder, hollow):
            classes = partial(_classes_once_emptied, hollow, change)
            model, _ = load_model(folder, lazy=True, get_model_classes=classes)
        if change is not None:
            # Once: from here on the class is the family's own.
            model.__class__ = type(model).__base__
        convert(model, dtype)
        return model, dissect(model)
    except _UNFIT as error:
        _hear_all_failures()
        reason = str(error).replace("\n", " ").strip()[:400]
        raise ModelError(f"{files.name} does not load: {reason or type(error).__name__}") from error


@contextmanager
def _folder_to_load(files: ModelFiles) -> Iterator[tuple[Path, list[Path]]]:
    """A folder that looks like the whole model, and which of its weight files are hollow.

    mlx-lm needs every tensor's name and shape. Of a weight file that is not here it gets the
    header and then nothing, up to the size that MLX asks for.
    """
    if files.repo is None and all(f.path == files.folder / f.name for f in files.weights):
        yield files.folder, []
        return
    with tempfile.TemporaryDirectory(prefix="mlx_dist-") as name:
        folder = Path(name)
        for small in files.folder.iterdir():
            if small.suffix != ".safetensors":
                (folder / small.name).symlink_to(small.resolve())
        hollow = []
        for file in files.weights:
            path = folder / file.name
            if file.path is not None:
                path.symlink_to(file.path.resolve())
            else:
                path.write_bytes(struct.pack("<Q", len(file.header)) + file.header)
                os.truncate(path, file.size_bytes)
                hollow.append(path)
        yield folder, hollow


def _classes_once_emptied(
    hollow: list[Path], change: Change | None, config: dict[str, Any]
) -> tuple[Any, Any]:
    """The family's classes, which mlx-lm asks for once MLX has opened every weight file.

    From here on, reading a tensor of a hollow file by mistake is an error, never zeros.
    """
    for path in hollow:
        os.truncate(path, 0)
    model_class, args_class = _get_classes(config)
    if change is None:
        return model_class, args_class

    def sanitize(self: Any, weights: RawTensors) -> RawTensors:
        """What mlx-lm gives the raw tensors to before anything else."""
        changed = change(weights)
        inherited = getattr(super(changing_class, self), "sanitize", None)
        return inherited(changed) if inherited is not None else changed

    changing_class: Any = type(model_class.__name__, (model_class,), {"sanitize": sanitize})
    return changing_class, args_class


def _files_needed(
    files: ModelFiles, own_names: set[str], anatomy: Anatomy, start: int, end: int
) -> frozenset[str]:
    """The weight files with tensors of the stage [start, end).

    Most checkpoints name tensors as mlx-lm's modules do. Where they do not (experts stacked while
    loading, another prefix), the layer's number in the name decides, and tensors without one are
    needed by the first and the last stage.
    """
    named = {name for file in files.weights for name in file.tensors()}
    outside = {n for n in own_names if not n.startswith(anatomy.layers_path + ".")}
    outside_renamed = not outside <= named
    # With a module's weight go the scales it is stored with, which mlx-lm may multiply in.
    modules = {name.rpartition(".")[0] for name in outside}

    def is_needed(name: str) -> bool:
        if name in own_names:
            return True
        numbers = [int(n) for n in _LAYER_NUMBER.findall(name)]
        if numbers:
            return start <= numbers[0] < end
        return outside_renamed or name.rpartition(".")[0] in modules

    return frozenset(file.name for file in files.weights if any(map(is_needed, file.tensors())))


def _owned(
    model: nn.Module, anatomy: Anatomy, start: int, end: int
) -> Iterator[tuple[str, mx.array]]:
    for name, array in parameters_of(model).items():
        if anatomy.owns(name, start, end):
            yield name, array


def convert(model: nn.Module, dtype: Dtype) -> None:
    """Have the model's floating-point tensors become `dtype` when they are read."""
    if dtype is Dtype.auto:
        return
    target: mx.Dtype = getattr(mx, dtype)
    may_cast = getattr(model, "cast_predicate", lambda _name: True)
    converted = [
        (name, array.astype(target))
        for name, array in parameters_of(model).items()
        if mx.issubdtype(array.dtype, mx.floating) and may_cast(name)
    ]
    model.update(tree_unflatten(converted))
