"""The first rank's line to its supervisor: what it says of itself, in words and not exit codes.

The line is a unix socket whose path is in the environment. Its end is the supervisor's: then this
process ends, and with it the job. Knows nothing of what the supervisor does with the words.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

from mlx_dist.cluster import launch
from mlx_dist.errors import LaunchError, MlxDistError

# True on this host only, and never handed on: see `launch.LOCAL_VARIABLES`.
VARIABLE = "MLX_DIST_SUPERVISOR"
_ORPHANED_CODE = 86


class Word(StrEnum):
    """What the first rank says; the rest of the line is told about each."""

    up = "up"
    """It runs, and so do the others: mpirun starts all or none."""
    met = "met"
    """It has met the others: from now on ranks notice which of them is silent."""
    ready = "ready"
    """PORT SECRET NAME: it serves the model NAME on that port of this machine."""
    drained = "drained"
    """It was asked to end, and everything that it had taken is answered."""
    failed = "failed"
    """REASON: an error that a user can put right."""


class Line:
    """The line of this process, or one that goes nowhere where nobody supervises."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    @property
    def is_supervised(self) -> bool:
        return self._connection is not None

    @contextmanager
    def telling_failures(self) -> Iterator[None]:
        """Tell the supervisor of an error that ends what is done here."""
        try:
            yield
        except MlxDistError as error:
            self.say(Word.failed, str(error))
            raise

    def say(self, word: Word, *rest: str | int) -> None:
        """Tell the supervisor. One that is gone ends this process, elsewhere."""
        if self._connection is not None:
            line = " ".join([word.value, *map(str, rest)]).replace("\n", " ")
            with suppress(OSError):
                self._connection.sendall(line.encode(errors="replace") + b"\n")


def line_to_supervisor() -> Line:
    """The line of the first rank under a supervisor; on every other process one to nobody.

    Raises LaunchError if there should be a supervisor and it does not answer.
    """
    path = os.environ.get(VARIABLE)
    if not path or not launch.is_first_rank():
        return Line(None)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        raise LaunchError(
            f"{VARIABLE}={path}, and no supervisor answers there: {error.strerror}; unset it to "
            "start without one"
        ) from None
    # Plain blocking reads in a daemon thread: it must notice whatever the main thread is in.
    threading.Thread(target=_end_with, args=(connection,), name="supervisor", daemon=True).start()
    line = Line(connection)
    line.say(Word.up)
    return line


def _end_with(connection: socket.socket) -> None:
    """End this process when the supervisor has gone. mpirun then ends the other ranks."""
    with suppress(OSError):
        while connection.recv(1024):
            pass
    print("mlx-dist: the supervisor is gone; ending", file=sys.stderr, flush=True)
    os._exit(_ORPHANED_CODE)
