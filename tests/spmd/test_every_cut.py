"""Any cut, same answer: the embedded model says the same at every cut, on every fabric."""

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.launching import program


@pytest.fixture(scope="module")
def one_rank():
    [answers] = program("every_cut", "mpi", MODEL_DIR, num_ranks=1).json().values()
    assert all(answers)
    return answers


# 6 layers: 5 cuts over 2 ranks, 10 over 3, 10 over 4 and 1 over 6.
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "num_cuts"), [(2, 5), (3, 10), (4, 10), (6, 1)])
def test_every_cut_gives_the_same_tokens(one_rank, ranks, num_cuts):
    results = program("every_cut", "mpi", MODEL_DIR, num_ranks=ranks, timeout_s=250).json()
    assert len(results) == num_cuts
    assert {stages for stages, answers in results.items() if answers != one_rank} == set()


@pytest.mark.timeout(300)
def test_the_ring_gives_the_same_tokens(one_rank):
    results = program("every_cut", "ring", MODEL_DIR, num_ranks=3, timeout_s=250).json()
    assert len(results) == 10
    assert {stages for stages, answers in results.items() if answers != one_rank} == set()
