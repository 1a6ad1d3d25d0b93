"""The checks of hosts: versions, settings, the BLAS, clocks, folders. Knows no model."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from huggingface_hub.constants import HF_HUB_CACHE

import mlx_dist
from mlx_dist.cluster import memo
from mlx_dist.cluster.world import World
from mlx_dist.display import Level
from mlx_dist.doctor.findings import (
    Facts,
    Finding,
    Subject,
    ask,
    differences,
    everywhere,
    on_each,
    place,
)
from mlx_dist.engine.session import settings
from mlx_dist.messages import Outcome

_CLOCKS_APART_S = 2.0
_SHARED_MEMORY = Path("/dev/shm")
# Open MPI keeps the queues between ranks of a host in it.
_LEAST_SHARED_BYTES = 32 << 20
# A connection is an open file, and so are the model's.
_LEAST_FILES = 2048 + 64


def check(subject: Subject) -> Iterator[Finding]:
    """Look at every host."""
    yield _versions(subject.world)
    yield _settings(subject)
    yield _blas(subject)
    yield _clock(subject.world)
    yield on_each(subject.world, _folders(subject))
    yield on_each(subject.world, _shared_memory())
    yield on_each(subject.world, _open_files())


def _versions(world: World) -> Finding:
    name = "versions"
    answers = ask(
        world,
        lambda: {
            "mlx_dist": mlx_dist.__version__,
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
            "Python": platform.python_version(),
        },
    )
    told = differences(world, answers)
    if not told:
        same = ", ".join(f"{what} {number}" for what, number in answers[0].facts.items())
        return Finding(Level.ok, name, same + everywhere(world))
    if all(difference.startswith("Python ") for difference in told):
        remedy = "this may work; use one version of Python on every host to be sure"
        return Finding(Level.warn, name, "; ".join(told), remedy)
    pins = " ".join(f"{what}=={answers[0].facts[what]}" for what in ("mlx", "mlx-lm"))
    remedy = f"install one version on every host: pip install {pins}, and one mlx_dist"
    return Finding(Level.fail, name, "; ".join(told), remedy)


def _settings(subject: Subject) -> Finding:
    """What decides how numbers come out, beside versions."""
    world = subject.world
    own = settings(subject.config)
    names = {name for answer in ask(world, lambda: dict(own)) for name in answer.facts}
    facts: Facts = {name: own.get(name, "nothing") for name in sorted(names)}
    told = differences(world, ask(world, lambda: facts))
    if told:
        remedy = "make them equal on every host; plain mpirun needs -x NAME for a variable"
        return Finding(Level.fail, "settings", "; ".join(told), remedy)
    found = ", ".join(f"{what} {value}" for what, value in facts.items())
    return Finding(Level.ok, "settings", found + everywhere(world))


def _blas(subject: Subject) -> Finding:
    name, world = "BLAS", subject.world
    if mx.default_device().type.name != "cpu":
        ask(world, dict)
        return Finding(Level.ok, name, "not used: MLX computes on the GPU")
    answers = ask(world, lambda: {"BLAS": subject.blas})
    told = differences(world, answers)
    slow = [a.rank for a in answers if a.facts.get("BLAS") == "reference"]
    remedy = "install an optimized one, on Debian: apt install libopenblas0-pthread"
    if told:
        return Finding(Level.fail, name, "; ".join(told), f"use one on every host: {remedy}")
    if slow:
        found = "MLX's own reference BLAS, which is many times slower" + everywhere(world)
        return Finding(Level.warn, name, found, remedy)
    return Finding(Level.ok, name, subject.blas + everywhere(world))


def _clock(world: World) -> Finding:
    """How far the clocks are apart, as far as an exchange of all with all can tell."""
    name = "clocks"
    # All leave this at nearly the same time.
    world.control.all_gather(Outcome())
    now = time.time()
    times = [float(a.facts["time"]) for a in ask(world, lambda: {"time": repr(now)})]
    apart_s = [t - times[world.leader_rank] for t in times]
    wrong = [rank for rank, s in enumerate(apart_s) if abs(s) > _CLOCKS_APART_S]
    if wrong:
        found = ", ".join(
            f"{place(world, rank)} is {abs(apart_s[rank]):,.0f} s "
            f"{'ahead of' if apart_s[rank] > 0 else 'behind'} rank {world.leader_rank}"
            for rank in wrong
        )
        remedy = (
            "set the clocks by the network, or logs of hosts cannot be compared; Linux: "
            "timedatectl set-ntp true; macOS: System Settings, General, Date & Time"
        )
        return Finding(Level.warn, name, found, remedy)
    if world.size == 1:
        return Finding(Level.ok, name, "one host, one clock")
    return Finding(Level.ok, name, f"at most {max(map(abs, apart_s)):.2f} s apart")


def _folders(subject: Subject) -> Finding:
    """Whether this rank can write where it must."""
    name = "folders"
    try:
        needed = [Path(tempfile.gettempdir())]
    except OSError as error:
        return Finding(Level.fail, name, str(error), "set TMPDIR to a folder for temporary files")
    if not _is_folder(subject.config.model):
        needed.append(Path(HF_HUB_CACHE))
    unwritable = [str(folder) for folder in needed if not _can_write(folder)]
    if unwritable:
        remedy = "give this user the right to write there; TMPDIR and HF_HOME name other folders"
        return Finding(Level.fail, name, f"{', '.join(unwritable)} cannot be written", remedy)
    cache = memo.cache_folder()
    if not _can_write(cache):
        remedy = "let this user write there, or every start measures anew"
        return Finding(Level.warn, name, f"{cache} cannot be written", remedy)
    return Finding(Level.ok, name, f"{', '.join(map(str, [*needed, cache]))} can be written")


def _is_folder(model: str) -> bool:
    """Whether the model is a folder here; if not, it will be fetched."""
    try:
        return Path(model).expanduser().is_dir()
    except (OSError, RuntimeError):
        return False


def _shared_memory() -> Finding:
    name = "shared memory"
    if sys.platform != "linux":
        return Finding(Level.ok, name, "in files: this system has no /dev/shm")
    if not _can_write(_SHARED_MEMORY):
        remedy = "mount a tmpfs there that this user can write"
        return Finding(Level.fail, name, f"{_SHARED_MEMORY} cannot be written", remedy)
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    found = f"{_SHARED_MEMORY} has {free_bytes / 1e6:,.0f} MB free"
    if free_bytes < _LEAST_SHARED_BYTES:
        remedy = "remove what is left there, or start the container with --shm-size=1g"
        return Finding(Level.warn, name, found, remedy)
    return Finding(Level.ok, name, found)


def _open_files() -> Finding:
    name = "open files"
    # A server raises the soft limit itself.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding(Level.ok, name, "no limit")
    if hard < _LEAST_FILES:
        remedy = f"raise the limit (ulimit -Hn {_LEAST_FILES}), or serve fewer --max-connections"
        return Finding(Level.warn, name, f"at most {hard:,}", remedy)
    return Finding(Level.ok, name, f"up to {hard:,}")


def _can_write(folder: Path) -> bool:
    """Whether a file can be made in `folder`, or where it would have to be made itself."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False
