"""The program that every rank runs. Read this first.

The leader asks its scheduler for a plan, sends it down the pipe, and runs its own stage; every
other rank takes plans as they come. `Rank.execute` is what all of them do with one.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_dist.cluster.memory import peak_rss_bytes
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.engine.kv import KvRoom
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Event, FinishReason, Request
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import (
    Close,
    Drop,
    Keep,
    Logprobs,
    Merge,
    Open,
    Plan,
    Probe,
    Report,
    Shutdown,
    Step,
    Tokens,
    Vitals,
)
from mlx_dist.model.grammar import Grammars
from mlx_dist.model.sampling import Samplers
from mlx_dist.model.stage import Stage


class Rank:
    """One rank at work: its stage, its end of the pipe, and on the last one the samplers."""

    def __init__(
        self,
        stage: Stage,
        transport: Transport,
        samplers: Samplers,
        grammars: Grammars,
        kv_room: KvRoom,
        weights_bytes: int,
        load_s: float,
        slice_: Slice = WHOLE,
    ) -> None:
        self.stage = stage
        self.slice = slice_
        self.transport = transport
        self.grammars = grammars
        self.kv_room = kv_room
        self.weights_bytes = weights_bytes
        self.load_s = load_s
        self.busy_s = 0.0
        # Of each recorded step: what each layer put out and, on the last stage, the logits.
        self.recordings: list[list[NDArray[np.float32]]] = []
        self._samplers = samplers

    def follow(self) -> None:
        """Execute the plans that come, `Shutdown` last: the program of all but the leader."""
        for plan in self.transport.plans():
            self.execute(plan)

    def report(self, rank: int, host: str) -> Report:
        """This rank's account of itself."""
        return Report(
            rank=rank,
            host=host,
            layers=(self.stage.start, self.stage.end),
            weights_bytes=self.weights_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            load_s=self.load_s,
            kv_cost=self.kv_room.cost,
            kv_budget_bytes=self.kv_room.budget_bytes,
            busy_s=self.busy_s,
            sent_bytes=self.transport.sent_bytes,
            slice=(self.slice.place, list(self.slice.weights)),
        )

    def execute(self, plan: Plan) -> None:
        """Do this rank's part of `plan`."""
        slots = self.stage.slots
        num_rows, num_tokens = plan.shape if isinstance(plan, Step) else (0, 0)
        doing = f"{type(plan).__name__} of {num_rows} x {num_tokens} tokens"
        self.transport.pulse.working(doing, num_rows * num_tokens)
        try:
            match plan:
                case Step():
                    slots.check(plan, self.stage.vocab_size)
                    self._step(plan)
                case Open(microbatch, openings):
                    kept = [None if o.entry is None else (o.entry, o.num_cached) for o in openings]
                    slots.open(microbatch, [o.slot for o in openings], kept)
                    if self.transport.answers:
                        self._samplers.open(openings)
                case Merge(source, target):
                    slots.merge(source, target)
                case Close(closed):
                    slots.close(closed)
                    self._samplers.close(closed)
                case Keep(slot, entry):
                    slots.keep(slot, entry)
                case Drop(entries):
                    slots.drop(entries)
                case Probe():
                    self._probe()
                case Shutdown():
                    pass
        except BaseException as error:
            error.add_note(f"while it ran {plan}"[:200])
            raise
        self.transport.pulse.idle()

    def _step(self, step: Step) -> None:
        start, waited_s = time.perf_counter(), self.transport.waited_s
        hidden_BLD, vitals = None, []
        if not self.stage.is_first:
            hidden_BLD = self.transport.promise_hidden(
                self.stage.hidden_shape(*step.shape), self.stage.hidden_dtype_in
            )
        # Built while the previous rank still computes.
        output = self._forward(step, hidden_BLD)
        if hidden_BLD is not None:
            vitals = self.transport.await_hidden(hidden_BLD)
        states = self.stage.slots.states(step.microbatch)
        tokens: list[int] = []
        logprobs: list[Logprobs | None] = []
        if not self.stage.is_last:
            mx.eval(output, states)
        elif not step.sample:
            # Logits that nobody samples from are never computed.
            self._observe(step)
            mx.eval(states)
        else:
            tokens, logprobs = self._sample(step, output)
            mx.eval(states)
        step_s = time.perf_counter() - start - (self.transport.waited_s - waited_s)
        self.busy_s += step_s
        vitals = [*vitals, self._vitals(step_s)]
        if not self.stage.is_last:
            self.transport.send_hidden(output, vitals)
        elif self.transport.answers:
            self.transport.send_tokens(Tokens(step.microbatch, tokens, logprobs, vitals))

    def _forward(self, step: Step, hidden_BLD: mx.array | None) -> mx.array:
        """Hidden (B, L, D) or, from the last stage, logits (B, L, V). Nothing is computed yet."""
        if not step.record:
            return self.stage.forward(step, hidden_BLD)
        output, layers = self.stage.forward_recorded(step, hidden_BLD)
        recorded = [*layers, output] if self.stage.is_last else layers
        self.recordings.append([np.array(array.astype(mx.float32)) for array in recorded])
        return output

    def _observe(self, step: Step) -> None:
        if self.transport.answers:
            self._samplers.observe(step.rows)

    def _sample(self, step: Step, logits_BLV: mx.array) -> tuple[list[int], list[Logprobs | None]]:
        assert step.shape[1] == 1 or len(step.rows) == 1
        self._observe(step)
        logits_BV = logits_BLV[:, -1]
        if not self.transport.answers:
            # The others of a group take part in the sums, and one samples.
            mx.eval(logits_BV)
            return [], []
        return self._samplers.sample(step.rows, logits_BV)

    def _probe(self) -> None:
        before = self.transport.vitals_before(self.stage.is_first)
        vitals = [*before, self._vitals(0.0), *self.transport.vitals_behind()]
        if self.transport.answers:
            self.transport.send_tokens(Tokens(-1, [], [], vitals))
        else:
            self.transport.send_vitals(vitals)

    def _vitals(self, step_s: float) -> Vitals:
        slots = self.stage.slots
        return Vitals(step_s, slots.num_slots, slots.kv_bytes)


class Spare:
    """A rank that the placement leaves out: it holds nothing, and waits for the others' end."""

    def __init__(self) -> None:
        self.recordings: list[list[NDArray[np.float32]]] = []

    def follow(self) -> None:
        """No plan comes here."""

    def report(self, rank: int, host: str) -> Report:
        """This rank's account of itself: no layers."""
        return Report(rank, host, (0, 0), 0, peak_rss_bytes(), 0.0)


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
                self._accept(self._transport.poll_tokens())
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
        """Take down what ranks say of themselves: all, or the first of each group for the group."""
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
