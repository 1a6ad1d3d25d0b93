"""Plans, hidden states and tokens between the ranks of a pipeline.

Knows who is next and what a step's arrays look like; knows no model. Every array is announced by
a `Hidden` message right ahead of it, so that a receiver can sleep until the array is on its way
and can tell a wrong one from the right one.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dist.cluster.control import Waiter
from mlx_dist.cluster.world import World
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Hidden, Plan, Probe, Shutdown, Tokens, Vitals, expect


class Transport:
    """One rank's ends of the pipe.

    `pipe` are the ranks that hold stages, in the order of the stages, the leader first. It closes
    to a circle: tokens go from the last rank to the leader.
    """

    def __init__(self, world: World, pipe: Sequence[int]) -> None:
        place = pipe.index(world.rank)
        self._is_last = place == len(pipe) - 1
        self._previous = pipe[place - 1]
        self._next = pipe[(place + 1) % len(pipe)]
        self._world = world
        self._with_checksum = os.environ.get("MLX_DIST_DEBUG") == "1"
        self.waited_s = 0.0
        self.sent_bytes = 0

    def pass_plan(self, plan: Plan) -> None:
        """Send `plan` down the pipe, ahead of the work it asks for."""
        if not self._is_last:
            self._world.control.send(plan, self._next)

    def plans(self) -> Iterator[Plan]:
        """What every rank but the leader must do next, `Shutdown` last; each is passed on first."""
        is_idle = False
        while True:
            plan = self._world.control.receive(self._previous, is_idle)
            # Ranks are probed when there is nothing else to do.
            is_idle = isinstance(plan, Probe)
            if not isinstance(plan, Plan):
                raise ProtocolError(f"{type(plan).__name__} arrived where a plan was due")
            self.pass_plan(plan)
            yield plan
            if isinstance(plan, Shutdown):
                return

    def send_hidden(self, hidden_BLD: mx.array, vitals: list[Vitals]) -> None:
        """Send computed activations to the next rank; returns before they have arrived."""
        checksum = _checksum(hidden_BLD) if self._with_checksum else None
        dtype = _dtype_name(hidden_BLD.dtype)
        self._world.control.send(
            Hidden(list(hidden_BLD.shape), dtype, checksum, vitals), self._next
        )
        sent = mx.distributed.send(
            hidden_BLD,
            self._next,
            group=self._world.group,
            stream=self._world.streams.send,
        )
        mx.async_eval(sent)  # type: ignore[no-untyped-call]
        self.sent_bytes += hidden_BLD.nbytes

    def promise_hidden(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """The activations that the previous rank will send, to build on before they come."""
        return mx.distributed.recv(
            shape,
            dtype,
            self._previous,
            group=self._world.group,
            stream=self._world.streams.receive,
        )

    def await_hidden(self, promised_BLD: mx.array) -> list[Vitals]:
        """Wait until promised activations are here; answer the vitals of the ranks before.

        Raises ProtocolError unless what was announced and what came is what was promised.
        """
        start = time.perf_counter()
        hidden = expect(self._world.control.receive(self._previous), Hidden)
        due = promised_BLD.shape, _dtype_name(promised_BLD.dtype)
        if (tuple(hidden.shape), hidden.dtype) != due:
            raise ProtocolError(
                f"activations {tuple(hidden.shape)} {hidden.dtype} were announced where "
                f"{due[0]} {due[1]} were due"
            )
        # Computed now: Metal ends a command buffer that waits for a network.
        mx.eval(promised_BLD)
        self.waited_s += time.perf_counter() - start
        if hidden.checksum is not None and hidden.checksum != _checksum(promised_BLD):
            raise ProtocolError(f"activations {due[0]} arrived damaged")
        return hidden.vitals

    def send_vitals(self, vitals: list[Vitals]) -> None:
        """Pass on a probe's findings to the next rank."""
        self._world.control.send(Hidden([], "", None, vitals), self._next)

    def receive_vitals(self) -> list[Vitals]:
        """What a probe has found on the ranks before."""
        return expect(self._world.control.receive(self._previous), Hidden).vitals

    def send_tokens(self, tokens: Tokens) -> None:
        """Answer the leader, from the last stage."""
        self._world.control.send(tokens, self._next)

    def poll_tokens(self) -> Tokens | None:
        """The last stage's next answer, on the leader, if it has come and one can look."""
        control = self._world.control
        answer = control.poll(self._previous) if control.can_poll else None
        return None if answer is None else expect(answer, Tokens)

    def receive_tokens(self, is_called: Callable[[], bool] = lambda: False) -> Tokens | None:
        """The last stage's next answer, on the leader, or None once it `is_called` away.

        Where one cannot look for an answer, this waits for it whatever calls.
        """
        if not self._world.control.can_poll:
            return expect(self._world.control.receive(self._previous), Tokens)
        for _ in Waiter():
            if (tokens := self.poll_tokens()) is not None:
                return tokens
            if is_called():
                return None
        raise AssertionError("a waiter never ends")


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _checksum(array: mx.array) -> int:
    return zlib.crc32(np.array(mx.contiguous(array).view(mx.uint8)).tobytes())
