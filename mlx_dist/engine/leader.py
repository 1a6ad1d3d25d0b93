"""Rank 0's part of the program: it decides what all do next, and tells clients what came of it.

Any thread may ask for something; only the thread that takes turns speaks to other ranks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_dist.engine.program import Rank
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Event, FinishReason, Request
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Plan, Probe, Shutdown, Step, Tokens, Vitals


class Leader:
    """Rank 0: decides, and does its own part like everyone else.

    `submit`, `end` and `drain` may be called from any thread; events are delivered in the thread
    that calls `turn`. A leader `is_broken` that was left in the middle of a plan or an answer.
    """

    # Ranks are asked for an account this often when they are idle, as a sign of life, and where
    # answers have none of every rank.
    PROBE_EVERY_S = 5.0

    def __init__(self, rank: Rank, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.vitals: list[Vitals] = []
        self.busy_s: list[float] = []
        self.is_broken = False
        self.answered_at = time.monotonic()
        self._rank = rank
        self._transport = rank.transport
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._is_probing = False
        self._is_probed = False
        self._probed_at = time.monotonic()
        self._deliver: dict[int, Callable[[Event], None]] = {}

    def submit(self, requests: list[Request], deliver: list[Callable[[Event], None]]) -> list[int]:
        """Queue all of `requests` or none; each one's events go to its `deliver`.

        Raises what `Admission.check` raises.
        """
        with self._lock:
            for request in requests:
                self.scheduler.admission.check(request, len(requests))
            ids = [self.scheduler.submit(request) for request in requests]
            self._deliver.update(zip(ids, deliver, strict=True))
        self._news.set()
        return ids

    def end(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        """End a request with the next plan; nothing happens if it is over."""
        with self._lock:
            self.scheduler.end(request_id, reason)
        self._news.set()

    def drain(self) -> None:
        """Take no more requests."""
        with self._lock:
            self.scheduler.admission.is_draining = True
        self._news.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block during which the scheduler's state holds still."""
        with self._lock:
            yield

    def stream(self, request: Request) -> Iterator[Event]:
        """Serve `request` in this thread: its events as they come, the last one included."""
        events: deque[Event] = deque()
        self.submit([request], [events.append])
        while True:
            while not events:
                self.turn()
            event = events.popleft()
            if event.finish_reason is not None:
                break
            yield event
        while self.scheduler.num_ready:
            self.turn()
        yield event

    def run(self) -> None:
        """Take turns until all is done after `drain`."""
        while self.scheduler.is_active or not self.scheduler.admission.is_draining:
            self.turn()

    def turn(self) -> None:
        """Run the next plan or, if there is none, wait for an answer or for a call."""
        self._news.clear()
        if self.scheduler.num_in_flight or self._is_probing:
            with self._whole():
                # All that have come: a step planned without one of them keeps its streams waiting.
                while (tokens := self._transport.poll_tokens()) is not None:
                    self._accept(tokens)
        if self._is_account_due():
            self._ask_all()
        with self._lock:
            plan = self.scheduler.next_plan()
            events = self.scheduler.take_events()
        self._tell(events)
        if plan is not None:
            self._is_probed = False
            self.do(plan)
        elif self.scheduler.num_in_flight or self._is_probing:
            with self._whole():
                self._accept(self._transport.receive_tokens(self._news.is_set))
        elif not events:
            self._idle()

    def do(self, plan: Plan) -> None:
        """Pass `plan` down the pipe and do the own part."""
        with self._whole():
            self._transport.pass_plan(plan)
            self._rank.execute(plan)

    def ask(self, step: Step) -> Tokens:
        """Run one step while nothing else is under way; its answer."""
        self.do(step)
        tokens = self._transport.receive_tokens()
        assert tokens is not None
        return tokens

    def shutdown(self) -> None:
        """Take the answers that are due, and tell every rank that no more plans follow."""
        while self.scheduler.num_in_flight or self._is_probing:
            self._accept(self._transport.receive_tokens())
        self.do(Shutdown())

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A block after which, if it is left in the middle, the ranks cannot go on."""
        self.is_broken = True
        yield
        self.is_broken = False

    def _idle(self) -> None:
        """Wait for a call, and ask the ranks how they are once and then every few seconds."""
        if self._is_probed and self._news.wait(self.PROBE_EVERY_S):
            return
        if not self._news.is_set():
            self._is_probed = True
            self._ask_all()

    def _is_account_due(self) -> bool:
        """Whether some ranks, of groups, have said nothing of themselves for long."""
        is_due = time.monotonic() - self._probed_at > self.PROBE_EVERY_S
        return is_due and max(self._transport.group_sizes) > 1 and not self._is_probing

    def _ask_all(self) -> None:
        self._is_probing = True
        self._probed_at = time.monotonic()
        self.do(Probe())

    def _accept(self, tokens: Tokens | None) -> None:
        if tokens is None:
            return
        self.answered_at = time.monotonic()
        self._note(tokens.vitals)
        if tokens.microbatch < 0:
            self._is_probing = False
            return
        with self._lock:
            self.scheduler.accept(tokens)
            events = self.scheduler.take_events()
        self._tell(events)

    def _note(self, vitals: list[Vitals]) -> None:
        """Take down what ranks say of themselves: all, or the first of each group for the group.

        Raises ProtocolError unless they hold the same sequences, each as far on.
        """
        if len({v.digest for v in vitals}) > 1:
            held = ", ".join(f"{v.num_slots} slots, {v.kv_bytes} bytes" for v in vitals)
            raise ProtocolError(f"the ranks no longer hold the same sequences: {held}")
        sizes = self._transport.group_sizes
        if len(vitals) == sum(sizes):
            self.vitals = vitals
            steps_s = [v.step_s for v in vitals]
        else:
            steps_s = [v.step_s for v, n in zip(vitals, sizes, strict=True) for _ in range(n)]
        self.busy_s = self.busy_s or [0.0] * len(steps_s)
        self.busy_s = [a + b for a, b in zip(self.busy_s, steps_s, strict=True)]

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            self._deliver[event.request_id](event)
            if event.finish_reason is not None:
                del self._deliver[event.request_id]
