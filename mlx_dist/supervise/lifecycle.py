"""What a supervisor does next: started, serving, drained or failed, and again. Pure.

Times are told by the caller, in seconds of any one clock; what must be done is answered as orders.
Knows no processes, no hosts and no requests but whether there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """How the ranks are."""

    waiting = "waiting"
    """There are none; they are started at the deadline."""
    starting = "starting"
    serving = "serving"
    draining = "draining"
    """Nothing is left to answer, and they were asked to end in order."""
    ending = "ending"
    """They are to go, by force if they must."""
    sweeping = "sweeping"
    """They are gone; what may be left of them is looked for."""
    over = "over"


class Order(StrEnum):
    """What is to be done about the ranks."""

    start = "start"
    drain = "drain"
    terminate = "terminate"
    kill = "kill"
    sweep = "sweep"
    finish = "finish"


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, and how often is too often.

    `meets_s` is how long mpirun may take until the first rank is heard of; `ends_s` how long ranks
    may take to end in order, `falls_s` to be gone after the first has, `goes_s` after they were
    told to. Ranks that served for `stable_s` have shown that they can. Of starts that end sooner,
    the wait before the next doubles up to `longest_wait_s`, and after `most_failures` in a row
    there is no next.
    """

    drain_s: float = 30.0
    meets_s: float = 60.0
    ends_s: float = 15.0
    falls_s: float = 1.0
    goes_s: float = 2.0
    stable_s: float = 60.0
    longest_wait_s: float = 30.0
    most_failures: int = 5


class Lifecycle:
    """The states of one supervised server. Every method answers what is to be done, in order.

    `has_requests` tells whether anything that was taken is not answered yet. `reason` is why the
    ranks last failed. Once over, `code` is the exit code: 0 if all that was taken is answered.
    """

    def __init__(self, limits: Limits, has_requests: Callable[[], bool]) -> None:
        self.phase = Phase.waiting
        self.is_draining = False
        self.is_given_up = False
        self.has_served = False
        self.reason = ""
        self.code = 0
        self._limits = limits
        self._has_requests = has_requests
        self._deadline_s: float | None = 0.0
        self._drained_by_s = 0.0
        self._ready_at_s: float | None = None
        self._num_failures = 0
        self._is_stopping = self._is_renewing = False
        self._is_clean = self._is_refused = self._is_killed = False

    def wait_s(self, now_s: float) -> float | None:
        """How long until `tick` has something to do if nothing happens; None if for ever."""
        times = [] if self._deadline_s is None else [self._deadline_s]
        if self.is_draining and not self._is_stopping:
            times.append(self._drained_by_s)
        return max(0.0, min(times) - now_s) if times and self.phase is not Phase.over else None

    def said_up(self) -> list[Order]:
        """The first rank runs. Loading a model may take any time."""
        if self.phase is Phase.starting:
            self._deadline_s = None
        return []

    def said_ready(self, now_s: float) -> list[Order]:
        """The ranks serve."""
        if self.phase is Phase.starting:
            self._enter(Phase.serving, None)
            self.has_served, self._ready_at_s = True, now_s
        return self.tick(now_s)

    def said_drained(self, now_s: float) -> list[Order]:
        """The ranks have answered everything and end in order, asked by us or somebody else."""
        if self.phase in (Phase.serving, Phase.draining):
            self.is_draining = self.is_draining or not self._is_renewing
            self._is_clean = True
            self._drained_by_s = now_s + self._limits.drain_s
            self._enter(Phase.draining, now_s + self._limits.ends_s)
        return []

    def said_failed(self, reason: str, now_s: float) -> list[Order]:
        """The ranks end by an error that a user can put right."""
        self._is_refused = True
        return self._fall(reason, now_s + self._limits.goes_s)

    def failed(self, reason: str, now_s: float) -> list[Order]:
        """The first rank is no more. The others, and mpirun, mostly go by themselves."""
        return self._fall(reason, now_s + self._limits.falls_s)

    def lost_sight(self, reason: str, now_s: float) -> list[Order]:
        """A host or a rank is silent, and the ranks, which have not met, will not notice soon."""
        if self.phase is not Phase.starting:
            return []
        self.reason = reason
        self._is_killed = True
        self._enter(Phase.ending, now_s + self._limits.goes_s)
        return [Order.kill]

    def exited(self, code: int, now_s: float) -> list[Order]:
        """mpirun, or the only rank, has ended. Its code says little."""
        match self.phase:
            case Phase.draining if self._is_clean:
                if self._is_renewing and not self.is_draining:
                    return self._start(now_s)
            case Phase.starting | Phase.serving | Phase.draining:
                self.reason = f"the ranks ended with code {code}"
            case Phase.ending:
                pass
            case _:
                return []
        return self._sweep()

    def swept(self, is_short_of_hosts: bool, now_s: float) -> list[Order]:
        """Nothing is left of the ranks, as far as hosts answer."""
        if self.phase is not Phase.sweeping:
            return []
        if self._is_stopping or (self._is_clean and self.is_draining):
            return self._finish()
        if self.is_draining and not self._has_requests():
            return self._finish()
        if self._is_refused and not (self.has_served or is_short_of_hosts):
            # A start that was refused the first time will be the next time.
            return self._give_up()
        served_s = now_s - self._ready_at_s if self._ready_at_s is not None else 0.0
        self._num_failures = 1 if served_s >= self._limits.stable_s else self._num_failures + 1
        # One may wait for a host that is away, but not for an error to go.
        if self._num_failures > self._limits.most_failures and not is_short_of_hosts:
            return self._give_up()
        wait_s = self._wait_s()
        if wait_s == 0:
            return self._start(now_s)
        self._enter(Phase.waiting, now_s + wait_s)
        return []

    def renew(self, now_s: float) -> list[Order]:
        """Start the ranks anew, on other hosts, as soon as there is nothing to answer."""
        if self.phase is Phase.serving:
            self._is_renewing = True
        return self.tick(now_s)

    def ask_to_end(self, now_s: float) -> list[Order]:
        """Answer what was taken, then end; asked once more, end at once."""
        if self.is_draining:
            return self._stop(now_s)
        self.is_draining = True
        self._drained_by_s = now_s + self._limits.drain_s
        return self.tick(now_s)

    def tick(self, now_s: float) -> list[Order]:
        """What is due at this time, or now that there may be no more requests."""
        if self.is_draining and not self._is_stopping:
            if now_s >= self._drained_by_s:
                return self._stop(now_s)
            is_idle_start = self.phase in (Phase.starting, Phase.waiting)
            if is_idle_start and not self._has_requests():
                return self._stop(now_s)
        wants_drain = self.is_draining or self._is_renewing
        if self.phase is Phase.serving and wants_drain and not self._has_requests():
            self._enter(Phase.draining, now_s + self._limits.ends_s)
            return [Order.drain]
        if self._deadline_s is None or now_s < self._deadline_s:
            return []
        return self._at_deadline(now_s)

    def _at_deadline(self, now_s: float) -> list[Order]:
        match self.phase:
            case Phase.waiting:
                return self._start(now_s)
            case Phase.starting:
                self.reason = f"mpirun has started no rank in {self._limits.meets_s:g} s"
            case Phase.draining:
                self.reason = f"the ranks did not end in {self._limits.ends_s:g} s"
            case Phase.ending:
                return self._not_gone(now_s)
            case _:
                return []
        return self._end_now(now_s)

    def _wait_s(self) -> float:
        doubled = 2.0 ** (self._num_failures - 2)
        return 0.0 if self._num_failures <= 1 else min(doubled, self._limits.longest_wait_s)

    def _start(self, now_s: float) -> list[Order]:
        self._is_clean = self._is_refused = self._is_renewing = False
        self._ready_at_s = None
        self._enter(Phase.starting, now_s + self._limits.meets_s)
        return [Order.start]

    def _stop(self, now_s: float) -> list[Order]:
        self._is_stopping = True
        self.code = 1 if self._has_requests() else 0
        match self.phase:
            case Phase.waiting:
                return self._finish()
            case Phase.starting | Phase.serving | Phase.draining | Phase.ending:
                return self._end_now(now_s)
            case _:
                return []

    def _fall(self, reason: str, deadline_s: float) -> list[Order]:
        """Ranks that end on their own account are gone by the deadline, or killed."""
        is_up = self.phase in (Phase.starting, Phase.serving)
        if is_up or (self.phase is Phase.draining and not self._is_clean):
            self.reason = reason
            self._is_killed = False
            self._enter(Phase.ending, deadline_s)
        return []

    def _end_now(self, now_s: float) -> list[Order]:
        self._is_killed = False
        self._enter(Phase.ending, now_s + self._limits.goes_s)
        return [Order.terminate]

    def _not_gone(self, now_s: float) -> list[Order]:
        if self._is_killed:
            return self._sweep()
        self._is_killed = True
        self._deadline_s = now_s + self._limits.goes_s
        return [Order.kill]

    def _sweep(self) -> list[Order]:
        self._enter(Phase.sweeping, None)
        return [Order.sweep]

    def _give_up(self) -> list[Order]:
        self.code, self.is_given_up = 1, True
        return self._finish()

    def _finish(self) -> list[Order]:
        self._enter(Phase.over, None)
        return [Order.finish]

    def _enter(self, phase: Phase, deadline_s: float | None) -> None:
        self.phase, self._deadline_s = phase, deadline_s
