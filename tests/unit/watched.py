"""The scheduler at work on simulated ranks, watched at every plan."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from mlx_dist.engine.admission import Budget, Reuse
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Event, Request, Sequence
from mlx_dist.errors import PromptTooLongError, QueueFullError
from mlx_dist.messages import Plan, Sampling, Step, Tokens
from tests.unit.simulated import VOCAB_SIZE, Ranks, alone

# Small, so that padding and growth count beside short prompts.
GROWTH = 4
# What prompts begin with.
_STEMS = [(), tuple(range(4)), tuple(range(12)), tuple(range(20)), (*range(20), *range(30, 50))]


@dataclass(frozen=True)
class Scenario:
    """A world, what is asked of it, and a seed for the order in which things happen."""

    num_stages: int
    batching: Batching
    rooms: list[KvRoom]
    reuse: Reuse
    max_queue: int
    num_requests: int
    seed: int
    cancel_rate: float
    answer_rate: float

    def requests(self) -> list[Request]:
        rng = random.Random(self.seed)
        requests: list[Request] = []
        for number in range(self.num_requests):
            stem = rng.choice(_STEMS)
            if requests and rng.random() < 0.3:
                # A chat's next turn.
                last = rng.choice(requests)
                stem = (*last.prompt, *alone(last)[0])
            requests.append(_request(rng, stem, number))
        return requests


def _request(rng: random.Random, stem: tuple[int, ...], number: int) -> Request:
    """A prompt that begins as others may and is known by its seed."""
    shared = stem[: rng.randrange(len(stem) + 1)] if rng.random() < 0.5 else stem
    own = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 3, 3, 30])))
    prompt = (*shared, *own) or (1,)
    borders = {len(shared), rng.randrange(len(prompt))} if rng.random() < 0.7 else set()
    return Request(
        prompt,
        max_tokens=rng.choice([1, 2, 5, 25]),
        sampling=Sampling(seed=number),
        stop_tokens=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 2]))),
        borders=tuple(sorted(b for b in borders if 0 < b < len(prompt))),
        record=rng.random() < 0.1,
    )


@dataclass
class World:
    """The scheduler at work on simulated ranks, watched at every plan."""

    scenario: Scenario
    events: dict[int, list[Event]] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)  # by the request's number
    answers: deque[Tokens] = field(default_factory=deque)
    cancelled: set[int] = field(default_factory=set)
    # Who could have entered, and how many steps had been planned when it first could.
    head: Sequence | None = None
    steps_since: int = 0
    num_steps: int = 0
    # When the last step was planned: the prompt tokens it could have, the microbatches decoding.
    limits: list[int] = field(default_factory=list)
    num_busy: int = 0
    has_room: bool = False
    num_since_prefill: int = 0

    def __post_init__(self) -> None:
        s = self.scenario
        self.ledger = KvLedger(s.rooms, slack=s.batching.prefill_chunk)
        self.scheduler = Scheduler(
            s.batching, self.ledger, s.num_stages, max_queue=s.max_queue, reuse=s.reuse
        )
        self.ranks = Ranks(
            s.rooms,
            trim_limit=s.reuse.trim_limit,
            growth=GROWTH,
            slack=s.batching.prefill_chunk,
        )
        self.requests = s.requests()
        self.rng = random.Random(s.seed)
        budget_of = self.scheduler._budget

        def noted_budget() -> Budget:
            budget = budget_of()

            def noted(num_cached: int) -> int:
                self.limits.append(budget(num_cached))
                return self.limits[-1]

            return noted

        self.scheduler._budget = noted_budget

    def run(self) -> None:
        """Submit and cancel at random moments, until all is done."""
        coming = deque(enumerate(self.requests))
        pause = self.rng.choice([0.1, 0.5, 1.0])
        while coming or self.scheduler.is_active or self.answers:
            while coming and (self.rng.random() < pause or not self.scheduler.is_active):
                number, request = coming.popleft()
                self.submit(number, request)
            if self.ids and self.rng.random() < self.scenario.cancel_rate:
                number = self.rng.choice(list(self.ids))
                self.scheduler.end(self.ids[number])
                self.cancelled.add(number)
            is_idle = not self.plan()
            if self.answers and (is_idle or self.rng.random() < self.scenario.answer_rate):
                self.scheduler.accept(self.answers.popleft())
            elif is_idle:
                # Nothing to do and nothing to wait for: nothing may be left.
                self.hear()
                assert not self.scheduler.is_active
            self.hear()
            self.check()

    def submit(self, number: int, request: Request) -> None:
        try:
            self.ids[number] = self.scheduler.submit(request)
        except PromptTooLongError as error:
            assert not self.ledger.fits([[request.most_tokens]], None)
            assert str(len(request.prompt)) in str(error)
            assert str(self.ledger.most_tokens()) in str(error)
        except QueueFullError as error:
            assert len(self.scheduler.admission.waiting) == self.scenario.max_queue
            assert error.retry_after_s > 0

    def plan(self) -> bool:
        """Have the next plan executed, if there is one."""
        can_admit = (
            not self.scheduler.num_ready
            and self.scheduler.num_in_flight < 2 * self.scenario.num_stages
        )
        if can_admit:
            self.limits.clear()
            busy = [m for m in self.scheduler._microbatches if m.decoding]
            self.num_busy = len(busy)
            num_in_flight = self.scheduler.num_in_flight
            self.has_room = (
                all(m.is_in_flight for m in busy) and num_in_flight < self.scenario.num_stages
            )
        plan = self.scheduler.next_plan()
        if can_admit:
            self.check_nobody_is_passed_over()
        if plan is None:
            return False
        if isinstance(plan, Step):
            self.num_steps += 1
            self.check_step(plan)
        answer = self.ranks.execute(plan)
        if answer is not None:
            self.answers.append(answer)
            assert len(self.answers) <= 2 * self.scenario.num_stages
        self.check_memory(plan)
        return True

    def check_step(self, step: Step) -> None:
        """Prompts take turns with decoding, or the room it leaves, and stay within their budget."""
        if step.sample:
            assert len(step.rows) <= self.scenario.batching.max_sequences
            self.num_since_prefill += 1
            return
        assert self.has_room or self.num_since_prefill >= min(self.num_busy, 2)
        self.num_since_prefill = 0
        assert len(step.rows) * step.shape[1] <= self.limits[-1]
        for row in step.rows:
            end = row.position + len(row.tokens)
            assert not any(row.position < b < end for b in self.borders(row.slot))

    def borders(self, slot: int) -> list[int]:
        """Where the caches in `slot` must be kept, for nothing shorter can be cut out later."""
        reuse = self.scenario.reuse
        rows = (row for m in self.ranks.microbatches.values() for row in m.rows)
        request = self.requests[next(row.seed for row in rows if row.slot == slot)]
        if not reuse.is_on or request.record:
            return []
        return [border for border in request.borders if border >= reuse.trim_limit]

    def check_nobody_is_passed_over(self) -> None:
        """Who has waited longest enters at the next prompts' turn, or at the one after it."""
        before, self.head = self.head, self.first_with_room()
        if self.head is None or self.head is not before:
            self.steps_since = self.num_steps
        most_steps = 2 * (self.scenario.batching.num_microbatches + 3)
        assert self.num_steps - self.steps_since <= most_steps

    def first_with_room(self) -> Sequence | None:
        """The first that waits, if there are a slot and memory for it and prompts may begin."""
        members = [m.members for m in self.scheduler._microbatches]
        if not self.scheduler.admission.waiting or len(self.scheduler._prefills) > 1:
            return None
        first = self.scheduler.admission.waiting[0]
        lengths = [[s.request.most_tokens for s in m] for m in members]
        batching = self.scenario.batching
        if sum(map(len, members)) == batching.num_microbatches * batching.max_sequences:
            return None
        target = self.scheduler.admission._target(members, first)
        assert len(members[target]) < batching.max_sequences
        lengths[target].append(first.request.most_tokens)
        return first if self.ledger.fits(lengths, None) else None

    def check_memory(self, plan: Plan) -> None:
        """No rank ever holds more than its budget, nor its sequences what they reserved."""
        slots, entries = self.ranks.slot_bytes(), self.ranks.entry_bytes()
        budget = self.ledger.budget_bytes
        assert all(a + b <= c for a, b, c in zip(slots, entries, budget, strict=True)), plan
        if self.scheduler.num_ready:
            return
        reserved = self.scheduler.reserved_bytes
        assert all(a <= b for a, b in zip(slots, reserved, strict=True))
        index = self.scheduler.admission.prefix
        assert set(self.ranks.entries) == set(index._entries)
        assert all(a <= b for a, b in zip(entries, index.bytes_by_rank, strict=True))
        assert all(a + b <= c for a, b, c in zip(reserved, entries, budget, strict=True))

    def check(self) -> None:
        assert len(self.scheduler.admission.waiting) <= self.scenario.max_queue
        if not self.scheduler.num_ready:
            assert self.scheduler.num_in_flight == len(self.answers)

    def hear(self) -> None:
        for event in self.scheduler.take_events():
            heard = self.events.setdefault(event.request_id, [])
            assert not heard or heard[-1].finish_reason is None
            assert not heard or heard[-1].prefilled <= event.prefilled
            heard.append(event)

    def check_end(self) -> None:
        """Everybody got what was theirs, and nothing is left behind."""
        for number, request_id in self.ids.items():
            self.check_answer(number, self.events[request_id])
        assert not self.ranks.microbatches
        assert self.scheduler.num_active == 0
        assert not any(self.scheduler.reserved_bytes)
        free = self.scheduler.admission._free_slots
        assert sorted(free) == list(range(self.scheduler.admission._num_slots))
        most = self.scenario.batching.num_microbatches * self.scenario.batching.max_sequences
        assert len(free) <= most
        entered = [opening.sampling.seed for opening in self.ranks.openings]
        assert entered == sorted(entered)

    def check_answer(self, number: int, events: list[Event]) -> None:
        request = self.requests[number]
        tokens, reason = alone(request)
        got = [event.token for event in events if event.token is not None]
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
        if events[-1].finish_reason == "cancelled":
            assert number in self.cancelled
            assert got == tokens[: len(got)]
            return
        assert (got, events[-1].finish_reason) == (tokens, reason)
        [opening] = [o for o in self.ranks.openings if o.sampling.seed == number]
        assert {e.cached_tokens for e in events} == {opening.num_cached}
        assert events[-1].prefilled == len(request.prompt)
        if request.record:
            assert opening.num_cached == 0
