"""Who may enter, who waits, who is refused, and what is kept."""

from __future__ import annotations

import math

import pytest

from mlx_dist.engine.admission import Admission, Reuse
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.sequence import Request
from mlx_dist.errors import NotReadyError, PromptTooLongError, QueueFullError
from mlx_dist.messages import Drop, Keep, KvCost, Sampling

_GROWN = 256
_TRIMMABLE = Reuse(is_on=True, trim_limit=math.inf)


def _admission(
    *budgets: int,
    max_queue: int = 10,
    reuse: Reuse = _TRIMMABLE,
    num_microbatches: int = 1,
    max_sequences: int = 8,
    most_padding: float = math.inf,
) -> Admission:
    """One byte a token on every rank."""
    rooms = [KvRoom(KvCost(0, [(1, None)]), budget) for budget in budgets]
    batching = Batching(num_microbatches, max_sequences, most_padding=most_padding)
    return Admission(batching, KvLedger(rooms, 0), max_queue, reuse)


def _request(num_tokens: int, max_tokens: int = 5, first: int = 0, **kwargs) -> Request:
    return Request(tuple(range(first, first + num_tokens)), max_tokens, Sampling(), **kwargs)


def _enter(admission, members, most=1000, most_beside_cached=1000):
    """Take the next group into `members`."""
    group = admission.next_group(members, lambda cached: most_beside_cached if cached else most)
    if group is not None:
        members[group.target] += group.sequences
    return group


def _finish(admission, members, sequence):
    """Let `sequence` end with all of its prompt cached; the plans that keep it."""
    sequence.position = len(sequence.request.prompt)
    plans = admission.keep(sequence, members)
    admission.free(sequence)
    for of_one in members:
        if sequence in of_one:
            of_one.remove(sequence)
    return plans


def test_what_can_never_fit_is_refused_with_what_would():
    admission = _admission(1000, 600)
    assert admission.submit(_request(340, 4)).id == 0
    with pytest.raises(PromptTooLongError, match=r"341 tokens with 4 .* takes 344"):
        admission.submit(_request(341, 4))
    assert len(admission.waiting) == 1


def test_the_queue_is_bounded_also_for_several_at_once():
    admission = _admission(1000, max_queue=2)
    admission.check(_request(5), num_new=2)
    with pytest.raises(QueueFullError):
        admission.check(_request(5), num_new=3)
    admission.submit(_request(5))
    admission.submit(_request(5))
    with pytest.raises(QueueFullError, match="2 requests") as caught:
        admission.submit(_request(5))
    assert caught.value.retry_after_s > 0


def test_who_drains_takes_nobody():
    admission = _admission(1000)
    admission.is_draining = True
    with pytest.raises(NotReadyError):
        admission.submit(_request(5))


def test_who_does_not_fit_now_waits_and_nobody_passes_him():
    admission = _admission(2 * _GROWN + 200)
    long, short = _request(100, 50), _request(2, 2)
    for request in (long, long, short):
        admission.submit(request)
    members = [[]]
    assert len(_enter(admission, members).sequences) == 1
    assert _enter(admission, members) is None
    assert [s.id for s in admission.waiting] == [1, 2]
    _finish(admission, members, members[0][0])
    assert _enter(admission, members).sequences[0].id == 1


def test_they_are_spread_over_all_microbatches_and_no_slot_is_given_twice():
    admission = _admission(1 << 30, num_microbatches=3, max_sequences=2)
    members = [[], [], []]
    for i in range(8):
        admission.submit(_request(10, first=100 * i))
    while _enter(admission, members):
        assert max(map(len, members)) <= 2
    assert list(map(len, members)) == [2, 2, 2]
    assert sorted(s.slot for m in members for s in m) == list(range(6))
    assert len(admission.waiting) == 2
    _finish(admission, members, members[1][0])
    group = _enter(admission, members)
    assert group.target == 1
    assert sorted(s.slot for m in members for s in m) == list(range(6))


def test_those_enter_together_whose_prompts_fit_one_step():
    admission = _admission(1 << 30)
    for num_tokens in (11, 9, 11, 12, 1, 1, 1):
        admission.submit(_request(num_tokens))
    members = [[]]
    groups = [_enter(admission, members, most=30) for _ in range(3)]
    sizes = [[len(s.request.prompt) for s in group.sequences] for group in groups]
    # Of 12 tokens all but the last are computed; of one, none.
    assert sizes == [[11, 9, 11], [12], [1, 1, 1]]


@pytest.mark.parametrize(("most", "num_together"), [(18, 2), (17, 1)])
def test_what_is_cached_counts_for_who_may_enter_together(most, num_together):
    admission, members = _admission(10_000), [[]]
    admission.submit(_request(30))
    _finish(admission, members, _enter(admission, members).sequences[0])
    admission.submit(_request(40))
    admission.submit(_request(40))
    group = _enter(admission, members, most_beside_cached=most)
    assert [s.num_to_prefill for s in group.sequences] == [9] * num_together


def _lengths(members):
    return [[len(s.request.prompt) for s in of_one] for of_one in members]


def test_who_is_like_no_other_gets_a_microbatch_of_his_own():
    admission = _admission(1 << 30, max_sequences=8, most_padding=20)
    members = [[], []]
    for num_tokens in (10, 12, 100, 11, 95, 104):
        admission.submit(_request(num_tokens))
        _enter(admission, members)
    assert _lengths(members) == [[10, 12, 11], [100, 95, 104]]
    # One that is like none of them, where there is no other: he pads least among the short ones.
    admission.submit(_request(30))
    _enter(admission, members)
    assert _lengths(members) == [[10, 12, 11, 30], [100, 95, 104]]


def test_a_microbatch_of_his_own_is_one_that_may_be_there_anyway():
    admission = _admission(1 << 30, num_microbatches=2, max_sequences=8, most_padding=20)
    members = [[], [], [], []]
    for num_tokens in (10, 100, 10):
        admission.submit(_request(num_tokens))
        _enter(admission, members)
    assert _lengths(members) == [[10, 10], [100], [], []]


def test_those_do_not_enter_together_who_would_pad_each_other():
    admission = _admission(1 << 30, max_sequences=8, most_padding=20)
    for num_tokens in (10, 12, 100):
        admission.submit(_request(num_tokens))
    assert _lengths([_enter(admission, [[], []]).sequences]) == [[10, 12]]


def test_more_microbatches_take_no_more_sequences():
    admission = _admission(1 << 30, max_sequences=2, most_padding=0)
    members = [[], []]
    for num_tokens in (10, 100, 1000):
        admission.submit(_request(num_tokens))
    while _enter(admission, members):
        pass
    assert _lengths(members) == [[10], [100]]


def test_a_chat_goes_on_where_it_was():
    admission, members = _admission(10_000), [[]]
    admission.submit(_request(30))
    first = _enter(admission, members).sequences[0]
    assert _finish(admission, members, first) == [Keep(first.slot or 0, 0)]
    admission.submit(_request(50))
    [opening] = _enter(admission, members).openings
    assert (opening.entry, opening.num_cached) == (0, 30)
    assert opening.prefix == list(range(10, 30))
    counts = admission.reuse_counts
    assert (counts.queries, counts.hits, counts.hit_tokens) == (2, 1, 30)
    plans = _finish(admission, members, members[0][0])
    assert plans == [Keep(opening.slot, 1), Drop([0])]
    assert admission.prefix.bytes_by_rank == (50,)


def test_the_last_token_of_a_prompt_is_always_computed():
    admission, members = _admission(10_000), [[]]
    for _ in range(2):
        admission.submit(_request(30))
        group = _enter(admission, members)
        _finish(admission, members, group.sequences[0])
    assert group.openings[0].num_cached == 29


def test_room_is_made_on_the_fullest_rank_the_oldest_first():
    admission, members = _admission(10_000, _GROWN + 130), [[]]
    for first in (0, 1000, 2000):
        admission.submit(_request(30, first=first))
        _finish(admission, members, _enter(admission, members).sequences[0])
    assert admission.prefix.bytes_by_rank == (90, 90)
    admission.submit(_request(80, 10, first=3000))
    group = _enter(admission, members)
    assert group.plans == [Drop([0]), Drop([1])]
    assert admission.prefix.bytes_by_rank == (30, 30)


def test_what_would_be_reused_goes_if_it_leaves_no_room():
    admission, members = _admission(_GROWN + 130), [[]]
    for first in (0, 1000):
        admission.submit(_request(40, first=first))
        _finish(admission, members, _enter(admission, members).sequences[0])
    admission.submit(_request(100, 10))
    group = _enter(admission, members)
    assert group.openings[0].entry is None
    assert sorted(i for plan in group.plans for i in plan.entries) == [0, 1]
    assert admission.prefix.num_entries == 0


def test_nothing_is_dropped_for_who_does_not_enter():
    admission, members = _admission(2 * _GROWN + 200), [[]]
    admission.submit(_request(30))
    _finish(admission, members, _enter(admission, members).sequences[0])
    admission.submit(_request(50, 50, first=1000))
    _enter(admission, members)
    admission.submit(_request(150, 50))
    assert _enter(admission, members) is None
    assert admission.prefix.num_entries == 1


@pytest.mark.parametrize(
    "request_", [_request(30, record=True), _request(7)], ids=["recorded", "short"]
)
def test_what_is_not_worth_keeping_is_not_kept(request_):
    admission, members = _admission(10_000), [[]]
    admission.submit(request_)
    assert _finish(admission, members, _enter(admission, members).sequences[0]) == []


def test_nothing_is_kept_without_reuse():
    admission, members = _admission(10_000, reuse=Reuse()), [[]]
    admission.submit(_request(30, borders=(10,)))
    assert _finish(admission, members, _enter(admission, members).sequences[0]) == []
    assert admission.borders(_request(30, borders=(10,))) == ()
    assert admission.reuse_counts.queries == 0


def test_borders_are_where_caches_cannot_be_cut_later():
    request = _request(30, borders=(5, 20))
    assert _admission(1000, reuse=Reuse(True, 0)).borders(request) == (5, 20)
    assert _admission(1000, reuse=Reuse(True, 6)).borders(request) == (20,)
    assert _admission(1000, reuse=Reuse(True, math.inf)).borders(request) == ()


def test_who_has_a_border_ahead_is_prefilled_alone():
    admission, members = _admission(1 << 20, reuse=Reuse(True, 0)), [[]]
    for _ in range(2):
        admission.submit(_request(30, borders=(20,)))
    assert len(_enter(admission, members).sequences) == 1
