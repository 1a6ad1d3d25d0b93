"""Every layer is held exactly once, whatever the counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.cluster.placement import cut, even_counts
from mlx_dist.config import parse_layers
from mlx_dist.errors import PlacementError


@given(st.integers(1, 200), st.data())
def test_an_even_cut_holds_every_layer_once(num_layers, data):
    num_ranks = data.draw(st.integers(1, num_layers))
    stages = cut(num_layers, num_ranks, None)
    assert [i for start, end in stages for i in range(start, end)] == list(range(num_layers))
    sizes = [end - start for start, end in stages]
    assert max(sizes) - min(sizes) <= 1
    assert tuple(sizes) == even_counts(num_layers, num_ranks)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_given_counts_are_kept(counts):
    stages = cut(sum(counts), len(counts), counts)
    assert [end - start for start, end in stages] == counts
    assert stages[0][0] == 0
    assert stages[-1][1] == sum(counts)


@pytest.mark.parametrize(
    ("num_layers", "num_ranks", "counts", "words"),
    [
        (6, 7, None, "6 layers and there are 7 ranks"),
        (6, 2, (3, 2), "adds up to 5"),
        (6, 2, (3, 2, 1), "cuts for 3 ranks and there are 2"),
        (6, 2, (6, 0), "leaves a rank without layers"),
        (6, 3, (3, -1, 4), "leaves a rank without layers"),
    ],
)
def test_an_impossible_cut_is_refused(num_layers, num_ranks, counts, words):
    with pytest.raises(PlacementError, match=words):
        cut(num_layers, num_ranks, counts)


@pytest.mark.parametrize("text", ["", "3,", "a,b", "3;3", "1.5,2"])
def test_layers_that_are_no_list_are_refused(text):
    with pytest.raises(PlacementError, match="not a list of counts"):
        parse_layers(text)


def test_layers_are_read():
    assert parse_layers("3,1,2") == (3, 1, 2)
    assert parse_layers(None) is None
