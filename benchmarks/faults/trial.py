"""One trial: a server from its start to its end, with a fault in between and clients all along."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.asks import Ask, Outcome, Told, could_say
from benchmarks.faults.clients import Clients
from benchmarks.faults.deck import Case, Fault, Phase
from benchmarks.faults.results import GONE_S, Result
from benchmarks.faults.site import Server, Site
from benchmarks.faults.strike import Strike
from benchmarks.reference import Reference

_LOOK_EVERY_S = 0.02
_STARTS_S = 180.0
_ENDS_S = 90.0
_AFTER_S = 2.0
_LOAD_SHARE = 0.6
_PREFILL_S, _DECODE_S, _IDLE_S = 0.4, 1.0, 2.0


class NotUpError(Exception):
    """A server that did not come up undisturbed, with the end of its log."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of every server, by streams, with the right answers. `long` begin a burst.

    `reference` knows what else would have been right.
    """

    streams: Sequence[Sequence[Ask]]
    long: Sequence[Sequence[Ask]]
    due: Mapping[Ask, Told]
    reference: Reference
    request_timeout_s: float = 180.0

    def is_tie(self, ask: Ask, told: Told) -> bool:
        """Whether an answer differs from the right one only as rounding can make it."""
        return could_say(self.reference, ask, told, self.due[ask])


@dataclass(frozen=True, slots=True)
class Terms:
    """How servers are started: `flags` of serve; a start takes `load_s` undisturbed."""

    flags: tuple[str, ...]
    timeout_s: float
    load_s: float


class Log:
    """A file that grows: its lines, each with the time at which it was first seen."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""
        self.lines: list[tuple[float, str]] = []

    def look(self) -> None:
        """Read what has come."""
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        now_s = time.monotonic()
        texts = [line.replace(b"\0", b"").decode(errors="replace").strip() for line in lines]
        self.lines += [(now_s, text) for text in texts if text]

    def first(self, words: str, after_s: float = 0.0) -> float | None:
        """When a line with `words` came, after that time."""
        return next((at_s for at_s, text in self.lines if words in text and at_s >= after_s), None)


class Trial:
    """A case on a site. `run` it once."""

    def __init__(self, site: Site, case: Case, load: Load, terms: Terms, log: Path) -> None:
        self._site, self._case, self._load, self._terms = site, case, load, terms
        self._strike = Strike(case)
        self._address = site.address()
        if case.phase is Phase.load and case.fault in (Fault.raise_, Fault.exit):
            self._strike.order(site)
        self._started_s = time.monotonic()
        self._server: Server = site.serve(self._address, list(terms.flags), log)
        self._log = Log(log)
        streams = load.long if case.phase is Phase.prefill else load.streams
        self._clients = Clients(self._address, streams, load.due, load.request_timeout_s)
        self._noticed: tuple[float, str] | None = None
        self._is_ready_s: float | None = None
        self._left: list[str] | None = None
        self._hung = ""

    def run(self) -> Result:
        try:
            self._until_it_happens()
            self._until_it_is_over()
            time.sleep(_AFTER_S)
            self._clients.stop()
            self._look_at_the_left(is_due=True)
            code = self._end()
            left_at_end = self._gone_after_the_end()
        finally:
            self._clean_up()
        return self._result(code, left_at_end)

    def _until_it_happens(self) -> None:
        case, late = self._case, self._case.late
        if case.phase is Phase.load:
            self._clients.start()
            # The ranks are there; they join, read and measure.
            if self._server.find("rank 0", _STARTS_S) is None:
                raise NotUpError(self._end_of_log())
            time.sleep(late * _LOAD_SHARE * self._terms.load_s)
        else:
            self._await_line("is served at", _STARTS_S)
            if case.phase is Phase.idle:
                time.sleep(_IDLE_S + late)
            else:
                self._clients.start()
            if case.phase is Phase.prefill:
                time.sleep(late * _PREFILL_S)
            elif case.phase is Phase.decode:
                deadline_s = time.monotonic() + _STARTS_S
                while not self._clients.num_speaking and time.monotonic() < deadline_s:
                    time.sleep(0.005)
                time.sleep(late * _DECODE_S)
        self._strike.strike(self._site, self._server)
        if case.phase is Phase.idle:
            # Not before: it must be asked for while nobody knows yet.
            self._clients.start()

    def _until_it_is_over(self) -> None:
        deadline_s = time.monotonic() + _STARTS_S + 3 * self._terms.load_s
        while not self._is_over():
            if time.monotonic() > deadline_s:
                self._hung = "it never served again"
                return
            self._strike.let_pass(self._site)
            self._look_at_the_left(is_due=False)
            time.sleep(_LOOK_EVERY_S)

    def _is_over(self) -> bool:
        self._log.look()
        strike = self._strike
        if not strike.look() or strike.at_s is None:
            return False
        self._notice(strike.at_s)
        if self._case.ends_supervisor:
            return not self._server.processes() or time.monotonic() > strike.at_s + GONE_S
        words = "is served at" if self._case.phase is Phase.load else "serving again"
        self._is_ready_s = self._log.first(words, strike.at_s)
        if self._is_ready_s is None:
            self._is_ready_s = self._log.first("serving again", strike.at_s)
        is_done = strike.passes_s is None
        if self._case.is_harmless and self._case.phase is not Phase.load:
            # Nobody need notice it; if somebody does, it must be served again.
            has_fallen = self._log.first("the ranks failed", strike.at_s) is not None
            quiet_s = time.monotonic() - strike.at_s
            if not has_fallen and quiet_s > 2 * self._terms.timeout_s + GONE_S:
                return is_done
        return is_done and self._is_ready_s is not None

    def _notice(self, at_s: float) -> None:
        """The first line or event that tells of the fault."""
        if self._noticed is not None:
            return
        # What starts says this, whatever happens.
        usual = (
            *("microbatches in flight", "the plan had predicted", "is served at", "KV memory"),
            "plm:ssh: Warning: setpgid",
        )
        for seen_s, text in self._log.lines:
            is_rule = not text.strip("-")
            if seen_s >= at_s and not is_rule and not any(words in text for words in usual):
                self._noticed = seen_s, text
                return
        if (ended := self._strike.ended()) is not None:
            self._noticed = time.monotonic(), f"{ended.role} ended"

    def _look_at_the_left(self, is_due: bool) -> None:
        """What is left of the ranks that were hit, that long after; waits for it if it is due."""
        at_s = self._strike.at_s
        if self._left is not None or at_s is None:
            return
        while is_due and time.monotonic() < at_s + GONE_S and self._strike.left():
            time.sleep(_LOOK_EVERY_S)
        if time.monotonic() < at_s + GONE_S and self._strike.left():
            return
        has_restarted = self._num_restarts() > 0 or self._case.ends_supervisor
        if has_restarted:
            self._left = [str(one) for one in self._strike.left()]
        elif time.monotonic() >= at_s + GONE_S:
            # They serve on.
            self._left = []

    def _end(self) -> int | None:
        """Drain the server by SIGTERM; its exit code."""
        if (supervisor := self._server.find("supervisor")) is not None:
            supervisor.send(signal.SIGTERM)
        try:
            code = self._server.process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            self._hung = self._hung or f"it did not end within {_ENDS_S:g} s of SIGTERM"
            return None
        return code if code >= 0 else 128 - code

    def _gone_after_the_end(self) -> list[str]:
        deadline_s = time.monotonic() + GONE_S
        while (left := self._site.left(self._server.job)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return [str(one) for one in left]

    def _clean_up(self) -> None:
        """Whatever happened, nothing of this trial meets the next one."""
        self._strike.undo(self._site)
        for _ in range(3):
            for one in [*self._server.processes(), *self._site.left(self._server.job)]:
                one.send(signal.SIGKILL)
            time.sleep(0.1)
        if self._server.process.poll() is None:
            self._server.process.kill()
            self._server.process.wait()

    def _result(self, code: int | None, left_at_end: list[str]) -> Result:
        self._log.look()
        tally, at_s = self._clients.tally, self._strike.at_s or 0.0
        tally.excuse(self._load.is_tie)
        return Result(
            case=self._case,
            timeout_s=self._terms.timeout_s,
            load_s=self._terms.load_s,
            noticed_s=max(0.0, self._noticed[0] - at_s) if self._noticed else None,
            noticed_by=self._noticed[1] if self._noticed else "",
            ready_s=self._is_ready_s - at_s if self._is_ready_s is not None else None,
            num_restarts=self._num_restarts(),
            counts={outcome.value: tally.counts[outcome] for outcome in Outcome},
            oddities=tally.oddities,
            longest_s=tally.longest_s,
            left=[*(self._left or ()), *left_at_end],
            code=code,
            hung=self._hung,
        )

    def _num_restarts(self) -> int:
        return sum("the ranks failed" in text for _, text in self._log.lines)

    def _await_line(self, words: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self._log.first(words) is None:
            if time.monotonic() > deadline_s or self._server.process.poll() is not None:
                raise NotUpError(self._end_of_log())
            time.sleep(_LOOK_EVERY_S)
            self._log.look()

    def _end_of_log(self) -> str:
        self._log.look()
        return "\n".join(text for _, text in self._log.lines[-12:])
