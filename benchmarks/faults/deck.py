"""Which faults, against what, when: drawn by chance, the same for a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What happens. `heal`, `slow` and a frozen supervisor pass by themselves."""

    kill = "kill"
    """SIGKILL."""
    segv = "segv"
    """SIGSEGV."""
    stop = "stop"
    """SIGSTOP: the process is there, and does nothing."""
    raise_ = "raise"
    """An exception in the thread that computes."""
    exit = "exit"
    """The process ends by `_exit`, with code 7."""
    host = "host"
    """All processes of a host end and its link is cut, at once."""
    cut = "partition"
    """A host's link is cut; what runs there runs on."""
    heal = "heal"
    """A host's link is cut for 5 s."""
    slow = "slow"
    """Every frame takes 20 ms more, and every host sends 20 Mbit/s at most, for 10 s."""


class Phase(StrEnum):
    """What the ranks are doing at that moment."""

    load = "load"
    prefill = "prefill"
    decode = "decode"
    idle = "idle"


RANKS = ("rank 0", "rank 1", "rank 2")
HOSTS = ("mxh1", "mxh2", "mxh3")
MPIRUN, PRTED, SUPERVISOR, LINKS = "mpirun", "prted", "supervisor", "all links"
IN_THE_LAB = frozenset({Fault.host, Fault.cut, Fault.heal, Fault.slow}) | {
    # They need a module that is another one on the rank's host only.
    Fault.raise_,
    Fault.exit,
}
_TARGETS: dict[Fault, tuple[str, ...]] = {
    Fault.kill: (*RANKS, MPIRUN, PRTED, SUPERVISOR),
    Fault.segv: (*RANKS, MPIRUN, PRTED, SUPERVISOR),
    Fault.stop: (*RANKS, MPIRUN, PRTED, SUPERVISOR),
    Fault.raise_: RANKS,
    Fault.exit: RANKS,
    # The first has the supervisor and the clients.
    Fault.host: HOSTS[1:],
    Fault.cut: HOSTS,
    Fault.heal: HOSTS,
    Fault.slow: (LINKS,),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One fault. `late` is how late it comes in its phase, from 0 to 1."""

    fault: Fault
    target: str
    phase: Phase
    late: float

    @property
    def is_passing(self) -> bool:
        """Whether it ends by itself, so that nothing need be noticed."""
        is_frozen_supervisor = self.fault is Fault.stop and self.target == SUPERVISOR
        return self.fault in (Fault.heal, Fault.slow) or is_frozen_supervisor

    @property
    def is_harmless(self) -> bool:
        """Whether the ranks can go on as if nothing had happened."""
        is_launcher = self.target in (MPIRUN, PRTED)
        return self.is_passing or (self.fault is Fault.stop and is_launcher)

    @property
    def ends_supervisor(self) -> bool:
        """Whether the clients' connections and the server go with it."""
        return self.target == SUPERVISOR and self.fault in (Fault.kill, Fault.segv)

    @property
    def is_silent(self) -> bool:
        """Whether only a rank's silence tells of it."""
        return self.fault in (Fault.stop, Fault.host, Fault.cut, Fault.heal)

    def __str__(self) -> str:
        return f"{self.fault.value} {self.target} {self.phase.value}"


def targets(fault: Fault, has_lab: bool) -> tuple[str, ...]:
    """What `fault` can hit; nothing where it needs hosts of its own and there are none."""
    if has_lab:
        return _TARGETS[fault]
    return () if fault in IN_THE_LAB else tuple(t for t in _TARGETS[fault] if t != PRTED)


def draw(num: int, seed: int, faults: Sequence[Fault], has_lab: bool) -> list[Case]:
    """`num` cases in which each of `faults` is about as frequent; targets and phases by chance.

    A fault's targets are all met before one comes again, and so are its phases. Raises ValueError
    if none of `faults` is possible.
    """
    chance = random.Random(seed)
    possible = [fault for fault in faults if targets(fault, has_lab)]
    if not possible:
        raise ValueError(f"none of {', '.join(faults)} is possible without hosts")
    decks: dict[object, list[str]] = {}

    def deal(key: object, cards: Sequence[str]) -> str:
        if not decks.get(key):
            decks[key] = chance.sample(list(cards), len(cards))
        return decks[key].pop()

    cases = []
    for _ in range(num):
        fault = Fault(deal("fault", possible))
        target = deal(fault, targets(fault, has_lab))
        phase = Phase(deal((fault, "phase"), list(Phase)))
        cases.append(Case(fault, target, phase, chance.random()))
    return cases
