"""What the fault campaign draws, and how it judges: a judge that misses a fault proves nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faults.asks import (
    Outcome,
    Told,
    asks,
    compare,
    is_refusal,
    read_answer,
    read_stream,
)
from benchmarks.faults.clients import Tally
from benchmarks.faults.deck import IN_THE_LAB, RANKS, Case, Fault, Phase, draw, targets
from benchmarks.faults.results import Result, not_reached, summary, table

KILLED = Result(
    case=Case(Fault.kill, "rank 1", Phase.decode, 0.5),
    timeout_s=5,
    load_s=4,
    noticed_s=0.2,
    noticed_by="a line",
    ready_s=6,
    num_restarts=1,
    counts={"right": 40, "refused": 3},
    code=0,
)


@given(
    st.integers(0, 120), st.integers(), st.lists(st.sampled_from(Fault), unique=True, min_size=1)
)
def test_every_fault_target_and_phase_comes_up_evenly(num, seed, faults):
    cases = draw(num, seed, faults, has_lab=True)
    assert cases == draw(num, seed, faults, has_lab=True)
    assert len(cases) == num
    for fault in faults:
        own = [case for case in cases if case.fault is fault]
        assert abs(len(own) - num / len(faults)) < 1
        for choices, met in (
            (targets(fault, True), [case.target for case in own]),
            (list(Phase), [case.phase for case in own]),
        ):
            times = [met.count(choice) for choice in choices]
            assert max(times) - min(times) <= 1


def test_without_hosts_only_what_needs_none_is_drawn():
    cases = draw(60, 1, list(Fault), has_lab=False)
    assert {case.fault for case in cases}.isdisjoint(IN_THE_LAB)
    with pytest.raises(ValueError, match="none of host is possible"):
        draw(1, 1, [Fault.host], has_lab=False)


def test_requests_are_of_all_kinds_and_always_the_same():
    assert asks(20, 1) == asks(20, 1)
    bodies = [json.loads(ask.body) for ask in asks(20, 1)]
    kinds = {(body["stream"], body["temperature"] > 0, body.get("n", 1)) for body in bodies}
    assert {(True, False, 1), (True, True, 1), (True, True, 2), (False, False, 1)} <= kinds
    assert all("seed" in body for body in bodies if body["temperature"])


def stream(*pieces, end="data: [DONE]\n\n"):
    """A stream of (choice, text, reason)."""
    events = [
        {"choices": [{"index": index, "text": text, "finish_reason": reason}]}
        for index, text, reason in pieces
    ]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + end.encode()


DUE = read_stream(stream((0, "one ", None), (0, "two", "length")))


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (stream((0, "one", None), (0, " two", "length")), Outcome.right),
        (stream((0, "one ", None), (0, "one ", None), (0, "two", "length")), Outcome.wrong),
        (stream((0, "one two", None), (0, "one two", "length")), Outcome.twice),
        (stream((0, "one two", "length"), (0, "", "length")), Outcome.twice),
        (stream((0, "one two", "stop")), Outcome.wrong),
        (stream((0, "one two", None)), Outcome.wrong),
        (stream((0, "one two", "length"), (1, "", "length")), Outcome.wrong),
    ],
)
def test_an_answer_is_right_only_if_it_is_the_same(said, outcome):
    assert compare(read_stream(said), DUE) == outcome


def test_streams_with_comments_and_errors():
    assert read_stream(b": keep-alive\n\n" + stream((0, "one two", "length"))) == DUE
    error = b'data: {"error": {"message": "it ended"}}\n\n'
    assert read_stream(stream((0, "one", None), end="") + error) == "it ended"


@pytest.mark.parametrize("end", ["", "data: [DONE]", "data: [DONE]\n\ndata: [DONE]\n\n"])
def test_a_stream_that_does_not_end_as_it_should_is_no_answer(end):
    with pytest.raises(ValueError, match="end"):
        read_stream(stream((0, "one two", "length"), end=end))


def test_answers_in_one_piece():
    choice = {"index": 0, "message": {"content": "one two"}, "finish_reason": "length"}
    assert read_answer(json.dumps({"choices": [choice]}).encode()) == DUE
    assert isinstance(DUE, Told)


def test_only_what_was_not_taken_may_be_asked_again():
    assert is_refusal(503, b"the server is starting; its log says more")
    assert is_refusal(429, b"")
    assert not is_refusal(503, b"the answer broke off and could not go on within 120 s")
    assert not is_refusal(500, b"the server is starting")


def test_a_trial_as_promised_breaks_no_promise():
    assert KILLED.unmet() == []
    assert not_reached([KILLED]) == "Every trial was as promised."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": {"right": 1, "lost": 1}}, "1 lost"),
        ({"counts": {"wrong": 2}}, "2 wrong"),
        ({"counts": {"twice": 1}}, "1 twice"),
        ({"counts": {"error": 1}}, "1 error"),
        ({"counts": {"hung": 1}}, "1 hung"),
        ({"left": ["mxh2: rank 1"]}, "1 processes left"),
        ({"code": 1}, "exit code 1 instead of 0"),
        ({"code": None}, "exit code None instead of 0"),
        ({"noticed_s": 1.1}, "noticed after 1.1 s, not 1 s"),
        ({"noticed_s": None}, "never noticed"),
        ({"ready_s": 9.3}, "ready 9.1 s after that, not 9.0 s"),
        ({"hung": "it never served again"}, "it never served again"),
    ],
)
def test_each_broken_promise_is_told(change, said):
    result = replace(KILLED, **change)
    assert result.unmet() == [said]
    assert said in not_reached([result])
    assert Result.from_json(result.to_json()) == result


def test_a_wrong_answer_that_is_a_tie_is_counted_as_such():
    ask, other = asks(2, 1)
    tally = Tally(wrong=[(ask, DUE), (other, DUE)])
    for wrong, _ in tally.wrong:
        tally.add(wrong, Outcome.wrong, "")
    tally.excuse(lambda asked, _: asked == ask)
    assert tally.counts == {Outcome.wrong: 1, Outcome.tie: 1}
    assert replace(KILLED, counts={"right": 1, "tie": 1}).unmet() == []


def test_what_is_allowed_to_whom():
    frozen = replace(KILLED, case=replace(KILLED.case, fault=Fault.stop), noticed_s=5.9, ready_s=12)
    assert frozen.unmet() == []
    passing = replace(KILLED, case=replace(KILLED.case, fault=Fault.slow), noticed_s=None)
    assert replace(passing, num_restarts=0, ready_s=None).unmet() == []
    orphaned = replace(KILLED.case, target="supervisor")
    ended = replace(KILLED, case=orphaned, counts={"lost": 16}, ready_s=None, code=137)
    assert ended.unmet() == []
    assert replace(ended, counts={"wrong": 1}).unmet() == ["1 wrong"]


def test_the_tables_name_every_fault_and_count_every_trial():
    results = [replace(KILLED, case=case) for case in draw(60, 3, list(Fault), has_lab=True)]
    rows = table(results).splitlines()[2:]
    assert sum(int(row.split("|")[3]) for row in rows) == 60
    assert {row.split("|")[1].strip() for row in rows} == {fault.value for fault in Fault}
    assert "| trials | 60 |  |" in summary(results)
    assert set(RANKS).isdisjoint(row.split("|")[2].strip() for row in rows)
