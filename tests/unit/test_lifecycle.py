"""What a supervisor does next, by a clock that the tests wind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.supervise.lifecycle import Lifecycle, Limits, Order, Phase

LIMITS = Limits(
    drain_s=30, meets_s=60, ends_s=15, goes_s=2, stable_s=60, longest_wait_s=30, most_failures=5
)


class Desk:
    """A lifecycle, the time, and whether there are requests."""

    def __init__(self):
        self.now_s, self.has_requests = 100.0, False
        self.life = Lifecycle(LIMITS, lambda: self.has_requests)

    def tell(self, name, *words):
        return getattr(self.life, name)(*words, self.now_s)

    def wait(self):
        """Let time pass until something is due; what is to be done then."""
        self.now_s += self.life.wait_s(self.now_s)
        return self.tell("tick")

    def serve(self):
        if self.life.phase is not Phase.starting:
            assert self.tell("tick") == [Order.start]
        self.life.said_up()
        return self.tell("said_ready")

    def fail(self, is_short=False):
        """The ranks die; what follows when nothing is left of them."""
        assert self.tell("exited", 137) == [Order.sweep]
        return self.tell("swept", is_short)


@pytest.fixture
def desk():
    return Desk()


def test_ranks_that_served_long_are_started_again_at_once(desk):
    desk.serve()
    desk.now_s += 61
    assert desk.fail() == [Order.start]
    assert desk.life.phase is Phase.starting


def test_each_quick_failure_waits_longer_until_it_gives_up(desk):
    desk.serve()
    waits = []
    while (orders := desk.fail()) != [Order.finish]:
        waits.append(0 if orders else desk.life.wait_s(desk.now_s))
        assert orders or desk.wait() == [Order.start]
    assert waits == [0, 1, 2, 4, 8]
    assert (desk.life.code, desk.life.is_given_up) == (1, True)


def test_a_long_life_is_a_new_beginning(desk):
    for _ in range(20):
        desk.serve()
        desk.now_s += 60
        assert desk.fail() == [Order.start]


def test_a_first_start_that_is_refused_is_the_last(desk):
    desk.tell("tick")
    assert desk.tell("said_failed", "--model /nowhere") == []
    assert desk.fail() == [Order.finish]
    assert (desk.life.code, desk.life.reason) == (1, "--model /nowhere")


def test_later_refusals_are_tried_again(desk):
    desk.serve()
    assert desk.fail() == [Order.start]
    desk.tell("said_failed", "no memory")
    assert desk.fail() == []
    assert desk.life.phase is Phase.waiting


def test_a_host_that_is_away_is_waited_for(desk):
    desk.serve()
    for _ in range(50):
        orders = desk.fail(is_short=True)
        assert orders == [Order.start] or desk.wait() == [Order.start]
        desk.tell("said_failed", "the model does not fit")
        assert desk.life.wait_s(desk.now_s) <= 30


def test_what_does_not_go_is_killed(desk):
    desk.serve()
    assert desk.tell("failed", "the first rank is gone") == []
    assert [desk.wait(), desk.wait()] == [[Order.kill], [Order.sweep]]
    assert desk.now_s == 103
    assert desk.tell("exited", 1) == []
    assert desk.tell("swept", False) == [Order.start]


def test_an_mpirun_that_starts_nothing_is_ended(desk):
    desk.tell("tick")
    assert desk.wait() == [Order.terminate]
    assert desk.now_s == 160
    assert "started no rank in 60 s" in desk.life.reason


def test_loading_may_take_any_time(desk):
    desk.tell("tick")
    desk.life.said_up()
    assert desk.life.wait_s(desk.now_s) is None


def test_a_drain_waits_for_the_last_answer(desk):
    desk.serve()
    desk.has_requests = True
    assert desk.tell("ask_to_end") == []
    desk.has_requests = False
    assert desk.tell("tick") == [Order.drain]
    desk.tell("said_drained")
    # A frozen daemon may be left on another host.
    assert desk.tell("exited", 0) == [Order.sweep]
    assert desk.tell("swept", False) == [Order.finish]
    assert desk.life.code == 0


def test_a_drain_has_a_deadline(desk):
    desk.serve()
    desk.has_requests = True
    desk.tell("ask_to_end")
    assert desk.wait() == [Order.terminate]
    assert desk.now_s == 130
    assert desk.tell("exited", 143) == [Order.sweep]
    assert desk.tell("swept", False) == [Order.finish]
    assert desk.life.code == 1


def test_asked_twice_it_ends_at_once(desk):
    desk.serve()
    desk.has_requests = True
    desk.tell("ask_to_end")
    assert desk.tell("ask_to_end") == [Order.terminate]


def test_ranks_that_die_in_a_drain_come_back_for_what_was_taken(desk):
    desk.serve()
    desk.has_requests = True
    desk.tell("ask_to_end")
    assert desk.fail() == [Order.start]
    assert desk.serve() == []
    desk.has_requests = False
    assert desk.tell("tick") == [Order.drain]


def test_ranks_that_end_in_order_unasked_are_not_started_again(desk):
    desk.serve()
    desk.tell("said_drained")
    assert desk.life.is_draining
    # A frozen daemon may be left on another host.
    assert desk.tell("exited", 0) == [Order.sweep]
    assert desk.tell("swept", False) == [Order.finish]
    assert desk.life.code == 0


def test_hosts_are_taken_back_when_nothing_is_under_way(desk):
    desk.serve()
    desk.has_requests = True
    assert desk.tell("renew") == []
    desk.has_requests = False
    assert desk.tell("tick") == [Order.drain]
    desk.tell("said_drained")
    assert desk.tell("exited", 0) == [Order.start]
    assert not desk.life.is_draining
    desk.serve()
    assert desk.tell("tick") == []


EVENTS = st.sampled_from(
    [
        ("said_ready",),
        ("said_drained",),
        ("said_failed", "reason"),
        ("failed", "reason"),
        ("exited", 1),
        ("swept", False),
        ("swept", True),
        ("renew",),
        ("ask_to_end",),
        ("tick",),
        ("request",),
        ("answer",),
        ("wait",),
    ]
)


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_it_ends_when_told_twice(events):
    """And never are ranks started while others may be there."""
    desk, is_running = Desk(), False
    for name, *words in [*events, ("ask_to_end",), ("ask_to_end",), ("ask_to_end",)]:
        if name in ("request", "answer"):
            desk.has_requests = name == "request"
            orders = []
        elif name == "wait":
            orders = desk.wait() if desk.life.wait_s(desk.now_s) is not None else []
        else:
            orders = desk.tell(name, *words)
        # mpirun may say that it has ended at any time.
        is_running &= name != "exited" and Order.sweep not in orders
        if Order.start in orders:
            assert not is_running
            is_running = True
    for _ in range(10):
        if desk.life.phase is Phase.sweeping:
            desk.tell("swept", False)
        elif desk.life.wait_s(desk.now_s) is not None:
            desk.wait()
    assert desk.life.phase is Phase.over
    assert desk.life.wait_s(desk.now_s) is None


def test_ranks_that_cannot_meet_are_killed_and_started_again(desk):
    assert desk.tell("tick") == [Order.start]
    desk.life.said_up()
    assert desk.tell("lost_sight", "h2 is silent") == [Order.kill]
    assert desk.tell("exited", 137) == [Order.sweep]
    assert desk.tell("swept", True) == [Order.start]
    assert desk.life.reason == "h2 is silent"


def test_ranks_that_have_met_watch_themselves(desk):
    desk.serve()
    assert desk.tell("lost_sight", "h2 is silent") == []
    assert desk.life.phase is Phase.serving
