"""Watchmen on the hosts of ranks that are joining, whom nobody else watches over.

MPI comes up when the last rank has started, however long that takes: until then ranks cannot tell
a slow one from one that is frozen or cut off. The watchmen can, and each ends the ranks of its
host when it is cut off from here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Sequence
from contextlib import suppress

from mlx_dist.cluster import jobs
from mlx_dist.cluster.remote import reading_stdin, source_of, words_for
from mlx_dist.cluster.vigil import Lease

_TICK_S = 0.25
# The first to notice is this side, who starts the ranks again.
_LEASE_S = 1.5


class Lookout:
    """Watches over `job` on `hosts` from now until `close`, on the event loop that runs now.

    A host of which nothing good is heard for `timeout_s` is told of by `lost`.
    """

    def __init__(
        self, job: str, hosts: Sequence[str], timeout_s: float, lost: Callable[[str], None]
    ) -> None:
        self._job = job
        self._timeout_s = timeout_s
        self._lost = lost
        self._watching = [asyncio.create_task(self._watch(host)) for host in hosts]

    async def close(self) -> None:
        """Watch no longer."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    async def _watch(self, host: str) -> None:
        call = f"watch({self._job!r}, {_TICK_S}, {self._timeout_s + _LEASE_S})"
        text = f"{source_of(jobs)}\n{call}\n"
        process = await asyncio.create_subprocess_exec(
            *words_for(host, reading_stdin(len(text))),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text.encode())
        sight = _Sight(self._timeout_s)
        hearing = asyncio.create_task(sight.hear(process.stdout))
        try:
            while not sight.is_lost(time.monotonic()):
                if process.returncode is None:
                    process.stdin.write(b"\n")
                await asyncio.sleep(_TICK_S)
            self._lost(f"while ranks join, {host} {sight.trouble} for {self._timeout_s:g} s")
        finally:
            hearing.cancel()
            # This sends the watchman home, whatever is between here and there.
            process.stdin.close()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class _Sight:
    """What is seen of one host by its watchman."""

    def __init__(self, timeout_s: float) -> None:
        self.trouble = "is silent"
        self._lease = Lease(timeout_s - _TICK_S, _TICK_S, time.monotonic())

    async def hear(self, watchman: asyncio.StreamReader) -> None:
        while line := await watchman.readline():
            word, _, command = line.decode(errors="replace").strip().partition(" ")
            if word == jobs.WELL:
                self._lease.renew()
                self.trouble = "is silent"
            elif word == jobs.STOPPED:
                self.trouble = f"has a process that is stopped ({command})"

    def is_lost(self, now_s: float) -> bool:
        self._lease.look(now_s)
        return self._lease.silence_s() is not None
