"""Whatever comes and goes, every request gets the tokens that it gets alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dist.engine import kv
from mlx_dist.engine.admission import Reuse
from mlx_dist.engine.batching import Batching, StepTimes
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.messages import KvCost, Sampling, Step
from tests.unit.simulated import Ranks
from tests.unit.watched import GROWTH, Scenario, World


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    monkeypatch.setattr(kv, "_GROWTH", GROWTH)


@st.composite
def scenarios(draw):
    chunk = draw(st.sampled_from([1, 8, 60, 150, 150]))
    times = draw(st.none() | step_times)
    batching = Batching(
        num_microbatches=draw(st.integers(1, 3)),
        max_sequences=draw(st.sampled_from([1, 2, 4, 8])),
        prefill_chunk=chunk,
        prefill_share=draw(st.sampled_from([(chunk + 3) // 4, (chunk + 1) // 2, chunk])),
        times=times,
        most_padding=draw(st.sampled_from([0, 5, 20, math.inf])),
    )
    num_stages = draw(st.integers(1, 4))
    rooms = draw(st.lists(kv_rooms, min_size=num_stages, max_size=num_stages))
    trim_limit = draw(st.sampled_from([0, 24, math.inf]))
    reuse = Reuse(is_on=draw(st.sampled_from([False, True, True])), trim_limit=trim_limit)
    return Scenario(
        num_stages,
        batching,
        rooms,
        reuse,
        max_queue=draw(st.sampled_from([2, 30])),
        num_requests=draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 1 << 16)),
        cancel_rate=draw(st.sampled_from([0.0, 0.01, 0.04])),
        answer_rate=draw(st.sampled_from([0.05, 0.5, 1.0])),
    )


step_times = st.builds(
    lambda a, b, score, stages: StepTimes(
        decode={n: tuple(s * (a + n) for s in stages) for n in (1, 2, 4)},
        prefill={n: tuple(s * (b + n) for s in stages) for n in (4, 16, 64)},
        score_s=tuple(s * score for s in stages),
    ),
    st.integers(1, 100),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.lists(st.integers(1, 3).map(float), min_size=2, max_size=2),
)
kv_rooms = st.builds(
    lambda fixed, a, b, window, tokens: KvRoom(
        KvCost(fixed, [(a, None), (b, window)]), fixed * 2 + (a + b) * tokens
    ),
    st.integers(0, 50),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(1, 40),
    st.sampled_from([60, 150, 600, 3000, 3000]),
)


@settings(max_examples=300, deadline=None, report_multiple_bugs=False)
@given(scenarios())
def test_every_request_gets_what_it_gets_alone(scenario):
    world = World(scenario)
    world.run()
    world.check_end()


_NO_REUSE = Reuse()


def _served(scheduler: Scheduler, ranks: Ranks) -> list[Event]:
    """All events of what was submitted, every answer at once."""
    events = []
    while scheduler.is_active:
        plan = scheduler.next_plan()
        assert plan is not None, "the scheduler waits for nothing"
        if (tokens := ranks.execute(plan)) is not None:
            scheduler.accept(tokens)
        events += scheduler.take_events()
    return events


def _world(
    batching: Batching, budget_tokens: int, *, reuse: Reuse = _NO_REUSE, num_stages: int = 1
) -> tuple[Scheduler, Ranks]:
    rooms = [KvRoom(KvCost(0, [(1, None)]), budget_tokens)] * num_stages
    scheduler = Scheduler(batching, KvLedger(rooms, 0), num_stages, reuse=reuse)
    return scheduler, Ranks(rooms, trim_limit=reuse.trim_limit, growth=GROWTH)


def _prompt(*tokens: int, max_tokens: int = 2, borders: tuple[int, ...] = ()) -> Request:
    return Request(tokens, max_tokens, Sampling(), borders=borders)


def test_an_entry_that_is_in_the_way_of_who_would_use_it_is_dropped():
    reuse = Reuse(is_on=True, trim_limit=math.inf)
    scheduler, ranks = _world(Batching(1, 1, 64), 60, reuse=reuse)
    scheduler.submit(_prompt(*range(20)))
    _served(scheduler, ranks)
    assert ranks.entries
    # 40 and 2 and room to grow do not fit beside the 21 that are kept.
    scheduler.submit(_prompt(*range(40)))
    events = _served(scheduler, ranks)
    assert events[-1].finish_reason == "length"
    assert events[-1].cached_tokens == 0


def test_those_who_come_during_a_step_share_the_next():
    scheduler, ranks = _world(Batching(1, 8, 64, prefill_share=64), 10_000)
    scheduler.submit(_prompt(*range(30), max_tokens=9))
    answers = []
    while not any(tokens.tokens for tokens in answers):
        tokens = ranks.execute(scheduler.next_plan())
        answers += [tokens] if tokens else []
    scheduler.submit(_prompt(7, 8, 9))
    scheduler.submit(_prompt(6, 5, 4))
    for tokens in answers:
        scheduler.accept(tokens)
    plans = [scheduler.next_plan() for _ in range(8)]
    steps = [plan for plan in plans if isinstance(plan, Step) and not plan.sample]
    assert [len(step.rows) for step in steps] == [2]


def test_of_prompts_that_begin_alike_the_first_is_kept_at_its_border_for_the_others():
    """Caches that cannot be trimmed are kept at borders, where no step of several stops."""
    scheduler, ranks = _world(Batching(1, 8, 64), 10_000, reuse=Reuse(is_on=True))
    for own in range(3):
        scheduler.submit(_prompt(*range(10), 40 + own, 50 + own, borders=(10,)))
    _served(scheduler, ranks)
    assert [opening.num_cached for opening in ranks.openings] == [0, 10, 10]
    opens = [m for m in ranks.opened if len(m) > 1]
    assert [len(m) for m in opens] == [2]


def test_short_prompts_take_turns_with_a_long_one():
    scheduler, ranks = _world(Batching(1, 8, 10), 10_000)
    long = scheduler.submit(_prompt(*range(45), *range(45)))
    short = [scheduler.submit(_prompt(i, 1, 2, 3)) for i in range(3)]
    events = _served(scheduler, ranks)
    first = {
        i: next(n for n, e in enumerate(events) if e.request_id == i and e.token) for i in short
    }
    assert max(first.values()) < next(
        n for n, e in enumerate(events) if e.request_id == long and e.token is not None
    )


def test_ending_what_is_over_or_unknown_is_nothing():
    scheduler, ranks = _world(Batching(1, 1, 10), 1000)
    request_id = scheduler.submit(_prompt(1, 2, 3))
    _served(scheduler, ranks)
    scheduler.end(request_id)
    scheduler.end(99)
    assert not scheduler.is_active


def test_who_is_ended_while_waiting_never_reaches_the_ranks():
    scheduler, ranks = _world(Batching(1, 1, 10), 1000)
    scheduler.submit(_prompt(1, 2, 3))
    waiting = scheduler.submit(_prompt(4, 5, 6))
    scheduler.end(waiting, "stop")
    events = _served(scheduler, ranks)
    assert [e.finish_reason for e in events if e.request_id == waiting] == ["stop"]
    assert len(ranks.openings) == 1


def test_an_idle_scheduler_plans_nothing():
    scheduler, _ = _world(Batching(), 1000)
    assert scheduler.next_plan() is None
    assert not scheduler.is_active
    assert (scheduler.num_ready, scheduler.num_in_flight, scheduler.num_active) == (0, 0, 0)
