"""Rank 0's scheduler: which plan next. Knows slots and tokens; knows no arrays and no network.

A request waits, is prefilled in a microbatch of its own (short prompts together), and joins one
of the microbatches that decode. A plan takes effect on a rank when it passes there, in the order
of planning, so that nothing waits for what was planned before it; only the token that a sequence
goes on with must have come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from mlx_dist.engine.admission import Admission, Budget, Reuse
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger
from mlx_dist.engine.sequence import Event, FinishReason, Request, Sequence
from mlx_dist.messages import Close, Logprobs, Merge, Open, Plan, Row, Step, Tokens

_NO_REUSE = Reuse()
# Prompts in the making at a time, so that a short one need not wait for a long one.
_MOST_GROUPS = 2
# Decoding steps between steps of prompts, which may take as long as these: so many, and one more
# for a better moment. One long step among many short ones is what the stages behind it wait for.
_STEPS_BETWEEN = 2
# How much the last prefill step says of the next one's time.
_SLOWDOWN_WEIGHT = 0.5
# What a prompt of many steps takes of a step's tokens, so that several streams hardly notice it:
# with one or two stages, and with more, beside whose rounds a step is shorter.
_LONG_PROMPT_SHARE, _LONG_PROMPT_SHARE_OF_MANY = 0.6, 0.7
# A step that takes so much longer than it should says nothing of the next one.
_NOISE = 0.1


@dataclass(slots=True)
class _Microbatch:
    """Sequences that decode together, in the ranks' order, and those that will join them."""

    number: int
    decoding: list[Sequence] = field(default_factory=list)
    coming: list[Sequence] = field(default_factory=list)
    is_in_flight: bool = False

    @property
    def members(self) -> list[Sequence]:
        return self.decoding + self.coming


@dataclass(slots=True)
class _Prefill:
    """Sequences whose prompts run in a microbatch of their own.

    Several have one step; of one alone, the step before had `before` tokens.
    """

    number: int
    target: _Microbatch
    sequences: list[Sequence]
    before: int = 0


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step whose answer is due. A prefill was expected to take `expected_s`, if known."""

    microbatch: int
    sequences: tuple[Sequence, ...]
    is_sampled: bool
    expected_s: float | None = None


class Scheduler:
    """Turns requests into plans; `num_stages` bounds the steps in flight."""

    def __init__(
        self,
        batching: Batching,
        ledger: KvLedger,
        num_stages: int,
        *,
        max_queue: int = 1024,
        reuse: Reuse = _NO_REUSE,
    ) -> None:
        self.batching = batching
        self.admission = Admission(batching, ledger, max_queue, reuse)
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.ledger = ledger
        self._num_stages = num_stages
        self._window = 2 * num_stages
        # As many again for sequences that are too long or too short for the others.
        self._microbatches = [_Microbatch(i) for i in range(2 * batching.num_microbatches)]
        self._turn = deque(self._microbatches)
        self._prefills: deque[_Prefill] = deque()
        self._numbers = count(len(self._microbatches))
        self._ready: deque[Plan] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._events: list[Event] = []
        # Decoding steps since the last step of prompts, which take turns.
        self._num_decoded = 0
        self._is_turn_of_new = True
        self._slowdown = 1.0

    @property
    def num_active(self) -> int:
        """Sequences that hold a slot."""
        return sum(len(m.members) for m in self._microbatches)

    @property
    def _num_decoding(self) -> int:
        return sum(len(m.decoding) for m in self._microbatches)

    @property
    def num_ready(self) -> int:
        """Plans that are made and not run."""
        return len(self._ready)

    @property
    def num_in_flight(self) -> int:
        """Steps whose answers are due."""
        return len(self._in_flight)

    @property
    def is_active(self) -> bool:
        """Whether a plan is left to run, a token to come or a request to serve."""
        return bool(
            self._ready or self._in_flight or self._events or self.admission.waiting
        ) or bool(self.num_active)

    @property
    def reserved_bytes(self) -> tuple[int, ...]:
        """KV memory promised to sequences, on each rank."""
        lengths = [[s.request.most_tokens for s in m.members] for m in self._microbatches]
        return self.ledger.reserved_bytes(lengths)

    def submit(self, request: Request) -> int:
        """Queue `request` and answer its id. Raises what `Admission.check` raises."""
        return self.admission.submit(request).id

    def end(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        """End a request, with the next plan; nothing happens if it is over."""
        for sequence in self.admission.waiting:
            if sequence.id == request_id:
                self.admission.waiting.remove(sequence)
                self._events.append(sequence.event(finish_reason=reason))
                return
        for microbatch in self._microbatches:
            for sequence in microbatch.members:
                if sequence.id == request_id:
                    self._finish(microbatch, [(sequence, reason)])
                    return

    def next_plan(self) -> Plan | None:
        """The next plan, or None while one must wait for a token or a request."""
        if not self._ready and len(self._in_flight) < self._window:
            self._plan_step()
        return self._ready.popleft() if self._ready else None

    def accept(self, tokens: Tokens) -> None:
        """Take the last stage's answer to the oldest step in flight."""
        step = self._in_flight.popleft()
        assert step.microbatch == tokens.microbatch
        if not step.is_sampled:
            if step.expected_s and tokens.vitals:
                slowdown = max(v.step_s for v in tokens.vitals) / step.expected_s
                self._slowdown += _SLOWDOWN_WEIGHT * (slowdown - self._slowdown)
            return
        microbatch = self._microbatches[step.microbatch]
        microbatch.is_in_flight = False
        all_logprobs = tokens.logprobs or [None] * len(tokens.tokens)
        ended: list[tuple[Sequence, FinishReason]] = []
        for sequence, token, logprobs in zip(
            step.sequences, tokens.tokens, all_logprobs, strict=True
        ):
            # A sequence that was ended meanwhile takes no more tokens.
            if sequence.slot is not None and (reason := self._take(sequence, token, logprobs)):
                ended.append((sequence, reason))
        if ended:
            self._finish(microbatch, ended)

    def take_events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _take(
        self, sequence: Sequence, token: int, logprobs: Logprobs | None
    ) -> FinishReason | None:
        """Take a token; why the sequence is over, if it is."""
        if token in sequence.request.stop_tokens:
            return "stop"
        sequence.generated.append(token)
        self.num_completion_tokens += 1
        self._events.append(sequence.event(token, logprobs))
        return "length" if len(sequence.generated) == sequence.request.max_tokens else None

    def _keep(self, sequence: Sequence) -> None:
        self._ready += self.admission.keep(sequence, [m.members for m in self._microbatches])

    def _finish(self, microbatch: _Microbatch, ended: list[tuple[Sequence, FinishReason]]) -> None:
        """End sequences of one microbatch: all copies first, then one plan that closes all."""
        for sequence, _ in ended:
            self._keep(sequence)
        self._ready.append(Close([s.slot for s, _ in ended if s.slot is not None]))
        for sequence, reason in ended:
            self.admission.free(sequence)
            if sequence in microbatch.decoding:
                microbatch.decoding.remove(sequence)
            else:
                microbatch.coming.remove(sequence)
                self._leave_prefill(sequence)
            self._events.append(sequence.event(finish_reason=reason))

    def _leave_prefill(self, sequence: Sequence) -> None:
        for prefill in list(self._prefills):
            if sequence in prefill.sequences:
                prefill.sequences.remove(sequence)
                if not prefill.sequences:
                    self._prefills.remove(prefill)

    def _plan_step(self) -> None:
        """Plan one step, if any can go: prompts take turns with the microbatches."""
        if self._is_turn_of_prompts():
            if prefill := self._next_prefill():
                self._num_decoded = 0
                self._plan_prefill(prefill)
                return
            self._num_decoded = min(self._num_decoded, _STEPS_BETWEEN)
        for microbatch in list(self._turn):
            if microbatch.decoding and not microbatch.is_in_flight:
                self._turn.remove(microbatch)
                self._turn.append(microbatch)
                self._num_decoded += 1
                self._plan_decode(microbatch)
                return

    def _is_turn_of_prompts(self) -> bool:
        busy = [m for m in self._microbatches if m.decoding]
        num_busy = len(busy)
        if len(self._in_flight) < self._num_stages and all(m.is_in_flight for m in busy):
            # Nothing else could take the room in the pipe.
            return True
        if self._num_decoded < min(num_busy, _STEPS_BETWEEN):
            return False
        # Better when the pipe is full: behind a prompt that enters before, stages run dry. Where
        # answers come as fast as steps are planned it never is, and a lone stage has none behind.
        num_out = sum(m.is_in_flight for m in self._microbatches)
        is_full = self._num_stages == 1 or num_out >= min(num_busy, self._num_stages)
        return is_full or self._num_decoded > _STEPS_BETWEEN

    def _plan_decode(self, microbatch: _Microbatch) -> None:
        microbatch.is_in_flight = True
        sequences = tuple(microbatch.decoding)
        rows = [self._advance(sequence, [sequence.next_token]) for sequence in sequences]
        record = any(sequence.request.record for sequence in sequences)
        self._ready.append(Step(microbatch.number, rows, sample=True, record=record))
        self._in_flight.append(_InFlight(microbatch.number, sequences, is_sampled=True))

    def _next_prefill(self) -> _Prefill | None:
        """Whose prompts go on. Those under way and those who wait take turns."""
        prefill = None
        if not self._prefills or (self._is_turn_of_new and len(self._prefills) < _MOST_GROUPS):
            prefill = self._admit()
        self._is_turn_of_new = prefill is None
        if prefill is None and self._prefills:
            prefill = self._prefills.popleft()
            self._prefills.append(prefill)
        return prefill

    def _admit(self) -> _Prefill | None:
        """Open a microbatch for those who wait, as many as fit one step, if there is room.

        They do not enter before their step can go: until then others may come to share it.
        """
        while True:
            members = [m.members for m in self._microbatches]
            group = self.admission.next_group(members, self._budget())
            if group is None:
                return None
            prefill = _Prefill(
                next(self._numbers), self._microbatches[group.target], group.sequences
            )
            prefill.target.coming += group.sequences
            self.num_prompt_tokens += sum(len(s.request.prompt) for s in group.sequences)
            self._ready += (*group.plans, Open(prefill.number, group.openings))
            self._prefills.append(prefill)
            # With all of its prompts reused, it has nothing to run.
            if not self._merge_if_done(prefill):
                return prefill

    def _plan_prefill(self, prefill: _Prefill) -> None:
        times = self.batching.times
        most = self._budget()(max(s.position for s in prefill.sequences))
        rows = []
        for sequence in prefill.sequences:
            num_tokens = sequence.num_to_prefill
            if len(prefill.sequences) == 1:
                num_tokens = prefill.before = self._step_of_one(prefill, sequence, most)
            start = sequence.position
            rows.append(
                self._advance(sequence, list(sequence.request.prompt[start : start + num_tokens]))
            )
        record = prefill.sequences[0].request.record
        step = Step(prefill.number, rows, sample=False, record=record)
        num_cached = sum(row.position for row in rows) // len(rows)
        num_tokens = step.shape[0] * step.shape[1]
        expected_s = times.prefill_s(num_tokens, num_cached) if times else None
        self._ready.append(step)
        self._in_flight.append(_InFlight(prefill.number, (), False, expected_s))
        for sequence in prefill.sequences:
            self._events.append(sequence.event())
            if sequence.position in self.admission.borders(sequence.request):
                self._keep(sequence)
        self._merge_if_done(prefill)

    def _step_of_one(self, prefill: _Prefill, sequence: Sequence, most: int) -> int:
        """The tokens that the only prompt of `prefill` has in its next step, of `most`."""
        num_left, times = sequence.num_to_prefill, self.batching.times
        if num_left > most and self._num_decoding > 1:
            # Every round has one, not just now and then.
            is_long_pipe = self._num_stages > 2
            share = _LONG_PROMPT_SHARE_OF_MANY if is_long_pipe else _LONG_PROMPT_SHARE
            most = max(min(most, self.batching.least_prefill), int(share * most))
        borders = self.admission.borders(sequence.request)
        ahead = [border - sequence.position for border in borders if border > sequence.position]
        num_tokens = min(num_left, most, *ahead)
        is_alone = self.num_active == 1 and not self.admission.waiting
        if times and is_alone and num_tokens == num_left:
            return times.last_prefill(num_left, prefill.before, sequence.position)
        return num_tokens

    def _merge_if_done(self, prefill: _Prefill) -> bool:
        """Let sequences whose prompts are in the pipe, all but the last token, decode."""
        if any(sequence.num_to_prefill for sequence in prefill.sequences):
            return False
        self._prefills.remove(prefill)
        self._ready.append(Merge(prefill.number, prefill.target.number))
        for sequence in prefill.sequences:
            prefill.target.coming.remove(sequence)
            prefill.target.decoding.append(sequence)
        return True

    def _advance(self, sequence: Sequence, tokens: list[int]) -> Row:
        assert sequence.slot is not None
        row = Row(sequence.slot, sequence.position, tokens)
        sequence.position += len(tokens)
        return row

    def _budget(self) -> Budget:
        """How many prompt tokens the next step may have.

        Beside as many streams as there are once all who wait have entered: those who were first
        are not served faster at the cost of the others.
        """
        slowdown = max(1.0, self._slowdown - _NOISE)
        num_waiting = len(self.admission.waiting)
        # Those who enter with the next step count as before: it is what they were chosen for.
        is_crowded = num_waiting + sum(len(m.coming) for m in self._microbatches) > 1
        sizes = []
        if self._num_decoding:
            total = self.num_active + num_waiting
            total = min(total, self.batching.num_microbatches * self.batching.max_sequences)
            num_microbatches = self.batching.num_microbatches_for(total)
            size = -(-total // num_microbatches)
            sizes = [size] * num_microbatches
        return partial(self.batching.prefill_tokens, sizes, slowdown, is_crowded)
