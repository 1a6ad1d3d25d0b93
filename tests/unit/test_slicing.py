"""Whatever the ratio and the number of ranks: all of a layer is held, and what goes together is."""

from math import gcd

from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.cluster.placement import Slice
from mlx_dist.model.slicing import Cut, apportion, heads, parts, width_block

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=9).map(tuple)


def covered(ranges):
    """Every unit of the ranges, as often as it is in one."""
    return [unit for start, end in ranges for unit in range(start, end)]


@given(st.integers(0, 500), WEIGHTS, st.integers(0, 3))
def test_shares_cover_every_unit_once_in_order(num_units, weights, least):
    assert covered(apportion(num_units, weights, least)) == list(range(num_units))


@given(st.integers(0, 500), WEIGHTS)
def test_shares_are_as_near_to_the_ratio_as_whole_units_are(num_units, weights):
    for (start, end), weight in zip(apportion(num_units, weights), weights, strict=True):
        assert abs(end - start - num_units * weight / sum(weights)) < 1


@given(WEIGHTS, st.integers(0, 3), st.integers(0, 100))
def test_none_gets_less_than_the_least_where_there_is_enough(weights, least, more):
    shares = apportion(least * len(weights) + more, weights, least)
    assert min(end - start for start, end in shares) >= least


def test_shares_by_example():
    assert apportion(8, (1, 1, 1)) == [(0, 3), (3, 6), (6, 8)]
    assert apportion(8, (3, 1)) == [(0, 6), (6, 8)]
    assert apportion(4, (100, 1, 1), least=1) == [(0, 2), (2, 3), (3, 4)]


@given(st.integers(1, 60), WEIGHTS, st.integers(1, 64))
def test_parts_keep_blocks_and_idle_ranks_copy_one(num_blocks, weights, block):
    found = parts(num_blocks * block, Slice(0, weights), block)
    working = [(part.start, part.end) for part in found if not part.is_idle]
    assert covered(working) == list(range(num_blocks * block))
    assert all(start % block == end % block == 0 for start, end in working)
    # Where there are fewer blocks than ranks, those of large weights may have several.
    assert 0 < len(working) <= num_blocks
    assert len(working) == len(weights) or num_blocks < len(weights)
    assert all((part.start, part.end) == (0, block) for part in found if part.is_idle)


@st.composite
def head_counts(draw):
    """Heads of queries, of keys and values, and how many of queries stay together."""
    num_kv_heads, repeats = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    blocks = [n for n in range(1, num_kv_heads * repeats + 1) if num_kv_heads * repeats % n == 0]
    # A block is of one head's queries, or of all those of several.
    fitting = [n for n in blocks if repeats % n == 0 or n % repeats == 0]
    return num_kv_heads * repeats, num_kv_heads, draw(st.sampled_from(fitting))


@given(head_counts(), WEIGHTS)
def test_queries_are_held_once_beside_their_keys(counts, weights):
    num_heads, num_kv_heads, block = counts
    repeats = num_heads // num_kv_heads
    found = heads(num_heads, num_kv_heads, Slice(0, weights), block)
    assert len(found) == len(weights)
    working = [rank for rank in found if not rank.queries.is_idle]
    assert covered((r.queries.start, r.queries.end) for r in working) == list(range(num_heads))
    for rank in found:
        start, end = rank.keys
        num_queries, num_keys = rank.queries.end - rank.queries.start, end - start
        # mlx-lm shares keys out evenly: to the queries held here, in order.
        assert num_queries % num_keys == 0
        for place in range(num_queries):
            keys = start + place // (num_queries // num_keys)
            assert keys == (rank.queries.start + place) // repeats
        assert rank.queries.start % block == rank.queries.end % block == 0
    assert covered(rank.keys for rank in found if rank.own_keys) == list(range(num_kv_heads))


def test_heads_by_example():
    def queries(*counts):
        found = heads(*counts)
        return [(h.queries.start, h.queries.end) for h in found if not h.queries.is_idle]

    # 8 heads of keys on 3 ranks, 2 on 3, and 1 on 3 with 4 queries.
    assert queries(32, 8, Slice(0, (1, 1, 1))) == [(0, 12), (12, 24), (24, 32)]
    assert queries(8, 2, Slice(0, (1, 1, 1))) == [(0, 2), (2, 4), (4, 8)]
    assert queries(4, 1, Slice(0, (1, 1, 1))) == [(0, 2), (2, 3), (3, 4)]
    # Groups of quantized weights span two heads: one rank is left idle.
    assert queries(4, 2, Slice(0, (1, 1, 1)), 2) == [(0, 2), (2, 4)]


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6), st.integers(1, 8), st.integers(1, 4))
def test_a_cut_counts_entries_in_whole_parts(borders, per_part, more_axes):
    starts_ends = sorted(borders)[: len(borders) // 2 * 2]
    ranges = tuple(zip(starts_ends[::2], starts_ends[1::2], strict=True))
    cut = Cut(more_axes, ranges, 20)
    assert covered(cut.entries(20 * per_part)) == [
        part * per_part + i for part in covered(ranges) for i in range(per_part)
    ]
    kept = len(covered(ranges)) * per_part
    whole = [3] * more_axes + [20 * per_part, 5]
    assert cut.shape(whole) == (*[3] * more_axes, kept, 5)
    # Of quantized weights several parts share an entry.
    even = Cut(0, tuple((2 * start, 2 * end) for start, end in ranges), 40)
    assert even.entries(20) == list(ranges)


@given(st.integers(1, 10_000))
def test_blocks_of_a_width_divide_it(width):
    assert width % width_block(width, None) == 0
    assert width_block(width, None) == gcd(width, 16)
    assert width_block(64 * width, 64) == 64
