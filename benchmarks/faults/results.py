"""What trials showed, beside what was promised; as lines of a file and as a table. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.faults.asks import Outcome
from benchmarks.faults.deck import RANKS, Case, Fault, Phase

NOTICED_S, READY_S, GONE_S = 1.0, 5.0, 10.0
_SIGNALS = {Fault.kill: 9, Fault.segv: 11}
_FAILURES = (Outcome.lost, Outcome.error, Outcome.twice, Outcome.wrong, Outcome.hung)
_UNSAFE = (Outcome.twice, Outcome.wrong, Outcome.hung)
_RIGHT = (Outcome.right, Outcome.tie)


@dataclass(frozen=True, slots=True)
class Result:
    """One trial. Seconds count from the fault, but for `load_s`, which an undisturbed start takes.

    `noticed_by` is the line or the event; `counts` are requests by outcome; `left` are processes of
    the ranks that were hit after `GONE_S`, and of anything that long after the end. `hung` says
    what did not come to an end.
    """

    case: Case
    timeout_s: float
    load_s: float
    noticed_s: float | None = None
    noticed_by: str = ""
    ready_s: float | None = None
    num_restarts: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    left: list[str] = field(default_factory=list)
    code: int | None = None
    hung: str = ""

    @property
    def due_code(self) -> int:
        """The exit code that operations.md gives: a drained supervisor's, or a killed one's."""
        return 128 + _SIGNALS[self.case.fault] if self.case.ends_supervisor else 0

    def of(self, *outcomes: Outcome) -> int:
        """How many requests had one of these outcomes."""
        return sum(self.counts.get(outcome.value, 0) for outcome in outcomes)

    def unmet(self) -> list[str]:
        """The promises that this trial broke, in words."""
        # The connections of a supervisor that is killed are its own.
        failures = _UNSAFE if self.case.ends_supervisor else _FAILURES
        broken = [self.hung] if self.hung else []
        broken += [f"{n} {outcome.value}" for outcome in failures if (n := self.of(outcome))]
        broken += [f"{len(self.left)} processes left"] if self.left else []
        if self.code != self.due_code:
            broken.append(f"exit code {self.code} instead of {self.due_code}")
        return broken + self._late()

    def _late(self) -> list[str]:
        case, within_s = self.case, NOTICED_S
        if case.is_silent and case.target not in ("mpirun", "prted"):
            within_s += self.timeout_s
        if self.noticed_s is None:
            return [] if case.is_harmless or self.hung else ["never noticed"]
        if case.is_harmless and not self.num_restarts:
            return []
        late = []
        if self.noticed_s > within_s:
            late.append(f"noticed after {self.noticed_s:.1f} s, not {within_s:g} s")
        if not case.ends_supervisor and self.ready_s is not None:
            again_s = self.ready_s - self.noticed_s
            if again_s > self.load_s + READY_S:
                late.append(f"ready {again_s:.1f} s after that, not {self.load_s + READY_S:.1f} s")
        return late

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Result:
        said: dict[str, Any] = json.loads(line)
        case = said.pop("case")
        fault, phase = Fault(case.pop("fault")), Phase(case.pop("phase"))
        return cls(case=Case(fault=fault, phase=phase, **case), **said)


def line(result: Result) -> str:
    """One trial, for who watches."""
    told = [f"{count} {outcome}" for outcome, count in sorted(result.counts.items()) if count]
    said = f"{result.case}: noticed {_s(result.noticed_s)} ({result.noticed_by[:70]}), "
    said += f"ready {_s(result.ready_s)}; {', '.join(told)}; code {result.code}"
    return f"{said}; {'; '.join(result.unmet()) or 'as promised'}"


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each fault and kind of target."""
    head = (
        "| fault | of | trials | noticed after, median / worst | ready again after, median / worst "
        "| answers right | broken off with the supervisor | lost, wrong, twice or an error "
        "| processes left | trials not as promised |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    rows = [_row(group) for group in _groups(results)]
    return "\n".join([head, *rows])


def summary(results: Sequence[Result]) -> str:
    """All trials beside the bars, a line each."""
    kept = [result for result in results if not result.case.ends_supervisor]
    killed = [r for r in results if not r.case.is_harmless and not r.case.is_silent]
    silent = [r for r in results if not r.case.is_harmless and r.case.is_silent]
    timeouts = sorted({f"{result.timeout_s:g}" for result in results})
    late = [r.ready_s - r.noticed_s - r.load_s for r in kept if r.ready_s and r.noticed_s]
    rows = [
        ("trials", f"{len(results)}", ""),
        ("answers compared", _sum(results, *_RIGHT, *_UNSAFE), ""),
        ("of these another one, by a near tie of tokens", _sum(results, Outcome.tie), ""),
        ("hangs", f"{sum(bool(r.hung) or r.of(Outcome.hung) > 0 for r in results)}", "0"),
        ("requests lost or answered with an error", _sum(kept, Outcome.lost, Outcome.error), "0"),
        ("answered twice", _sum(results, Outcome.twice), "0"),
        ("wrong", _sum(results, Outcome.wrong), "0"),
        ("processes left", f"{sum(len(r.left) for r in results)}", "0"),
        ("exit codes not as documented", f"{sum(r.code != r.due_code for r in results)}", "0"),
        ("ended process noticed after, at worst", _worst(r.noticed_s for r in killed), "1 s"),
        (
            "frozen or cut-off one noticed after, at worst",
            _worst(r.noticed_s for r in silent),
            f"{' or '.join(timeouts)} s + 1 s",
        ),
        ("ready after it was noticed, beyond a start's time, at worst", _worst(late), "5 s"),
    ]
    lines = [f"| {what} | {measured} | {bar} |" for what, measured, bar in rows]
    return "\n".join(["| all trials | measured | aimed at |", "|---|---:|---:|", *lines])


def not_reached(results: Sequence[Result]) -> str:
    """Each trial that broke a promise, in words."""
    said = [f"- {result.case}: {'; '.join(result.unmet())}" for result in results if result.unmet()]
    return "\n".join(said) or "Every trial was as promised."


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[tuple[int, str], list[Result]] = {}
    for result in results:
        number = list(Fault).index(result.case.fault)
        groups.setdefault((number, _kind(result.case.target)), []).append(result)
    return [groups[key] for key in sorted(groups)]


def _kind(target: str) -> str:
    if target in RANKS:
        return "first rank" if target == RANKS[0] else "other rank"
    return target


def _row(group: Sequence[Result]) -> str:
    case = group[0].case
    ended = [result for result in group if case.ends_supervisor]
    bad = 0 if ended else sum(result.of(*_FAILURES) for result in group)
    cells = [
        case.fault.value,
        _kind(case.target),
        str(len(group)),
        _times(result.noticed_s for result in group),
        _times(result.ready_s for result in group),
        _sum(group, *_RIGHT),
        str(sum(result.of(Outcome.lost, Outcome.error) for result in ended)) if ended else "",
        str(bad + sum(result.of(*_UNSAFE) for result in ended)),
        str(sum(len(result.left) for result in group)),
        str(sum(bool(result.unmet()) for result in group)),
    ]
    return f"| {' | '.join(cells)} |"


def _times(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.2f} / {max(known):.2f} s" if known else "not at all"


def _worst(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _s(max(known, default=None))


def _sum(results: Sequence[Result], *outcomes: Outcome) -> str:
    return str(sum(result.of(*outcomes) for result in results))


def _s(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f} s"
