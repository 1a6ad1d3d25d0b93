"""What is promised covers what can come to be, on every rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.messages import KvCost

costs = st.builds(
    KvCost,
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(1, 100), st.none() | st.integers(1, 600)), max_size=3),
)
rooms = st.lists(st.builds(KvRoom, costs, st.integers(0, 1 << 20)), min_size=1, max_size=3)
microbatches = st.lists(st.lists(st.integers(1, 900), max_size=4), max_size=3)


@given(rooms, microbatches, st.integers(0, 512))
def test_a_reservation_is_every_sequence_padded_to_the_longest_and_grown(rooms, lengths, slack):
    reserved = KvLedger(rooms, slack).reserved_bytes(lengths)
    for room, num_bytes in zip(rooms, reserved, strict=True):
        expected = 0
        for of_one in lengths:
            for _ in of_one:
                expected += room.cost.fixed_bytes
                for per_token, window in room.cost.growing:
                    width = max(of_one) + 256
                    held = width if window is None else min(width, window + slack)
                    expected += per_token * held
        assert num_bytes == expected


@given(rooms, microbatches, st.integers(0, 2), st.integers(1, 900))
def test_more_never_costs_less(rooms, lengths, target, extra):
    ledger = KvLedger(rooms, 16)
    lengths = [*lengths, [], [], []]
    grown = [[*of_one, extra] if i == target else of_one for i, of_one in enumerate(lengths)]
    before, after = ledger.reserved_bytes(lengths), ledger.reserved_bytes(grown)
    assert all(a <= b for a, b in zip(before, after, strict=True))


@given(rooms, microbatches, st.data())
def test_it_fits_if_it_fits_on_every_rank_beside_what_is_kept(rooms, lengths, data):
    ledger = KvLedger(rooms, 0)
    kept = [data.draw(st.integers(0, 1 << 20)) for _ in rooms]
    reserved = ledger.reserved_bytes(lengths)
    sums = zip(reserved, kept, ledger.budget_bytes, strict=True)
    assert ledger.fits(lengths, kept) == all(a + b <= budget for a, b, budget in sums)
    assert ledger.fits(lengths, None) == ledger.fits(lengths, [0] * len(rooms))


@given(rooms)
def test_the_longest_that_fits_fits_and_no_longer_one_does(rooms):
    ledger = KvLedger(rooms, 0)
    most = ledger.most_tokens()
    assert most == 0 or ledger.fits([[most]], None)
    assert most == 1 << 32 or not ledger.fits([[most + 1]], None)


def test_an_entry_costs_its_tokens_and_what_a_step_leaves_beyond_a_window():
    cost = KvCost(7, [(2, None), (3, 10)])
    ledger = KvLedger([KvRoom(cost, 0), KvRoom(KvCost(1), 0)], slack=5)
    assert ledger.bytes_of(4) == (7 + 8 + 12, 1)
    assert ledger.bytes_of(100) == (7 + 200 + 3 * (10 + 5), 1)
