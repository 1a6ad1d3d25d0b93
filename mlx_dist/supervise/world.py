"""One run of the ranks, as a child: started, listened to, asked to end, killed.

Knows mpirun's process and the first rank's line; decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_dist.cluster import jobs, launch
from mlx_dist.cluster.supervised import VARIABLE
from mlx_dist.errors import LaunchError
from mlx_dist.supervise import bound

_MOST_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """How ranks are started: `mlx-dist ARGUMENTS` on `num_ranks` of them over a hostfile's hosts.

    `job` is this run's id, by which all of its processes are found.
    """

    job: str
    num_ranks: int
    hostfile: Path | None
    arguments: Sequence[str]

    def command(self, environ: Mapping[str, str]) -> list[str]:
        """The command line; one rank needs no mpirun. Raises ConfigError or WorldError."""
        python = ["-m", "mlx_dist", *self.arguments]
        # One rank of several hosts that is left needs none, either.
        if self.num_ranks == 1:
            return [sys.executable, *launch.job_option(environ), *python]
        return launch.mpirun_command(self.num_ranks, self.hostfile, python, environ)


@dataclass(frozen=True, slots=True)
class Ears:
    """What is called with what a world says: a word and the rest of its line; that the first rank
    is no more; that mpirun has ended, with its code."""

    said: Callable[[str, str], None]
    lost: Callable[[], None]
    exited: Callable[[int], None]


class World:
    """The ranks of one start. Belongs to the event loop that it was started on."""

    def __init__(self, process: asyncio.subprocess.Process, line: asyncio.Server) -> None:
        self._process = process
        self._line = line
        self._writers: list[asyncio.StreamWriter] = []
        self._waiting: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, recipe: Recipe, folder: Path, ears: Ears) -> World:
        """Start the ranks; `folder` is this user's alone. Raises MlxDistError if that fails."""
        path = folder / f"{recipe.job[-8:]}.line"
        writers: list[asyncio.StreamWriter] = []

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with suppress(OSError, ValueError):
                while line := await reader.readline():
                    word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
                    ears.said(word, rest)
            ears.lost()

        environ = os.environ | dict.fromkeys(jobs.VARIABLES, recipe.job) | {VARIABLE: str(path)}
        command = recipe.command(environ)
        line = await asyncio.start_unix_server(listen, path, limit=_MOST_LINE_BYTES)
        bound_to_this = [sys.executable, "-IS", str(bound.__file__), str(os.getpid())]
        try:
            process = await asyncio.create_subprocess_exec(
                *bound_to_this,
                *command,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the supervisor, who then drains.
                start_new_session=True,
            )
        except OSError as error:
            line.close()
            raise LaunchError(f"{command[0]} does not start: {error.strerror}") from None
        world = cls(process, line)
        world._writers = writers
        world._waiting = asyncio.create_task(world._wait(ears))
        return world

    async def _wait(self, ears: Ears) -> None:
        code = await self._process.wait()
        ears.exited(code)

    def drain(self) -> None:
        """Ask the ranks to end in order; mpirun hands this signal on, and no other."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Hear no more of it. A first rank that still runs ends by that."""
        self._line.close()
        for writer in self._writers:
            writer.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
