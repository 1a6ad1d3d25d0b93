"""Doing the fault of a case to a server, and undoing what passes."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults import hook
from benchmarks.faults.deck import HOSTS, RANKS, SUPERVISOR, Case, Fault, Phase
from benchmarks.faults.processes import Process, processes_on
from benchmarks.faults.site import Server, Site

_SIGNALS = {
    Fault.kill: signal.SIGKILL,
    Fault.segv: signal.SIGSEGV,
    Fault.stop: signal.SIGSTOP,
}
_PASSES_S = {Fault.heal: 5.0, Fault.slow: 10.0, Fault.stop: 5.0}
_THERE_S = 60.0


@dataclass(slots=True)
class Strike:
    """A fault that is about to happen or has: `at_s` is when, by the monotonic clock.

    `old` are the processes of the ranks and of what started them at that time, `hit` those of them
    that the fault was done to.
    """

    case: Case
    at_s: float | None = None
    old: list[Process] = field(default_factory=list)
    hit: list[Process] = field(default_factory=list)
    passes_s: float | None = None
    _marker: Path | None = None

    def look(self) -> bool:
        """Whether it has happened."""
        if self.at_s is None and self._marker is not None and self._marker.exists():
            self.at_s = float(self._marker.read_text())
        return self.at_s is not None

    def order(self, site: Site) -> None:
        """Make the rank fail that meets the next plan, or loads next; before that, nothing."""
        host = HOSTS[RANKS.index(self.case.target)]
        where = "load" if self.case.phase is Phase.load else "plan"
        self._marker = hook.order(site.folder, host, where, self.case.fault.value)

    def strike(self, site: Site, server: Server) -> None:
        """Do it now, once there is something to do it to; returns when it is done or ordered."""
        case = self.case
        victim = None
        if case.fault in _SIGNALS:
            victim = server.find(case.target, _THERE_S)
            if victim is None:
                raise RuntimeError(f"there is no {case.target}")
        self.old = [one for one in server.processes() if _is_of_ranks(one)]
        if case.fault in (Fault.raise_, Fault.exit):
            self.hit = [one for one in self.old if one.role == case.target]
            if self._marker is None:
                self.order(site)
            return
        at_s = time.monotonic()
        if victim is not None:
            self.hit = [victim]
            victim.send(_SIGNALS[case.fault])
        elif case.fault is Fault.slow:
            site.slow()
        else:
            site.cut(case.target)
            if case.fault is Fault.host:
                self.hit = _end_all(site, case.target)
        if case.is_passing:
            self.passes_s = at_s + _PASSES_S[case.fault]
        self.at_s = at_s

    def let_pass(self, site: Site) -> None:
        """Undo what passes, once it is time."""
        if self.passes_s is not None and time.monotonic() >= self.passes_s:
            self.passes_s = None
            self.undo(site)

    def undo(self, site: Site) -> None:
        """Links are up; a frozen supervisor goes on."""
        site.mend()
        if self.case.target == SUPERVISOR:
            for one in self.hit:
                one.send(signal.SIGCONT)

    def ended(self) -> Process | None:
        """A process of the ranks that has ended without having been hit."""
        others = [one for one in self.old if one not in self.hit]
        return next((one for one in others if not one.is_alive), None)

    def left(self) -> list[Process]:
        """What still runs of the ranks that there were."""
        return [one for one in self.old if one.is_alive]


def _is_of_ranks(process: Process) -> bool:
    return process.role in (*RANKS, "mpirun", "prted")


def _end_all(site: Site, host: str) -> list[Process]:
    found = [one for one in processes_on(dict(site.namespaces)) if one.host == host]
    for one in found:
        one.send(signal.SIGKILL)
    return found
