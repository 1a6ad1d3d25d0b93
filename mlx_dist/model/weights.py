"""Loading a stage: its own tensors and no others. Knows arrays; knows no ranks and no network.

mlx-lm builds the model and maps names to modules; here every tensor stays lazy until it is known
to be this stage's, and is then read alone, so that the peak is the shard plus one tensor.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, load_model

from mlx_dist.config import Dtype
from mlx_dist.errors import ModelError
from mlx_dist.model.families import Anatomy, dissect
from mlx_dist.model.files import ModelFiles, fetch

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# What mlx-lm and MLX raise for a config or tensors that do not fit the family.
_UNFIT = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model of which only the stage [start, end) is in memory."""

    model: nn.Module
    anatomy: Anatomy
    weights_bytes: int


def load_stage(
    files: ModelFiles,
    cut: Callable[[int], tuple[int, int]],
    dtype: Dtype,
    progress: Callable[[int, int], None],
) -> LoadedModel:
    """Build the model and read the tensors of one stage, one at a time.

    `cut` is told the number of layers and answers the stage's [start, end). `progress` is called
    with (bytes read, bytes in all). Raises ModelError if files or tensors are missing or damaged.
    """
    model, anatomy = _build(files, dtype)
    start, end = cut(anatomy.num_layers)
    if any(file.path is None for file in files.weights):
        own_names = {name for name, _ in _owned(model, anatomy, start, end)}
        files = fetch(files, _files_needed(files, own_names, anatomy, start, end))
        model, anatomy = _build(files, dtype)
    own = list(_owned(model, anatomy, start, end))
    total_bytes = sum(array.nbytes for _, array in own)
    done_bytes = 0
    for name, array in own:
        try:
            mx.eval(array)
        except RuntimeError as error:
            raise ModelError(f"{files.name}: tensor {name} cannot be read: {error}") from None
        done_bytes += array.nbytes
        progress(done_bytes, total_bytes)
    return LoadedModel(model, anatomy, total_bytes)


def _build(files: ModelFiles, dtype: Dtype) -> tuple[nn.Module, Anatomy]:
    """The model with every tensor lazy."""
    try:
        with _folder_to_load(files) as (folder, hollow):
            classes = partial(_classes_once_emptied, hollow)
            model, _ = load_model(folder, lazy=True, get_model_classes=classes)
        _convert(model, dtype)
        return model, dissect(model)
    except _UNFIT as error:
        reason = str(error).replace("\n", " ").strip()[:400]
        raise ModelError(f"{files.name} does not load: {reason or type(error).__name__}") from error


@contextmanager
def _folder_to_load(files: ModelFiles) -> Iterator[tuple[Path, list[Path]]]:
    """A folder that looks like the whole model, and which of its weight files are hollow.

    mlx-lm needs every tensor's name and shape. Of a weight file that is not here it gets the
    header and then nothing, up to the size that MLX asks for.
    """
    if files.repo is None:
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


def _classes_once_emptied(hollow: list[Path], config: dict[str, Any]) -> Any:
    """The family's classes, which mlx-lm asks for once MLX has opened every weight file.

    From here on, reading a tensor of a hollow file by mistake is an error, never zeros.
    """
    for path in hollow:
        os.truncate(path, 0)
    return _get_classes(config)


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
    for name, array in _parameters(model).items():
        if anatomy.owns(name, start, end):
            yield name, array


def _convert(model: nn.Module, dtype: Dtype) -> None:
    """Have the model's floating-point tensors become `dtype` when they are read."""
    if dtype is Dtype.auto:
        return
    target: mx.Dtype = getattr(mx, dtype)
    may_cast = getattr(model, "cast_predicate", lambda _name: True)
    converted = [
        (name, array.astype(target))
        for name, array in _parameters(model).items()
        if mx.issubdtype(array.dtype, mx.floating) and may_cast(name)
    ]
    model.update(tree_unflatten(converted))


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))
