"""How a rank ends when it cannot end in order. Knows signals and MPI's abort; knows no judgement.

mpirun ends ranks by SIGTERM, and by SIGKILL 250 ms later or, if sooner, when one of them has ended.
A handler does not run in a rank whose main thread is in native code, so SIGTERM is held back in
every thread and a thread waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from mlx_dist.cluster import mpi
from mlx_dist.cluster.control import ABORT_CODE

if TYPE_CHECKING:
    from mlx_dist.cluster.mpi import MpiWire

# How long a rank stays after SIGTERM: less than mpirun's 250 ms, enough for the first one's words.
LAST_WORDS_S = 0.2
# Else mpirun's words about the end come first, or through the middle of what was said.
_SAY_FIRST_S = 0.1
# Where the network is cut, MPI_Abort may not return, and mpirun waits for ever for the other side.
_ABORT_S = 3.0
# Outlives this rank, which mpirun kills. mpirun's children are ssh, too, which would wait for a
# host that is cut off as long as mpirun.
_AFTER_ABORT = """
children=$(pgrep -P "$0")
for _ in $(seq 20); do
    kill -0 "$0" || break
    sleep 0.1
done
kill -9 "$0" $children
"""
_GUARD = """
import os, select, signal, sys
deadline_s, pid, line, *bury = sys.argv[1:]
if not select.select([0], [], [], float(deadline_s))[0]:
    os.write(2, line.encode() + b"\\n")
    os.kill(int(pid), signal.SIGKILL)
    if bury:
        # mpirun waits until nobody has what it reads.
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.execvp("sh", ["sh", "-c", *bury])
"""


def hold_back_sigterm() -> None:
    """Keep SIGTERM from this rank's threads, so that `Ending.watch` gets it.

    To be called before BLAS, MLX and MPI start threads: what these do not block ends the process.
    """
    if mpi.world_size() > 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


class Ending:
    """The end of this rank, and over MPI of all ranks. Any thread may bring it about."""

    def __init__(self, wire: MpiWire | None) -> None:
        self._wire = wire
        self._parent = os.getppid()
        self._words: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def before(self, say: Callable[[], None]) -> None:
        """Call `say` once before the process ends otherwise than in order, in LAST_WORDS_S."""
        self._words.append(say)

    def watch(self) -> None:
        """From now on SIGTERM, where it is held back, ends this rank after its last words."""
        if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            threading.Thread(target=self._await_sigterm, name="sigterm", daemon=True).start()

    def abort(self, line: str) -> NoReturn:
        """Print `line`, say the last words and end every rank of the job at once.

        Without MPI this one, which its launcher notices.
        """
        start_s = time.monotonic()
        print(line, file=sys.stderr, flush=True)
        self._say_last_words()
        time.sleep(max(0.0, _SAY_FIRST_S - (time.monotonic() - start_s)))
        if self._wire is not None:
            self._bury_mpirun()
            aborting = threading.Thread(target=self._wire.abort, daemon=True)
            aborting.start()
            aborting.join(_ABORT_S)
        os._exit(ABORT_CODE)

    def leave(self, line: str) -> NoReturn:
        """Print `line` and end this rank, which knows of no other that hears it."""
        print(line, file=sys.stderr, flush=True)
        if self._wire is not None:
            self._bury_mpirun()
        os._exit(ABORT_CODE)

    def _await_sigterm(self) -> None:
        signal.sigwait({signal.SIGTERM})
        start_s = time.monotonic()
        self._say_last_words()
        # Whoever went first would take the others' time: mpirun kills them then.
        time.sleep(max(0.0, LAST_WORDS_S - (time.monotonic() - start_s)))
        # As if it had never been held back.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)

    def _bury_mpirun(self) -> None:
        """See that mpirun, or its daemon on this host, is gone soon: with it go all it reaches.

        Where the network is cut they wait for the other side for ever.
        """
        if os.getppid() != self._parent:
            return
        command = ["sh", "-c", _AFTER_ABORT, str(self._parent)]
        none = subprocess.DEVNULL
        subprocess.Popen(command, stdin=none, stdout=none, stderr=none, start_new_session=True)

    def _say_last_words(self) -> None:
        # A second thread that ends the process waits for the first one's words.
        with self._lock:
            while self._words:
                self._words.pop()()


@contextmanager
def bounded(what: str, deadline_s: float) -> Iterator[None]:
    """End this process, saying that `what` takes too long, unless the block is left in time.

    By a process that watches: native code that holds Python's lock keeps a thread from it.
    """
    line = (
        f"mlx-dist: error: {what} within {deadline_s:g} s; see that all ranks run and that their "
        "hosts reach each other"
    )
    command = [sys.executable, "-IS", "-c", _GUARD, str(deadline_s), str(os.getpid()), line]
    if mpi.world_size() > 1:
        command += [_AFTER_ABORT, str(os.getppid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.stdin is not None
        with guard.stdin:
            yield
