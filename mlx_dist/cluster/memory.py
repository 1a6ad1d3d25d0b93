"""Memory of this machine, in bytes: what there is, what is left, what this process has used.

On Linux a container's limit counts as the machine's, wherever between the process's own control
group and the root it is set, in version 1 and 2 of control groups. On macOS memory is shared with
the GPU, for which Metal recommends a share. Knows nothing of ranks' shards.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dist.cluster.commands import output_of

_MEMINFO = Path("/proc/meminfo")
_PROC_SELF = Path("/proc/self")
# Version 1 says "no limit" with the largest multiple of a page.
_UNLIMITED_BYTES = 1 << 60


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes() -> int:
    """The memory that MLX's device has: the machine's, the container's or the graphics card's."""
    device = mx.device_info()
    if sys.platform == "darwin":
        return parse_memsize(output_of("sysctl", "hw.memsize")) or int(device["memory_size"])
    if _is_gpu():
        return int(device.get("total_memory", 0))
    return min([_meminfo_bytes("MemTotal"), *(group.limit_bytes for group in _own_groups())])


def available_bytes() -> int:
    """What can be allocated on this machine without swapping, by all of its processes together.

    On macOS the lesser of what Metal recommends, less what MLX has allocated here, and of what
    neither programs nor the kernel hold. On Linux the least that the kernel, the container's
    limits and, if MLX computes there, the graphics card leave.
    """
    if sys.platform == "darwin":
        recommended = int(mx.device_info()["max_recommended_working_set_size"])
        left = max(0, recommended - mx.get_active_memory())
        used = parse_vm_stat(output_of("vm_stat"))
        return left if used is None else max(0, min(left, total_bytes() - used))
    if _is_gpu():
        device = mx.device_info()
        return int(device.get("free_memory", device.get("total_memory", 0)))
    return max(
        0, min([_meminfo_bytes("MemAvailable"), *(group.left_bytes for group in _own_groups())])
    )


def usable_bytes(ranks_here: int, limit_bytes: int | None = None) -> int:
    """What one of `ranks_here` ranks may allocate, its weights included: an equal part of what is
    available now, and never more than `limit_bytes`.
    """
    mine = available_bytes() // ranks_here
    return mine if limit_bytes is None else min(mine, limit_bytes)


def parse_memsize(text: str) -> int:
    """Bytes in what macOS's `sysctl hw.memsize` prints, or 0."""
    found = re.search(r"^hw\.memsize: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def parse_vm_stat(text: str) -> int | None:
    """Bytes in use by what macOS's `vm_stat` prints, as its Activity Monitor counts them, or None.

    Those of programs, wired and compressed ones; pages of files can be had back.
    """
    size = re.search(r"page size of (\d+) bytes", text)
    pages = {name: int(count) for name, count in re.findall(r"^(.+?):\s+(\d+)\.", text, re.M)}
    try:
        used = pages["Anonymous pages"] - pages["Pages purgeable"]
        used += pages["Pages wired down"] + pages["Pages occupied by compressor"]
    except KeyError:
        return None
    return used * int(size[1]) if size else None


@dataclass(frozen=True, slots=True)
class Group:
    """A control group with a limit. Its pages of files count as used and can be had back."""

    limit_bytes: int
    used_bytes: int
    files_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.limit_bytes - max(0, self.used_bytes - self.files_bytes)


def limited_groups(cgroup: str, mountinfo: str) -> list[Group]:
    """The control groups that limit a process's memory, by its /proc/PID/cgroup and mountinfo."""
    paths = {}
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    found = []
    for kind, root, mount in _cgroup_mounts(mountinfo):
        if kind in paths:
            groups = map(_READERS[kind], _up_to_root(paths[kind], root, mount))
            found += [group for group in groups if group is not None]
    return found


def _own_groups() -> list[Group]:
    try:
        return limited_groups(
            (_PROC_SELF / "cgroup").read_text(), (_PROC_SELF / "mountinfo").read_text()
        )
    except (OSError, ValueError):
        return []


def _cgroup_mounts(mountinfo: str) -> Iterator[tuple[str, str, Path]]:
    """Kind, root within its hierarchy and mount point of those that may limit memory."""
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        filesystem, _, options = kind.split(" ", 2)
        if filesystem == "cgroup2" or (filesystem == "cgroup" and "memory" in options.split(",")):
            _, _, _, root, point, *_ = mount.split()
            yield filesystem, root, Path(point)


def _up_to_root(path: str, root: str, mount: Path) -> Iterator[Path]:
    """The folders of a process's group and of all that it is in, as far as they are mounted.

    Without a namespace of its own a container sees the host's path of its group but only the
    group itself, mounted as if it were the root.
    """
    below = path.removeprefix(root) if root != "/" else path
    folder = mount / below.lstrip("/")
    if ".." in folder.parts or not folder.is_dir():
        folder = mount
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _group_v2(folder: Path) -> Group | None:
    return _group(folder, "memory.max", "memory.current", ("inactive_file", "active_file"))


def _group_v1(folder: Path) -> Group | None:
    return _group(
        folder,
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    )


_READERS = {"cgroup2": _group_v2, "cgroup": _group_v1}


def _group(folder: Path, limit: str, used: str, files: tuple[str, ...]) -> Group | None:
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files_bytes = sum(int(stat.get(name, 0)) for name in files)
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return None
    return Group(limit_bytes, used_bytes, files_bytes) if limit_bytes < _UNLIMITED_BYTES else None


def _meminfo_bytes(field: str) -> int:
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def _is_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)
