"""The scheduler plans every token once, in order, in chunks no longer than allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.engine.scheduler import Request, Scheduler
from mlx_dist.messages import Close, Open, Sampling, Step, Tokens

tokens = st.lists(st.integers(0, 999), min_size=1, max_size=60)


def _run(scheduler, answers):
    """All plans of the submitted request, with `answers` as what the last stage samples."""
    plans, got, answers = [], [], iter(answers)
    while scheduler.is_active:
        plan = scheduler.next_plan()
        if plan is None:
            got += scheduler.accept(Tokens(0, [next(answers)]))
        else:
            plans.append(plan)
    return plans, got


@given(tokens, st.integers(1, 20), st.integers(1, 20))
def test_every_token_is_planned_once(prompt, chunk, max_tokens):
    scheduler = Scheduler(chunk)
    scheduler.submit(Request(tuple(prompt), max_tokens, Sampling()))
    plans, got = _run(scheduler, range(5000, 6000))
    assert isinstance(plans[0], Open)
    assert isinstance(plans[-1], Close)
    steps = [plan for plan in plans if isinstance(plan, Step)]
    assert len(plans) == len(steps) + 2
    planned = [token for step in steps for token in step.rows[0].tokens]
    assert got == list(range(5000, 5000 + max_tokens))
    assert planned == prompt + got[:-1]
    position = 0
    for step in steps:
        assert step.rows[0].position == position
        assert 1 <= len(step.rows[0].tokens) <= chunk
        position += len(step.rows[0].tokens)
    assert [step.sample for step in steps].count(True) == max_tokens
    assert scheduler.finish_reason == "length"


@given(tokens, st.integers(0, 10))
def test_a_stop_token_ends_the_text_and_is_no_part_of_it(prompt, num_before):
    scheduler = Scheduler(16)
    scheduler.submit(Request(tuple(prompt), 100, Sampling(), frozenset({7})))
    _, got = _run(scheduler, [*range(5000, 5000 + num_before), 7])
    assert got == list(range(5000, 5000 + num_before))
    assert scheduler.finish_reason == "stop"


def test_finishing_drops_what_was_planned_and_frees_the_slot():
    scheduler = Scheduler(4)
    scheduler.submit(Request(tuple(range(20)), 100, Sampling()))
    assert isinstance(scheduler.next_plan(), Open)
    scheduler.finish("stop")
    scheduler.finish("length")
    assert isinstance(scheduler.next_plan(), Close)
    assert not scheduler.is_active
    assert scheduler.finish_reason == "stop"


def test_one_request_follows_another():
    scheduler = Scheduler(4)
    for _ in range(2):
        scheduler.submit(Request((1, 2, 3), 2, Sampling()))
        _, got = _run(scheduler, [8, 9])
        assert got == [8, 9]


def test_a_second_request_has_to_wait():
    scheduler = Scheduler(4)
    scheduler.submit(Request((1,), 1, Sampling()))
    with pytest.raises(AssertionError):
        scheduler.submit(Request((1,), 1, Sampling()))
