"""A model's files: checking, fetching and loading only what one stage needs.

Knows safetensors and the hub; knows no ranks. mlx-lm builds the model and maps names to
modules; here every tensor stays lazy until it is known to be this stage's, and is then read
alone, so that the peak is the shard plus one tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_config, load_model
from safetensors import SafetensorError, safe_open

from mlx_dist.config import Dtype
from mlx_dist.errors import ModelError
from mlx_dist.model.families import Anatomy, dissect, family_of

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# What mlx-lm and MLX raise for a config or tensors that do not fit the family.
_UNFIT = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file: its header as JSON text, its size, and its path if it is here."""

    name: str
    header: bytes
    size_bytes: int
    path: Path | None

    def tensors(self) -> dict[str, Any]:
        """Name to dtype, shape and data_offsets, as in the header."""
        entries: dict[str, Any] = json.loads(self.header)
        entries.pop("__metadata__", None)
        return entries


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files as found: small ones in `folder`, weights described by their headers.

    `repo` and `revision` are set for a model on the hub.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    weights: tuple[WeightFile, ...]
    repo: str | None = None
    revision: str | None = None

    def fingerprint(self) -> str:
        """Equal on two hosts that have the same model; reads a few kB of each file.

        A model on the hub is known by its revision.
        """
        if self.revision is not None:
            return self.revision
        digest = hashlib.sha256()
        for small in ("config.json", "tokenizer.json"):
            if (self.folder / small).exists():
                digest.update((self.folder / small).read_bytes())
        for file in self.weights:
            digest.update(f"{file.name} {file.size_bytes} ".encode() + file.header)
            if file.path is not None:
                with file.path.open("rb") as stream:
                    stream.seek(file.size_bytes // 2)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model of which only the stage [start, end) is in memory."""

    model: nn.Module
    anatomy: Anatomy
    weights_bytes: int


def find_model(name: str, *, require_proven: bool = True) -> ModelFiles:
    """Find the model called `name`, a folder or a hub id, and check that it can be run.

    Fetches only small files and headers. Raises ModelError, or FamilyError before anything of
    an unproven family is fetched but its config. The proof itself asks for unproven ones, too.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _find_local(name, folder, require_proven)
    if folder.exists():
        raise ModelError(f"--model {name} is a file; name the folder that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(f"--model {name} is neither a folder here nor a hub id (owner/name)")
    return _find_on_hub(name, require_proven)


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
    if files.repo is not None:
        own_names = {name for name, _ in _owned(model, anatomy, start, end)}
        needed = _files_needed(files, own_names, anatomy, start, end)
        model, anatomy = _build(files, dtype, fetch=needed)
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


def _find_local(name: str, folder: Path, require_proven: bool) -> ModelFiles:
    config = _read_config(folder)
    family_of(config, require_proven=require_proven)
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        present = {path.name for path in paths}
        if missing := sorted(_indexed_files(index) - present):
            raise ModelError(f"{name}: {', '.join(missing)} is missing; copy the whole model")
    if not paths:
        raise ModelError(f"{name} has no model*.safetensors; is this a model's folder?")
    return ModelFiles(name, folder, config, tuple(_read_header(path) for path in paths))


def _find_on_hub(name: str, require_proven: bool) -> ModelFiles:
    with _fetching(name):
        config_path = Path(hf_hub_download(name, "config.json"))
        revision = config_path.parent.name
        family_of(_read_config(config_path.parent), require_proven=require_proven)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES))
        index = folder / "model.safetensors.index.json"
        names = sorted(_indexed_files(index)) if index.exists() else ["model.safetensors"]
        weights = tuple(_hub_header(name, file, revision) for file in names)
    return ModelFiles(name, folder, _read_config(folder), weights, name, revision)


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Raise ModelError for whatever keeps a model on the hub from being fetched."""
    try:
        yield
    except (OSError, ValueError, HTTPError, SafetensorsParsingError) as error:
        # The first line says what matters.
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"--model {name} is no folder and cannot be fetched: {reason}") from None


def _hub_header(repo: str, name: str, revision: str) -> WeightFile:
    cached = try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(cached, str):
        return _read_header(Path(cached))
    metadata = HfApi().parse_safetensors_file_metadata(repo, name, revision=revision)
    entries = {
        key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
        for key, t in metadata.tensors.items()
    }
    header = json.dumps({"__metadata__": metadata.metadata or {}} | entries).encode()
    data_bytes = max((t.data_offsets[1] for t in metadata.tensors.values()), default=0)
    return WeightFile(name, header, 8 + len(header) + data_bytes, None)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; is this a model's folder?")
    try:
        config = load_config(folder)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object")
    if "model_file" in config:
        raise ModelError(
            f"{folder / 'config.json'} asks to run {config['model_file']!r}, code that came with "
            "the model; mlx_dist runs no such code"
        )
    return config


def _indexed_files(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index} is damaged; copy it again") from None


def _read_header(path: Path) -> WeightFile:
    """The header of a safetensors file. Raises ModelError if the file is damaged or cut off."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or was cut off ({error}); copy it again") from None
    with path.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(header_bytes)
    return WeightFile(path.name, header, path.stat().st_size, path)


def _build(
    files: ModelFiles, dtype: Dtype, fetch: frozenset[str] = frozenset()
) -> tuple[nn.Module, Anatomy]:
    """The model with every tensor lazy. Of a hub model the weight files in `fetch` are real."""
    try:
        with _folder_to_load(files, fetch) as folder:
            model, _ = load_model(folder, lazy=True)
        _convert(model, dtype)
        return model, dissect(model)
    except _UNFIT as error:
        reason = str(error).replace("\n", " ").strip()[:400]
        raise ModelError(f"{files.name} does not load: {reason or type(error).__name__}") from error


@contextmanager
def _folder_to_load(files: ModelFiles, fetch: frozenset[str]) -> Iterator[Path]:
    """A folder that looks like the whole model, in which absent weights are only headers.

    mlx-lm needs every tensor's name and shape. An absent file is a sparse one, emptied once MLX
    has opened it: its tensors have shapes, and reading one by mistake is an error, never zeros.
    """
    if files.repo is None:
        yield files.folder
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
            elif file.name in fetch:
                with _fetching(files.name):
                    fetched = hf_hub_download(files.repo, file.name, revision=files.revision)
                path.symlink_to(Path(fetched).resolve())
            else:
                path.write_bytes(struct.pack("<Q", len(file.header)) + file.header)
                os.truncate(path, file.size_bytes)
                hollow.append(path)
        yield folder
        for path in hollow:
            os.truncate(path, 0)


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

    def is_needed(name: str) -> bool:
        if name in own_names:
            return True
        numbers = [int(n) for n in _LAYER_NUMBER.findall(name)]
        if numbers:
            return start <= numbers[0] < end
        return outside_renamed

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
