"""What this rank's main thread is doing, written down by it and read by the thread that watches.

Knows no other rank and no threads: a single assignment tells the reader all of it at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlx_dist.cluster.vigil import Pace
from mlx_dist.messages import Beat, State


@dataclass(frozen=True, slots=True)
class _Activity:
    state: State
    since_s: float
    count: int = 0
    size: int = 0
    doing: str = ""


class Pulse:
    """One rank's account of what it does. All but `beat` belong to the main thread."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._pace = Pace(timeout_s)
        self._activity = _Activity(State.starting, time.monotonic())

    @property
    def is_working(self) -> bool:
        """Whether a plan is being executed."""
        return self._activity.state is State.computing

    def loading(self, done_bytes: int) -> None:
        """So much of the weights has been read."""
        self._activity = _Activity(State.loading, time.monotonic(), done_bytes)

    def loaded(self) -> None:
        """What follows has no measure of progress, until the first plan."""
        self._activity = _Activity(State.starting, time.monotonic())

    def working(self, doing: str, size: int) -> None:
        """Work on `size` tokens begins, or what costs no more than a few."""
        before = self._activity
        self._activity = _Activity(State.computing, time.monotonic(), before.count + 1, size, doing)

    def idle(self) -> None:
        """The work is done, and nothing is due from this rank."""
        before, now_s = self._activity, time.monotonic()
        self._end(before, now_s)
        self._activity = _Activity(State.idle, now_s, before.count)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for other ranks; the work, if there is any, goes on behind it."""
        before, now_s = self._activity, time.monotonic()
        self._end(before, now_s)
        size, doing = before.size, before.doing
        self._activity = _Activity(State.waiting, now_s, before.count, size, doing)
        try:
            yield
        finally:
            # A wait outside of work may end because somebody called: that is no progress.
            count = before.count + (before.state is State.computing)
            self._activity = _Activity(before.state, time.monotonic(), count, size, doing)

    def beat(self) -> Beat:
        """What is going on just now."""
        activity = self._activity
        if activity.state is State.loading:
            doing, patience_s = f"byte {activity.count}", self._pace.loading_s()
        else:
            doing, patience_s = activity.doing, self._pace.patience_s(activity.size)
        return Beat(
            state=activity.state,
            count=activity.count,
            for_s=time.monotonic() - activity.since_s,
            patience_s=patience_s,
            doing=doing,
        )

    def _end(self, activity: _Activity, now_s: float) -> None:
        if activity.state is State.computing:
            self._pace.took(activity.size, now_s - activity.since_s)
