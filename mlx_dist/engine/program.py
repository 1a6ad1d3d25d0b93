"""The program that every rank runs. Read this first.

The leader (`leader.py`) asks its scheduler for a plan, sends it down the pipe, and runs its own
stage; every other rank takes plans as they come. `Rank.execute` is what all of them do with one.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_dist.cluster.memory import peak_rss_bytes
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.engine.kv import KvRoom
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
        return Vitals(step_s, slots.num_slots, slots.kv_bytes, slots.digest)


class Spare:
    """A rank that the placement leaves out: it holds nothing, and waits for the others' end."""

    def __init__(self) -> None:
        self.recordings: list[list[NDArray[np.float32]]] = []

    def follow(self) -> None:
        """No plan comes here."""

    def report(self, rank: int, host: str) -> Report:
        """This rank's account of itself: no layers."""
        return Report(rank, host, (0, 0), 0, peak_rss_bytes(), 0.0)
