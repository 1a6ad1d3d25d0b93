"""Memory of this machine, in bytes: what this process has used and what is left for it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import mlx.core as mx

_CGROUP = Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """What can be allocated on this machine without swapping, by all of its processes together.

    On macOS, what Metal recommends less what MLX has allocated here; on Linux, the least that the
    kernel and the container's limit leave.
    """
    if sys.platform == "darwin":
        recommended = int(mx.device_info()["max_recommended_working_set_size"])
        return max(0, recommended - mx.get_active_memory())
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))
