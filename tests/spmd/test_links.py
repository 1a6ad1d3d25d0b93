"""Links are measured for every pair that is connected, and all ranks know them."""

from itertools import product

import pytest

from mlx_dist.cluster import links
from mlx_dist.cluster.costs import Link
from mlx_dist.cluster.world import alone
from tests.launching import program


# A ring of two is one link both ways; one of four, below, has ranks that are no neighbours.
@pytest.mark.parametrize(("fabric", "num_ranks"), [("mpi", 3), ("ring", 2)])
def test_every_pair_has_a_link_each_way(fabric, num_ranks):
    measured = program("links", fabric, num_ranks=num_ranks).json()
    for plane, (a, b) in product(("fabric", "control"), product(range(num_ranks), repeat=2)):
        link = measured[plane][a][b]
        if a == b:
            # JSON has no infinity.
            assert link == {"latency_s": 0.0, "bytes_per_s": None}
        else:
            assert 0 < link["latency_s"] < 1
            assert link["bytes_per_s"] > 1e4
            assert link == measured[plane][b][a]
    # Ranks of one host need no interface, and could use none that is faster.
    assert measured["used"] == [[None] * num_ranks] * num_ranks
    assert measured["warnings"] == []


def test_a_ring_of_four_does_not_connect_opposite_ranks():
    measured = program("links", "ring", num_ranks=4).json()
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
        assert measured["fabric"][a][b] == measured["fabric"][b][a]
        assert measured["fabric"][a][b]["bytes_per_s"] > 1e4
    for plane, is_connected in (("fabric", False), ("control", True)):
        for a, b in ((0, 2), (1, 3), (2, 0), (3, 1)):
            assert (measured[plane][a][b] is not None) == is_connected


def test_a_world_of_one_has_no_links():
    matrix = links.measure(alone())
    assert matrix.fabric == matrix.control == ((Link(0.0, float("inf")),),)
    assert matrix.for_placement() == matrix.fabric
    assert (matrix.used, matrix.warnings) == (((None,),), ())


def test_what_is_not_connected_takes_for_ever():
    near = Link(0.0, float("inf"))
    matrix = links.LinkMatrix(((near, None), (None, near)), (), (), ())
    assert matrix.for_placement()[0][1].seconds(1) == float("inf")
