"""The control plane: numbered frames between ranks. Knows frames; knows no plans and no model.

What carries them is a `Wire`: MPI where there is one (`cluster.mpi`), else the fabric itself
(`cluster.fabric`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from mlx_dist.cluster.pulse import Pulse
from mlx_dist.messages import AnyMessage, Message, decode, encode

ABORT_CODE = 86
# How long the ranks wait for each other at the start.
MEETING_S = 30.0


class Wire(Protocol):
    """Carries bytes between ranks, in order for each pair."""

    def send(self, frame: bytes, destination: int) -> None:
        """Send `frame`; may return before it has arrived."""

    def receive(self, source: int, is_idle: bool = False) -> bytes:
        """The next frame from `source`; waits without burning a core where the carrier can.

        With `is_idle` none is expected soon.
        """

    can_poll: bool

    def poll(self, source: int) -> bytes | None:
        """The next frame from `source` if it has come. Only with `can_poll`."""

    def all_gather(self, frame: bytes, deadline_s: float | None) -> list[bytes]:
        """Every rank's frame, in rank order, on every rank.

        Raises WorldError naming the missing ranks if `deadline_s` passes first.
        """


class Control:
    """Numbers the frames of each pair of ranks, so that none is lost or taken for another.

    Where work waits for a message, `pulse` is told.
    """

    def __init__(self, wire: Wire, rank: int, pulse: Pulse | None = None) -> None:
        self.can_poll = wire.can_poll
        self._wire = wire
        self._rank = rank
        self._pulse = pulse
        self._sent: defaultdict[int, int] = defaultdict(int)
        self._received: defaultdict[int, int] = defaultdict(int)
        self._gathered = 0
        self._trace = os.environ.get("MLX_DIST_TRACE") == "1"

    def send(self, message: Message, destination: int) -> None:
        """Send `message` to rank `destination`."""
        self._wire.send(encode(message, self._sent[destination]), destination)
        self._say(f"{self._sent[destination]} -> r{destination}", message)
        self._sent[destination] += 1

    def receive(self, source: int, is_idle: bool = False) -> AnyMessage:
        """The next message from rank `source`, soon or, with `is_idle`, perhaps not.

        Raises ProtocolError if what comes is not that.
        """
        is_within = self._pulse is not None and self._pulse.is_working
        with self._pulse.waiting() if self._pulse and is_within else nullcontext():
            frame = self._wire.receive(source, is_idle)
        return self._decode(frame, source)

    def poll(self, source: int) -> AnyMessage | None:
        """The next message from rank `source` if it has come. Only with `can_poll`."""
        frame = self._wire.poll(source)
        return None if frame is None else self._decode(frame, source)

    def all_gather(self, message: Message, deadline_s: float | None = None) -> list[AnyMessage]:
        """Every rank's message, in rank order, on every rank."""
        frames = self._wire.all_gather(encode(message, self._gathered), deadline_s)
        messages = [decode(frame, self._gathered) for frame in frames]
        self._say(f"{self._gathered} -> all", message)
        self._gathered += 1
        return messages

    def _decode(self, frame: bytes, source: int) -> AnyMessage:
        message = decode(frame, self._received[source])
        self._say(f"{self._received[source]} <- r{source}", message)
        self._received[source] += 1
        return message

    def _say(self, route: str, message: Message) -> None:
        if self._trace:
            print(f"r{self._rank} frame {route} {message}", file=sys.stderr, flush=True)


class LoneWire:
    """The control plane of a world of one, which has nobody to send to."""

    can_poll = True

    def send(self, frame: bytes, destination: int) -> None:
        raise AssertionError("a world of one sends nothing")

    def receive(self, source: int, is_idle: bool = False) -> bytes:
        raise AssertionError("a world of one waits for nobody")

    def poll(self, source: int) -> bytes | None:
        return None

    def all_gather(self, frame: bytes, deadline_s: float | None) -> list[bytes]:
        return [frame]


class Waiter:
    """Waits for something to come without burning a core that another rank computes on.

    Spins for a moment, then sleeps: briefly while a request runs, longer once nothing has come
    for a second or if it `is_idle` from the start.
    """

    SPIN_S = 50e-6
    BUSY_SLEEP_S = 20e-6
    IDLE_AFTER_S = 1.0
    IDLE_SLEEP_S = 4e-3

    def __init__(self, is_idle: bool = False) -> None:
        self._idle_after_s = 0.0 if is_idle else self.IDLE_AFTER_S

    def __iter__(self) -> Iterator[float]:
        """Yields the seconds waited so far, before each look."""
        start = time.monotonic()
        while True:
            waited_s = time.monotonic() - start
            yield waited_s
            if waited_s < self.SPIN_S:
                time.sleep(0)
            else:
                is_idle = waited_s > self._idle_after_s
                time.sleep(self.IDLE_SLEEP_S if is_idle else self.BUSY_SLEEP_S)


@contextmanager
def deadline(deadline_s: float | None) -> Iterator[None]:
    """End the process, saying why, if the block takes longer than `deadline_s`."""

    def give_up() -> None:
        print(
            f"mlx-dist: error: not every rank answered within {deadline_s:.0f} s; "
            "see that all of them run and reach each other",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ABORT_CODE)

    if deadline_s is None:
        yield
        return
    timer = threading.Timer(deadline_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
