"""Who is called silent or stuck, and who never is: by a clock that the tests turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.cluster.pulse import Pulse
from mlx_dist.cluster.vigil import Lease, Pace, Vigil
from mlx_dist.messages import Beat, State

HOSTS = ("mini1", "mini2", "mini3")
TIMEOUT_S, TICK_S = 5.0, 0.5
IDLE = Beat(State.idle)

seconds = st.floats(1e-4, 30)
sizes = st.integers(1, 5000)


def computing(count, for_s, patience_s=20.0):
    return Beat(State.computing, count, for_s, patience_s, "Step 7")


def waiting(count=0, patience_s=20.0):
    return Beat(State.waiting, count, 0.0, patience_s)


class Room:
    """A vigil, its clock, and ranks that say something at every tick unless they are silent."""

    def __init__(self):
        self.now_s = 100.0
        self.vigil = Vigil(HOSTS, TIMEOUT_S, TICK_S, self.now_s)
        self.says = [IDLE] * len(HOSTS)

    def tick(self, *, late_s=0.0, silent=()):
        self.now_s += TICK_S + late_s
        self.vigil.look(self.now_s)
        for rank, beat in enumerate(self.says):
            if rank not in silent:
                self.vigil.hear(rank, beat)
        return self.vigil.verdict()

    def until_verdict(self, most_s, **how):
        """The verdict and the seconds that it took; None if none comes in `most_s`."""
        start_s = self.now_s
        while self.now_s - start_s < most_s:
            if verdict := self.tick(**how):
                return verdict, self.now_s - start_s
        return None, most_s


@given(st.sets(st.sampled_from([1, 2]), min_size=1), st.integers(0, 20))
def test_the_silent_are_named_in_time_and_nobody_else(silent, num_before):
    room = Room()
    room.says = [IDLE, computing(3, 0.1), IDLE]
    for _ in range(num_before):
        assert room.tick() is None
    verdict, took_s = room.until_verdict(60, silent=silent)
    assert TIMEOUT_S < took_s <= TIMEOUT_S + 2 * TICK_S
    for rank, host in enumerate(HOSTS):
        assert (f"rank {rank} ({host}) is silent for 5" in verdict) == (rank in silent)
    if 1 in silent and num_before:
        assert "last it was computing (Step 7)" in verdict


@given(st.lists(st.integers(0, 8), max_size=40))
def test_silence_shorter_than_the_timeout_ends_nothing(pauses):
    """A partition that heals, again and again."""
    room = Room()
    for num_silent in pauses:
        for _ in range(num_silent):
            assert room.tick(silent={1, 2}) is None
        assert room.tick() is None


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=40))
def test_who_did_not_look_calls_nobody_silent(moments):
    """The watching thread itself was frozen, or got no processor; what was sent is still there."""
    room = Room()
    lease = Lease(TIMEOUT_S, TICK_S, room.now_s)
    num_silent = 0
    for late_s, are_silent in moments:
        num_silent = num_silent + 1 if are_silent else 0
        verdict = room.tick(late_s=late_s, silent={1} if are_silent else ())
        lease.look(room.now_s)
        if not are_silent:
            lease.renew()
        # A tick counts as two at most, however late it is.
        if 2 * TICK_S * num_silent <= TIMEOUT_S:
            assert verdict is None
            assert lease.silence_s() is None


def test_a_lease_ends_after_the_leader_could_have_said_why():
    lease = Lease(TIMEOUT_S, TICK_S, 0.0)
    lasted_s = 0.0
    while lease.silence_s() is None:
        lasted_s += TICK_S
        lease.look(lasted_s)
    assert TIMEOUT_S + TICK_S < lasted_s <= TIMEOUT_S + 1


def test_work_is_stuck_once_it_takes_longer_than_it_may():
    room = Room()
    room.says[2] = computing(41, 19.9)
    assert room.tick() is None
    room.says[2] = computing(41, 20.5)
    assert room.tick() == (
        "rank 2 (mini3) is stuck: computing (Step 7) for 20.5 s, and 20.0 s at most were expected"
    )


def test_nothing_is_read_for_too_long():
    room = Room()
    room.says[1] = Beat(State.loading, 4096, 700.0, 600.0, "byte 4096")
    assert "rank 1 (mini2) is stuck: loading (byte 4096) for 700.0 s" in room.tick()


def test_ranks_that_wait_for_each_other_are_found():
    room = Room()
    room.says = [waiting(5), IDLE, waiting(9)]
    verdict, took_s = room.until_verdict(60)
    assert "no step has gone forward for 20." in verdict
    assert took_s <= 20 + 2 * TICK_S
    assert "rank 0 (mini1) is waiting" in verdict


@given(st.integers(0, 2), st.booleans())
def test_ranks_that_wait_for_one_that_works_are_not(worker, is_loading):
    room = Room()
    state = State.loading if is_loading else State.computing
    room.says = [waiting()] * 3
    room.says[worker] = Beat(state, 1, 1.0, 500.0)
    assert room.until_verdict(100) == (None, 100)


def test_ranks_that_wait_while_steps_go_forward_are_not():
    room = Room()
    for count in range(200):
        room.says = [waiting(), waiting(count), IDLE]
        assert room.tick() is None


@given(st.lists(st.tuples(sizes, seconds), min_size=3), st.floats(1, 20))
def test_work_of_a_size_that_was_seen_may_take_as_long_many_times(seen, times):
    pace = Pace(TIMEOUT_S)
    for size, took_s in seen:
        pace.took(size, took_s)
    for size, took_s in seen:
        assert pace.patience_s(size) >= max(20.0, times * took_s)


@given(st.lists(st.integers(0, 5000), max_size=2), sizes)
def test_first_steps_are_never_stuck(seen, size):
    pace = Pace(TIMEOUT_S)
    for done in seen:
        pace.took(done, 1e-3)
    assert pace.patience_s(size) >= 600


@given(st.floats(1e-3, 1), st.integers(1, 64), st.integers(1, 100))
def test_a_long_prefill_is_never_stuck(token_s, num_decoding, chunks):
    """Before it only decoding was seen; it takes in proportion, and longer as its caches grow."""
    pace = Pace(TIMEOUT_S)
    for _ in range(3):
        pace.took(num_decoding, token_s * num_decoding)
    for chunk in range(chunks):
        step_s = token_s * 512 * (1 + chunk / 25)
        assert step_s < pace.patience_s(512)
        pace.took(512, step_s)


def test_a_slow_models_step_has_its_time_and_no_more():
    pace = Pace(TIMEOUT_S)
    for _ in range(3):
        pace.took(512, 40.0)
    assert pace.patience_s(512) == 800
    assert pace.patience_s(1) == 800
    assert pace.patience_s(1024) == 1600
    pace.took(1, 0.5)
    assert pace.patience_s(1) == 20


@pytest.fixture
def clock(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("mlx_dist.cluster.pulse.time.monotonic", lambda: now_s[0])
    return now_s


def test_a_pulse_tells_what_is_going_on(clock):
    pulse = Pulse(TIMEOUT_S)
    assert pulse.beat().state is State.starting
    pulse.loading(100)
    clock[0] = 2.0
    assert pulse.beat() == Beat(State.loading, 100, 2.0, 600.0, "byte 100")
    pulse.loaded()
    for _ in range(3):
        pulse.working("a step", 8)
        clock[0] += 3.0
        pulse.idle()
    pulse.working("a step", 8)
    clock[0] += 1.0
    assert pulse.beat() == Beat(State.computing, 4, 1.0, 60.0, "a step")
    with pulse.waiting():
        clock[0] += 50.0
        assert pulse.beat() == Beat(State.waiting, 4, 50.0, 60.0, "a step")
    # Waiting is no work: neither is it held against the rank, nor does it give it more time.
    assert pulse.beat() == Beat(State.computing, 5, 0.0, 60.0, "a step")
    pulse.idle()
    with pulse.waiting():
        pass
    assert pulse.beat().count == 5, "a wait that somebody broke off is no progress"
