"""Finding a model: its files here or on the hub, checked before they are trusted.

Knows safetensors headers and the hub; knows no arrays and no ranks.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from huggingface_hub.utils import WeakFileLock
from mlx_lm.utils import load_config
from safetensors import SafetensorError, safe_open

from mlx_dist.errors import ModelError
from mlx_dist.model.bounds import (
    check_config,
    check_file,
    check_layers,
    check_small_files,
    check_tensors,
)
from mlx_dist.model.families import family_of

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
WEIGHT_FILE = re.compile(r"model[\w.-]*\.safetensors", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_ANSWERS_S = 10.0
# What huggingface_hub, its HTTP client and its downloader hf_xet raise.
_UNFETCHED = (OSError, ValueError, RuntimeError, HTTPError, SafetensorsParsingError)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file: its header as JSON text, its size, and its path if it is here."""

    name: str
    header: bytes
    size_bytes: int
    path: Path | None

    @property
    def data_start(self) -> int:
        """Where the tensors begin that the header's offsets count from."""
        return 8 + len(self.header)

    def tensors(self) -> dict[str, Any]:
        """Name to dtype, shape and data_offsets, as in the header."""
        entries: dict[str, Any] = json.loads(self.header)
        entries.pop("__metadata__", None)
        return entries


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files as found: small ones in `folder`, weights described by their headers.

    `repo` is set for a model on the hub. `revision` says which version this is, where it is not
    the files here that do: a commit on the hub, or the leader's fingerprint.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    weights: tuple[WeightFile, ...]
    repo: str | None = None
    revision: str | None = None

    def fingerprint(self) -> str:
        """Equal on two hosts that have the same model; reads a few kB of each file.

        What has a revision is known by it.
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


def find_model(name: str, *, require_proven: bool = True, asks_hub: bool = True) -> ModelFiles:
    """Find the model called `name`, a folder or a hub id, and check that it can be run.

    Fetches only small files and headers, and nothing unless it `asks_hub`. Raises ModelError, or
    FamilyError before anything of an unproven family is fetched but its config. The proof itself
    asks for unproven ones, too.
    """
    try:
        folder = Path(name).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"--model {name} cannot be looked at: {error}") from None
    if is_folder:
        return _find_local(name, folder, require_proven)
    if exists:
        raise ModelError(f"--model {name} is a file; name the folder that holds it")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"--model {name} is neither a folder here nor a hub id (owner/name)")
    if not asks_hub:
        raise ModelError(f"--model {name} is no folder here")
    return _find_on_hub(name, require_proven)


def find_described(
    name: str, folder: Path, weights: Iterable[WeightFile], revision: str
) -> ModelFiles:
    """The model of which `folder` has the small files and `weights` are descriptions.

    Of the weight files, those are used that this host has fetched from the hub before, and that
    are the ones described. Raises ModelError, as `find_model`.
    """
    config = _read_config(folder)
    family_of(config, require_proven=True)
    found = tuple(_if_cached(file, name, revision) for file in weights)
    return ModelFiles(name, folder, config, found, revision=revision)


def fetch(files: ModelFiles, needed: frozenset[str]) -> ModelFiles:
    """`files` with those called `needed` on this host, which downloads each of them once."""
    with _fetching(files.name):
        weights = tuple(
            _read_header(Path(hf_hub_download(files.repo, file.name, revision=files.revision)))
            if file.path is None and file.name in needed
            else file
            for file in files.weights
        )
    return replace(files, weights=weights)


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
    weights = tuple(_read_header(path) for path in paths)
    check_layers(config, sum(len(file.tensors()) for file in weights), name)
    return ModelFiles(name, folder, config, weights)


def _find_on_hub(name: str, require_proven: bool) -> ModelFiles:
    with _fetching(name):
        try:
            # Asked first: a download goes on for minutes trying a hub that does not answer.
            HfApi().model_info(name, timeout=_HUB_ANSWERS_S)
        except (OSError, HTTPError):
            if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                raise
        config_path = Path(hf_hub_download(name, "config.json"))
        revision = config_path.parent.name
        family_of(_read_config(config_path.parent), require_proven=require_proven)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL_FILES)))
        index = folder / "model.safetensors.index.json"
        names = sorted(_indexed_files(index)) if index.exists() else ["model.safetensors"]
        weights = tuple(_hub_header(name, file, revision) for file in names)
    config = _read_config(folder)
    check_layers(config, sum(len(file.tensors()) for file in weights), name)
    return ModelFiles(name, folder, config, weights, name, revision)


def _if_cached(file: WeightFile, repo: str, revision: str) -> WeightFile:
    """`file` with its path, if the hub's cache here has the very file."""
    if not _HUB_ID.fullmatch(repo):
        return file
    cached = try_to_load_from_cache(repo, file.name, revision=revision)
    if not isinstance(cached, str):
        return file
    here = _read_header(Path(cached))
    is_same = here.size_bytes == file.size_bytes and here.tensors() == file.tensors()
    return here if is_same else file


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Raise ModelError for whatever keeps a model on the hub from being fetched."""
    try:
        yield
    except _UNFETCHED as error:
        # The first line has the status, the next one what it is about.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        raise ModelError(f"--model {name} is no folder and cannot be fetched: {reason}") from None


def _hub_header(repo: str, name: str, revision: str) -> WeightFile:
    """A weight file as its header describes it, which is kept for runs without the hub."""
    cached = try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(cached, str):
        return _read_header(Path(cached))
    kept = cached_assets_path("mlx_dist", repo, revision) / f"{name}.header"
    with WeakFileLock(f"{kept}.lock"):  # One rank of this host fetches it.
        if not kept.exists():
            unfinished = kept.with_suffix(".unfinished")
            unfinished.write_bytes(_fetch_header(repo, name, revision))
            unfinished.replace(kept)
    file = WeightFile(name, kept.read_bytes(), 0, None)
    data_bytes = max((t["data_offsets"][1] for t in file.tensors().values()), default=0)
    return replace(file, size_bytes=8 + len(file.header) + data_bytes)


def _fetch_header(repo: str, name: str, revision: str) -> bytes:
    metadata = HfApi().parse_safetensors_file_metadata(repo, name, revision=revision)
    entries = {
        key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
        for key, t in metadata.tensors.items()
    }
    return json.dumps({"__metadata__": metadata.metadata or {}} | entries).encode()


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; is this a model's folder?")
    check_small_files(folder)
    try:
        config = load_config(folder)
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise ModelError(
            f"{folder / 'config.json'}, or generation_config.json beside it, is not valid: {error}"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object")
    for key, kind in (("architectures", list), ("text_config", dict)):
        if not isinstance(config.get(key), kind | None):
            raise ModelError(f"{folder / 'config.json'} has no {kind.__name__} for {key!r}")
    if "model_file" in config:
        raise ModelError(
            f"{folder / 'config.json'} asks to run {config['model_file']!r}, code that came with "
            "the model; mlx_dist runs no such code"
        )
    check_config(config, folder / "config.json")
    return config


def _indexed_files(index: Path) -> set[str]:
    try:
        check_file(index)
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        # mlx-lm reads no others; and what the index says becomes a path.
        strange = sorted(name for name in names if not WEIGHT_FILE.fullmatch(name))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{index} is damaged; copy it again") from None
    if strange:
        raise ModelError(f"{index} names {strange[0]!r}, which is no model*.safetensors beside it")
    return names


def _read_header(path: Path) -> WeightFile:
    """The header of a safetensors file. Raises ModelError if the file is damaged or cut off."""
    check_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or was cut off ({error}); copy it again") from None
    with path.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(header_bytes)
    file = WeightFile(path.name, header, path.stat().st_size, path)
    check_tensors(file.tensors(), path)
    return file
