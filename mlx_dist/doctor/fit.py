"""The checks of the model: whether its files are here and the same, and whether it fits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from mlx_dist import display
from mlx_dist.cluster.world import World
from mlx_dist.display import Level
from mlx_dist.doctor import prompts, wires
from mlx_dist.doctor.findings import (
    Answer,
    Facts,
    Finding,
    Subject,
    ask,
    differences,
    errors,
    everywhere,
    place,
)
from mlx_dist.engine.placing import Layout, lay_out
from mlx_dist.engine.session import Session
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import AgreedError, ModelError
from mlx_dist.model.files import ModelFiles
from mlx_dist.model.outline import found_model

_BLOCK_BYTES = 8 << 20
_HEX_DIGITS = 16
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Of what a rank may use; beyond it the system begins to swap.
_TIGHT = 0.9


def check(subject: Subject) -> Iterator[Finding]:
    """Look at the model. What cannot be looked at for what came before is said to be so."""
    world = subject.world
    with ExitStack() as stack:
        fed: list[str] = []
        chosen: list[str] = []
        try:
            files = stack.enter_context(found_model(world, subject.config, fed.append))
            tokenizer = _tokenizer(subject, files)
        except AgreedError as error:
            yield Finding(Level.fail, "model", str(error))
            yield from _not_looked_at("files", "memory", *prompts.NAMES)
            return
        yield Finding(Level.ok, "model", files.name + everywhere(world), details=tuple(fed))
        copies = _copies(subject, files)
        yield copies
        try:
            layout = lay_out(world, subject.config, files, chosen.append)
        except AgreedError as error:
            yield Finding(Level.fail, "memory", str(error))
            yield from _not_looked_at(*prompts.NAMES)
            return
        yield _memory(world, layout, chosen)
        if len(layout.ranks) > len(layout.stages):
            dtype = None if layout.costs is None else layout.costs.dtype
            yield wires.sums(world, layout.stages, dtype)
        if copies.level is Level.fail:
            yield from _not_looked_at(*prompts.NAMES)
            return
        session = Session(world, subject.config, files, tokenizer, {}, layout)
        yield from prompts.check(session)


def _tokenizer(subject: Subject, files: ModelFiles) -> Tokenizer | None:
    """The leader's. Raises AgreedError."""
    with subject.world.agreement():
        if subject.world.is_leader:
            return Tokenizer(files.folder, files.config, subject.config.trust_remote_code)
    return None


def _not_looked_at(*names: str) -> Iterator[Finding]:
    for name in names:
        yield Finding(
            Level.warn, name, "not looked at", "put right what failed, and run this again"
        )


def _copies(subject: Subject, files: ModelFiles) -> Finding:
    """Whether the ranks that have the model's files have the same."""
    name, world = "files", subject.world
    if subject.is_quick:
        told = differences(world, ask(world, lambda: {"fingerprint": files.fingerprint()}))
        found = "equal by size, header and a sample of each; leave --quick out to read them whole"
    else:
        answers = _hashed(world, files)
        if damaged := errors(world, answers):
            return Finding(Level.fail, name, "; ".join(damaged))
        told = differences(world, answers)
        num_files = len({name for answer in answers for name in answer.facts})
        num_bytes = sum(file.size_bytes for file in files.weights if file.path is not None)
        found = f"{num_files} files, {num_bytes / 1e9:.3f} GB of weights, read whole"
        found += ": equal by SHA-256" + everywhere(world) if world.size > 1 else ""
    if told:
        remedy = "copy the model again from the host where it is right (shasum -a 256 tells)"
        return Finding(Level.fail, name, "; ".join(told), remedy)
    return Finding(Level.ok, name, found)


def _hashed(world: World, files: ModelFiles) -> list[Answer]:
    """The beginnings of all files' SHA-256 on each rank; ranks that share a folder read it once."""
    folder = str(files.folder.resolve())
    folders = [
        (world.hosts[a.rank], a.facts["folder"]) for a in ask(world, lambda: {"folder": folder})
    ]
    first = folders.index(folders[world.rank])

    def own() -> Facts:
        return _hashes(files, world.is_leader) if world.rank == first else {}

    return ask(world, own)


def _hashes(files: ModelFiles, is_shown: bool) -> Facts:
    """Raises ModelError for a file that cannot be read or is not what the hub has."""
    weights = [file.path for file in files.weights if file.path is not None]
    paths = [*weights, *(files.folder / small for small in _SMALL_FILES)]
    paths = [path for path in paths if path.exists()]
    total_bytes = sum(path.stat().st_size for path in paths)
    hashes, done_bytes = {}, 0
    with display.progress_bar("reading", is_shown, in_bytes=True) as progress:
        for path in paths:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as stream:
                    while block := stream.read(_BLOCK_BYTES):
                        digest.update(block)
                        done_bytes += len(block)
                        progress(done_bytes, total_bytes)
            except OSError as error:
                raise ModelError(f"{path} cannot be read: {error}; copy it again") from None
            _check_blob(path, digest.hexdigest())
            hashes[path.name] = digest.hexdigest()[:_HEX_DIGITS]
    return hashes


def _check_blob(path: Path, digest: str) -> None:
    """The hub's cache names a large file by its SHA-256."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == len(digest) and blob.name != digest:
        raise ModelError(f"{path} is not what the hub has; remove {blob} and download it again")


def _memory(world: World, layout: Layout, chosen: list[str]) -> Finding:
    """How much of its memory each rank needs; told by the leader, who knows the costs.

    And what the leader has `chosen`, where it was to choose.
    """
    name = "memory"
    if layout.counted is None:
        return Finding(Level.ok, name, "")
    details, fullest = [*chosen], 0.0
    for share in layout.shares:
        weights_bytes = layout.counted.of(share.slice).weights_bytes(share.start, share.end)
        part = f", {share.slice.spelled} of each" if share.slice.size > 1 else ""
        usable_bytes = layout.machines[share.machine].usable_bytes
        fullest = max(fullest, weights_bytes / usable_bytes)
        details.append(
            f"{place(world, share.machine)}  layers [{share.start}, {share.end}){part}  "
            f"{weights_bytes / 1e9:.3f} GB of weights in {usable_bytes / 1e9:.1f} GB"
        )
    found = f"the weights take at most {fullest:.0%} of what a rank may use"
    if fullest > _TIGHT:
        remedy = "end other programs, add a host, or use a model of fewer bits"
        return Finding(Level.warn, name, found, remedy, tuple(details))
    return Finding(Level.ok, name, found, details=tuple(details))
