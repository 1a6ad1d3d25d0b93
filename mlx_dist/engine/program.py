"""The program that every rank runs. Read this first.

The leader asks its scheduler for a plan, sends it down the pipe, and runs its own stage; every
other rank takes plans as they come. `Rank.execute` is what all of them do with one.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_dist.engine.scheduler import Request, Scheduler
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import Close, Open, Plan, Shutdown, Step, Tokens
from mlx_dist.model.sampling import SlotSampler
from mlx_dist.model.stage import Stage


class Rank:
    """One rank at work: its stage, its end of the pipe, and on the last one the samplers."""

    def __init__(
        self, stage: Stage, transport: Transport, weights_bytes: int, load_s: float
    ) -> None:
        self.stage = stage
        self.transport = transport
        self.weights_bytes = weights_bytes
        self.load_s = load_s
        self.busy_s = 0.0
        # Of each recorded step: what each layer put out and, on the last stage, the logits.
        self.recordings: list[list[NDArray[np.float32]]] = []
        self._samplers: dict[int, SlotSampler] = {}

    def follow(self) -> None:
        """Execute the plans that come, `Shutdown` last: the program of all but the leader."""
        for plan in self.transport.plans():
            self.execute(plan)

    def execute(self, plan: Plan) -> None:
        """Do this rank's part of `plan`."""
        try:
            match plan:
                case Open():
                    self.stage.slots.open(plan.slot)
                    if self.stage.is_last:
                        sampler = SlotSampler(plan.sampling, self.stage.vocab_size)
                        self._samplers[plan.slot] = sampler
                case Step():
                    self._step(plan)
                case Close():
                    self.stage.slots.close(plan.slot)
                    self._samplers.pop(plan.slot, None)
                case Shutdown():
                    pass
        except BaseException as error:
            error.add_note(f"while it ran {plan}"[:200])
            raise

    def _step(self, step: Step) -> None:
        start, waited_s = time.perf_counter(), self.transport.waited_s
        hidden_BLD = None
        if not self.stage.is_first:
            hidden_BLD = self.transport.promise_hidden(
                self.stage.hidden_shape(*step.shape), self.stage.hidden_dtype_in
            )
        # Built while the previous rank still computes.
        output = self._forward(step, hidden_BLD)
        if hidden_BLD is not None:
            self.transport.await_hidden(hidden_BLD)
        if not self.stage.is_last:
            mx.eval(output)
            self.transport.send_hidden(output)
        elif step.sample:
            tokens_B = mx.stack(self._sample(step, output))
            self.transport.send_tokens(Tokens(step.microbatch, np.array(tokens_B).tolist()))
        else:
            # Logits that nobody samples from are never computed.
            mx.eval([self.stage.slots.states(row.slot) for row in step.rows])
        waited_s = self.transport.waited_s - waited_s
        self.busy_s += time.perf_counter() - start - waited_s

    def _forward(self, step: Step, hidden_BLD: mx.array | None) -> mx.array:
        """Every row through the stage: hidden (B, L, D) or, from the last stage, logits (B, L, V).

        Rows run one after another, for their caches are apart. Nothing is computed yet.
        """
        outputs = []
        for i, row in enumerate(step.rows):
            tokens_1L = mx.array([row.tokens], mx.int32)
            hidden_1LD = None if hidden_BLD is None else hidden_BLD[i : i + 1]
            if step.record:
                output, layers = self.stage.forward_recorded(row.slot, tokens_1L, hidden_1LD)
                self._record([*layers, output] if self.stage.is_last else layers)
            else:
                output = self.stage.forward(row.slot, tokens_1L, hidden_1LD)
            if self.stage.is_last:
                self._samplers[row.slot].observe(row.tokens)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _sample(self, step: Step, logits_BLV: mx.array) -> list[mx.array]:
        return [
            self._samplers[row.slot].sample(logits_BLV[i, -1], row.position + len(row.tokens))
            for i, row in enumerate(step.rows)
        ]

    def _record(self, arrays: list[mx.array]) -> None:
        self.recordings.append([np.array(array.astype(mx.float32)) for array in arrays])


class Leader:
    """Rank 0: decides, and does its own part like everyone else."""

    def __init__(self, rank: Rank, prefill_chunk: int) -> None:
        self._rank = rank
        self._transport = rank.transport
        self._scheduler = Scheduler(prefill_chunk)
        # Hears of (prompt tokens sent into the pipe, prompt tokens in all).
        self.on_prefill: Callable[[int, int], None] = lambda _done, _total: None

    @property
    def finish_reason(self) -> str | None:
        """Why the last request ended: "stop" or "length"."""
        return self._scheduler.finish_reason

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of `request`, each as soon as it is known."""
        self._scheduler.submit(request)
        while self._scheduler.is_active:
            plan = self._scheduler.next_plan()
            if plan is None:
                yield from self._scheduler.accept(self._transport.receive_tokens())
            else:
                self._transport.pass_plan(plan)
                self._rank.execute(plan)
                if isinstance(plan, Step) and not plan.sample:
                    [row] = plan.rows
                    self.on_prefill(row.position + len(row.tokens), len(request.prompt))

    def stop(self) -> None:
        """End the request that is streaming: its text is complete."""
        self._scheduler.finish("stop")

    def shutdown(self) -> None:
        """Tell every rank that no more plans follow."""
        self._transport.pass_plan(Shutdown())
