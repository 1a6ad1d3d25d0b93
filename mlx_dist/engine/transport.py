"""Plans, hidden states and tokens between the ranks of a pipeline, or of groups in one.

Knows who is next and what a step's arrays look like; knows no model. Every array is announced by
a `Hidden` message right ahead of it, so that a receiver can sleep until the array is on its way
and can tell a wrong one from the right one.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_dist.cluster.control import Waiter
from mlx_dist.cluster.pulse import Pulse
from mlx_dist.cluster.world import World
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Hidden, Plan, Probe, Shutdown, Tokens, Vitals, expect


class Transport:
    """One rank's ends of the pipe.

    `stages` are the ranks of each stage, the leader first: one, or those of a tensor group, of
    which the first speaks for the others. The pipe closes to a circle: tokens go from the last
    stage to the leader. `answers` says whether this rank sends them.
    """

    def __init__(self, world: World, stages: Sequence[Sequence[int]]) -> None:
        index = next(i for i, ranks in enumerate(stages) if world.rank in ranks)
        own, self._place = stages[index], stages[index].index(world.rank)
        firsts = [ranks[0] for ranks in stages]
        is_last = index == len(stages) - 1
        following = () if is_last else stages[index + 1]
        self.answers = is_last and self._place == 0
        self.group_sizes = [len(ranks) for ranks in stages]
        self._leader, self._last = firsts[0], firsts[-1]
        self._beside = own[self._place - 1] if self._place else None
        self._behind = own[self._place + 1] if self._place + 1 < len(own) else None
        if self._place == 0:
            self._plan_source = firsts[index - 1]
            # Where ranks cannot reach each other, plans go from one to the next.
            members = own[1:] if world.talks_directly else own[1:2]
            self._plan_targets = [*members, *following[:1]]
        elif world.talks_directly:
            self._plan_source, self._plan_targets = own[0], []
        else:
            self._plan_source = own[self._place - 1]
            self._plan_targets = [*own[self._place + 1 : self._place + 2]]
        before = stages[index - 1]
        self._hidden_source = before[self._place % len(before)]
        self._hidden_targets = [
            rank for place, rank in enumerate(following) if place % len(own) == self._place
        ]
        # Answers that the leader gives itself, where the first stage is the last.
        self._own_answers: deque[Tokens] = deque()
        self._world = world
        self._with_checksum = os.environ.get("MLX_DIST_DEBUG") == "1"
        self.waited_s = 0.0
        self.sent_bytes = 0

    @property
    def pulse(self) -> Pulse:
        """Where this rank writes down what it is doing."""
        return self._world.pulse

    def pass_plan(self, plan: Plan) -> None:
        """Send `plan` on, ahead of the work it asks for."""
        for rank in self._plan_targets:
            self._world.control.send(plan, rank)

    def plans(self) -> Iterator[Plan]:
        """What every rank but the leader must do next, `Shutdown` last; each is passed on first."""
        is_idle = False
        while True:
            plan = self._world.control.receive(self._plan_source, is_idle)
            # Ranks are probed when there is nothing else to do.
            is_idle = isinstance(plan, Probe)
            if not isinstance(plan, Plan):
                raise ProtocolError(f"{type(plan).__name__} arrived where a plan was due")
            self.pass_plan(plan)
            yield plan
            if isinstance(plan, Shutdown):
                return

    def send_hidden(self, hidden_BLD: mx.array, vitals: list[Vitals]) -> None:
        """Send computed activations to the next stage; returns before they have arrived."""
        checksum = _checksum(hidden_BLD) if self._with_checksum else None
        ahead = Hidden(list(hidden_BLD.shape), _dtype_name(hidden_BLD.dtype), checksum, vitals)
        for rank in self._hidden_targets:
            self._world.control.send(ahead, rank)
            sent = mx.distributed.send(
                hidden_BLD, rank, group=self._world.group, stream=self._world.streams.send
            )
            mx.async_eval(sent)  # type: ignore[no-untyped-call]
            self.sent_bytes += hidden_BLD.nbytes

    def promise_hidden(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """The activations that the stage before will send, to build on before they come."""
        return mx.distributed.recv(
            shape,
            dtype,
            self._hidden_source,
            group=self._world.group,
            stream=self._world.streams.receive,
        )

    def await_hidden(self, promised_BLD: mx.array) -> list[Vitals]:
        """Wait until promised activations are here; answer the vitals of the ranks before.

        Raises ProtocolError unless what was announced and what came is what was promised.
        """
        start = time.perf_counter()
        hidden = expect(self._world.control.receive(self._hidden_source), Hidden)
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
        """Pass on a probe's findings: within a group to the first rank, which does to the next."""
        target = self._hidden_targets[0] if self._beside is None else self._beside
        self._world.control.send(Hidden([], "", None, vitals), target)

    def vitals_before(self, is_first: bool) -> list[Vitals]:
        """What a probe has found in the stages before, on the first rank of a group."""
        return [] if is_first or self._place else self._receive_vitals(self._hidden_source)

    def vitals_behind(self) -> list[Vitals]:
        """What a probe has found on the ranks of the group that come after this one."""
        return [] if self._behind is None else self._receive_vitals(self._behind)

    def _receive_vitals(self, source: int) -> list[Vitals]:
        return expect(self._world.control.receive(source), Hidden).vitals

    def send_tokens(self, tokens: Tokens) -> None:
        """Answer the leader, from the last stage."""
        if self._world.rank == self._leader:
            self._own_answers.append(tokens)
        else:
            self._world.control.send(tokens, self._leader)

    def poll_tokens(self) -> Tokens | None:
        """The last stage's next answer, on the leader, if it has come and one can look."""
        if self._last == self._leader:
            return self._own_answers.popleft() if self._own_answers else None
        control = self._world.control
        answer = control.poll(self._last) if control.can_poll else None
        return None if answer is None else expect(answer, Tokens)

    def receive_tokens(self, is_called: Callable[[], bool] = lambda: False) -> Tokens | None:
        """The last stage's next answer, on the leader, or None once it `is_called` away.

        Where one cannot look for an answer, this waits for it whatever calls.
        """
        if self._last == self._leader:
            return self._own_answers.popleft()
        with self.pulse.waiting():
            if not self._world.control.can_poll:
                return expect(self._world.control.receive(self._last), Tokens)
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
