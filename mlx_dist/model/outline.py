"""Finding the model on every rank: its own files, or an outline of the leader's.

An outline is what a rank must know of a model whose tensors are elsewhere: the small files, and
the weight files by their headers. It goes from rank to rank on the control plane, on which a rank
reaches its neighbours whatever carries it, and is kept in a folder until the session ends.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from mlx_dist.cluster.world import World
from mlx_dist.config import RunConfig, Weights
from mlx_dist.errors import ConfigError, MlxDistError, ModelError, ProtocolError
from mlx_dist.messages import Holding, Outline, Part, expect
from mlx_dist.model.files import (
    SMALL_FILES,
    WEIGHT_FILE,
    ModelFiles,
    WeightFile,
    find_described,
    find_model,
)

# No path can be made of it: nothing but a file's name, and no hidden one.
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# Of tensors it has headers only, which are no use to a rank that gets them.
_INDEX = "*.index.json"
_FOLDER, _LOCK = "mlx_dist-model-", ".lock"
_MOST_BYTES = 256 << 20
_PART_BYTES = 1 << 20

Say = Callable[[str], None]


@contextmanager
def found_model(world: World, config: RunConfig, say: Say) -> Iterator[ModelFiles]:
    """The model's files on this rank; those of an outline are gone at the end.

    With the leader's weights, a rank whose own files are missing or of another version than the
    leader's has an outline; `say`, on the leader, hears of each. Raises AgreedError, the same on
    every rank, if any rank must have files of its own and has none.
    """
    # Ranks that differ in this would wait for different things.
    world.compare({"--weights": config.weights})
    is_own = config.weights == Weights.own
    files, reason = None, ""
    try:
        files = find_model(config.model, asks_hub=is_own or world.is_leader)
    except MlxDistError as error:
        reason = str(error)
    holding = Holding("" if files is None else files.fingerprint(), reason)
    held = [expect(message, Holding) for message in world.control.all_gather(holding)]
    with world.agreement():
        if files is None and (is_own or world.is_leader):
            is_on_leader = not held[world.leader_rank].reason
            raise ModelError(reason + (_REMEDY if is_on_leader else ""))
    fed = {} if is_own else _why_fed(held, world.leader_rank)
    if not fed:
        assert files is not None
        yield files
        return
    if world.is_leader:
        for rank, why in fed.items():
            say(f"rank {rank} ({world.hosts[rank]}) gets its weights from the leader: {why}")
    with world.agreement():
        if config.trust_remote_code:
            raise ConfigError(
                f"rank {min(fed)} ({world.hosts[min(fed)]}) has no files of the model and is sent "
                "no code; copy the model there, or leave --trust-remote-code out"
            )
        contents = _read(files) if files is not None and world.is_leader else {}
    outline, contents = _pass_down(world, files, contents)
    with _folder() as folder:
        with world.agreement():
            if world.rank in fed:
                files = _unpack(config.model, folder, outline, contents)
        assert files is not None
        del contents
        yield files


_REMEDY = "; copy the model there, or have the leader send it: --weights leader"


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is gone at the end. Those that killed processes left behind go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/{_LOCK}"):
        with suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as name:
        unlocked = Path(name) / "unlocked"
        with unlocked.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Nobody finds it before it is locked.
            unlocked.rename(Path(name) / _LOCK)
            yield Path(name)


def _why_fed(held: list[Holding], leader_rank: int) -> dict[int, str]:
    """The ranks that have not the leader's version of the model, and why."""
    due = held[leader_rank].fingerprint
    return {
        rank: holding.reason or f"it has version {holding.fingerprint}, the leader has {due}"
        for rank, holding in enumerate(held)
        if holding.fingerprint != due
    }


def _read(files: ModelFiles) -> dict[str, bytes]:
    """The small files and, by the weight files' names, the headers.

    Raises ModelError if one cannot be read, or if they are too much to be small.
    """
    paths = [path for path in sorted(files.folder.iterdir()) if _is_small(path.name)]
    headers = {file.name: file.header for file in files.weights}
    num_bytes = sum(map(len, headers.values()))
    try:
        sizes = {path: path.stat().st_size for path in paths if path.is_file()}
        if num_bytes + sum(sizes.values()) > _MOST_BYTES:
            largest = max(sizes, key=lambda path: sizes[path])
            raise ModelError(
                f"the small files of {files.name} have more than {_MOST_BYTES >> 20} MiB, "
                f"{largest.name} alone {sizes[largest] >> 20} MiB; move what is none of the "
                "model's out of its folder"
            )
        return {path.name: path.read_bytes() for path in sizes} | headers
    except OSError as error:
        raise ModelError(f"a file of {files.name} cannot be read: {error}") from None


def _is_small(name: str) -> bool:
    is_kind = any(fnmatch(name, pattern) for pattern in SMALL_FILES)
    return is_kind and not fnmatch(name, _INDEX) and _PLAIN_NAME.fullmatch(name) is not None


def _pass_down(
    world: World, files: ModelFiles | None, contents: Mapping[str, bytes]
) -> tuple[Outline, dict[str, bytes]]:
    """The leader's outline with its contents, on every rank, which passes both on."""
    if world.is_leader:
        assert files is not None
        sizes = {file.name: file.size_bytes for file in files.weights}
        lengths = [(name, len(data)) for name, data in contents.items()]
        outline = Outline(files.fingerprint(), lengths, sizes)
        parts = _parts(b"".join(contents.values()))
    else:
        outline = expect(world.control.receive(world.rank - 1), Outline)
        num_parts = -(-_checked_bytes(outline) // _PART_BYTES)
        parts = (expect(world.control.receive(world.rank - 1), Part) for _ in range(num_parts))
    has_next = world.rank + 1 < world.size
    if has_next:
        world.control.send(outline, world.rank + 1)
    data = bytearray()
    for part in parts:
        if has_next:
            world.control.send(part, world.rank + 1)
        data += part.data
    return outline, _cut_up(outline, data)


def _parts(data: bytes) -> Iterator[Part]:
    for start in range(0, len(data), _PART_BYTES):
        yield Part(data[start : start + _PART_BYTES])


def _checked_bytes(outline: Outline) -> int:
    """How many bytes follow. Raises ProtocolError for names that could lead out of a folder."""
    for name, _ in outline.files:
        if not (WEIGHT_FILE.fullmatch(name) if name in outline.weights else _is_small(name)):
            raise ProtocolError(f"an outline names {name!r}, which is no file of a model")
    num_bytes = sum(length for _, length in outline.files)
    if num_bytes > _MOST_BYTES:
        raise ProtocolError(f"an outline of {num_bytes} bytes is more than {_MOST_BYTES}")
    return num_bytes


def _cut_up(outline: Outline, data: bytearray) -> dict[str, bytes]:
    contents, start = {}, 0
    for name, length in outline.files:
        contents[name] = bytes(data[start : start + length])
        start += length
    if start != len(data):
        raise ProtocolError(f"{len(data)} bytes arrived where an outline of {start} was due")
    return contents


def _unpack(
    model: str, folder: Path, outline: Outline, contents: Mapping[str, bytes]
) -> ModelFiles:
    """The model that `outline` describes, with its small files in `folder`.

    Raises ModelError if they cannot be written or used.
    """
    try:
        for name in contents.keys() - outline.weights:
            (folder / name).write_bytes(contents[name])
    except OSError as error:
        raise ModelError(f"the leader's small files cannot be kept in {folder}: {error}") from None
    weights = [
        WeightFile(name, contents[name], size_bytes, None)
        for name, size_bytes in outline.weights.items()
    ]
    return find_described(model, folder, weights, outline.fingerprint)
