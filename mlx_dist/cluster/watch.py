"""A thread of every rank that tells the others how it is, and ends it when they are gone.

Knows beats, clocks and parents; what they mean is decided in `vigil.py`. Beats travel on an MPI
communicator of their own, so that no other message holds them up. Without MPI each rank sees only
itself and its parent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from mlx_dist.cluster.control import Control, Waiter, deadline
from mlx_dist.cluster.ending import Ending
from mlx_dist.cluster.mpi import MpiWire
from mlx_dist.cluster.pulse import Pulse
from mlx_dist.cluster.vigil import Lease, Vigil
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Beat, State, expect

_LEADER = 0
_BEAT_S = 0.5
_LEAST_BEATS = 8  # in a timeout
_LEAVING_S = 30.0


class Watch:
    """Beats from `start` to `stop`, and judges what it hears. `hosts` are those of all ranks.

    `wire` is for beats alone, and None without MPI.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], pulse: Pulse, ending: Ending, wire: MpiWire | None
    ) -> None:
        self._rank, self._hosts = rank, hosts
        self._pulse, self._ending, self._wire = pulse, ending, wire
        self._beat_s = min(_BEAT_S, pulse.timeout_s / _LEAST_BEATS)
        now_s = time.monotonic()
        self._vigil = Vigil(hosts, pulse.timeout_s, self._beat_s, now_s)
        self._lease = Lease(pulse.timeout_s, self._beat_s, now_s)
        self._beats = None if wire is None else Control(wire, rank)
        self._parent = os.getppid()
        self._stopped = threading.Event()
        self._left = {rank}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Every rank must start at about the same time."""
        self._thread.start()

    def stop(self) -> None:
        """Every rank must stop at about the same time: none is missed by another."""
        self._stopped.set()
        self._thread.join()
        if self._beats is None or self._wire is None:
            return
        with deadline(_LEAVING_S):
            others = set(range(len(self._hosts))) - {self._rank}
            if self._rank == _LEADER:
                self._see_off(self._beats, others)
                self._tell(self._beats, others, Beat(State.leaving))
            else:
                self._tell(self._beats, {_LEADER}, Beat(State.leaving))
                self._see_off(self._beats, {_LEADER})
            self._wire.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._beat_s):
            if os.getppid() != self._parent:
                self._leave("the process that started it has died")
            beat = self._pulse.beat()
            if self._beats is None:
                self._look_at_self(beat)
            elif self._rank == _LEADER:
                self._judge(self._beats, beat)
            else:
                self._look_for_leader(self._beats, beat)

    def _judge(self, beats: Control, own: Beat) -> None:
        self._vigil.look(time.monotonic())
        self._vigil.hear(_LEADER, own)
        others = range(1, len(self._hosts))
        for rank in others:
            for beat in self._heard(beats, rank):
                self._vigil.hear(rank, beat)
        self._tell(beats, set(others), own)
        if verdict := self._vigil.verdict():
            self._ending.abort(f"mlx-dist: error: {verdict}")

    def _look_for_leader(self, beats: Control, own: Beat) -> None:
        self._lease.look(time.monotonic())
        if self._heard(beats, _LEADER):
            self._lease.renew()
        self._tell(beats, {_LEADER}, own)
        if silent_s := self._lease.silence_s():
            host = self._hosts[_LEADER]
            self._leave(f"nothing was heard of rank {_LEADER} ({host}) for {silent_s:.1f} s")

    def _look_at_self(self, own: Beat) -> None:
        """All that can be done alone: what waits may wait for the work of every other rank."""
        if own.state is State.waiting:
            patience_s = own.patience_s * len(self._hosts)
        elif own.state in (State.computing, State.loading):
            patience_s = own.patience_s
        else:
            return
        if own.for_s > patience_s:
            self._leave(f"it is stuck: {own.state} ({own.doing}) for {own.for_s:.1f} s")

    def _leave(self, why: str) -> NoReturn:
        where = f"rank {self._rank} ({self._hosts[self._rank]})"
        self._ending.leave(f"mlx-dist: error: {where} ends: {why}")

    def _heard(self, beats: Control, rank: int) -> list[Beat]:
        heard = []
        while (message := beats.poll(rank)) is not None:
            heard.append(expect(message, Beat))
            if heard[-1].state is State.leaving:
                self._left.add(rank)
        return heard

    def _tell(self, beats: Control, ranks: set[int], beat: Beat) -> None:
        for rank in ranks - (set() if beat.state is State.leaving else self._left):
            beats.send(beat, rank)

    def _see_off(self, beats: Control, ranks: set[int]) -> None:
        """Hear `ranks` to their end."""
        for _ in Waiter():
            for rank in ranks:
                self._heard(beats, rank)
            if ranks <= self._left:
                return
        raise ProtocolError("a waiter never ends")
