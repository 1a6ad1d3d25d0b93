"""Every tensor goes to every rank that wants it, once and whole, however it is cut up."""

from math import prod
from pathlib import Path
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.messages import Want
from mlx_dist.model import delivery
from mlx_dist.model.delivery import RawTensor
from mlx_dist.model.feed import _schedule
from mlx_dist.model.files import WeightFile

FILE = WeightFile("model.safetensors", b"{}", 10, Path("model.safetensors"))


def _tensor(place, shape, item_bytes=4):
    return RawTensor(place, f"tensor {place}", FILE, shape, prod(shape) * item_bytes)


@given(
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 10_000),
)
def test_the_pieces_of_a_tensor_are_all_of_it(shape, item_bytes, most_bytes):
    tensor = _tensor(0, shape, item_bytes)
    with patch.object(delivery, "_MOST_PIECE_BYTES", most_bytes):
        pieces = tensor.pieces()
    num_rows = shape[0] if shape else 1
    assert [row for start, end, _ in pieces for row in range(start, end)] == list(range(num_rows))
    assert sum(num_bytes for _, _, num_bytes in pieces) == tensor.num_bytes
    assert all(n <= most_bytes or end == start + 1 for start, end, n in pieces)


orders = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=20), min_size=1, max_size=5)


@given(orders)
def test_each_rank_gets_what_it_wants_in_its_order(orders):
    tensors = [_tensor(place, (2,)) for place in range(31)]
    schedule = _schedule([[Want(place) for place in order] for order in orders], tensors)
    for rank, order in enumerate(orders):
        assert [each.tensor.place for each in schedule if each.rank == rank] == order
    assert len(schedule) == sum(map(len, orders))


@given(orders)
def test_no_rank_waits_while_another_gets_two(orders):
    schedule = _schedule(
        [[Want(place) for place in order] for order in orders],
        [_tensor(place, (2,)) for place in range(31)],
    )
    num_got = [0] * len(orders)
    for each in schedule:
        unfinished = [n for n, order in zip(num_got, orders, strict=True) if n < len(order)]
        assert num_got[each.rank] == min(unfinished)
        num_got[each.rank] += 1
