"""Where layers go on real ranks, and what is said when they do not fit."""

import re

import pytest

from tests.launching import mlx_dist
from tests.serving import serving

PROMPT = ("--prompt", "What is a rank?", "--json")


def layers(answer):
    return [(rank["rank"], rank["layers"]) for rank in answer["ranks"]]


@pytest.fixture(scope="module")
def alone():
    return mlx_dist("generate", *PROMPT).json()


def test_ranks_may_be_left_out(alone):
    """For a single stream of a model that fits, one of three equal machines is the fastest."""
    answer = mlx_dist("generate", *PROMPT, "--leave-out", "--fabric", "ring", num_ranks=3).json()
    assert answer["text"] == alone["text"]
    assert layers(answer) == [(0, [0, 6]), (1, [0, 0]), (2, [0, 0])]


def test_spares_take_no_part_in_serving(alone):
    """Over MPI, where those above are left out of a ring."""
    with serving(
        "--leave-out", "--optimize", "latency", "--batching", "fixed:1,4,64", num_ranks=3
    ) as server:
        chat = [{"role": "user", "content": "What is a rank?"}]
        answer = server.client().chat.completions.create(
            model="model", messages=chat, temperature=0
        )
        assert answer.choices[0].message.content == alone["text"]
        ranks = server.get("/cluster")["ranks"]
        assert [rank["layers"] for rank in ranks] == [[0, 6], [0, 0], [0, 0]]
        assert 'mlx_dist_busy_seconds_total{rank="0"}' in server.get("/metrics")


def test_spares_are_no_part_of_what_is_verified():
    done = mlx_dist("verify", "--leave-out", "--optimize", "latency", num_ranks=2)
    assert (done.code, done.out) == (0, "equal\n"), done.err


def test_an_even_split_can_be_asked_for():
    answer = mlx_dist("generate", *PROMPT, "--layers", "even", num_ranks=3).json()
    assert layers(answer) == [(0, [0, 2]), (1, [2, 4]), (2, [4, 6])]


@pytest.mark.parametrize("cut", ["auto", "2,4"])
def test_what_does_not_fit_is_not_placed(cut):
    done = mlx_dist("generate", *PROMPT, "--layers", cut, "--memory-gb", "0.15", num_ranks=2)
    assert done.code == 1
    [line] = done.error_lines
    assert re.search(r"does not fit.*: .* \(rank 1\) has 0.1 GB, and .* are missing", line)


@pytest.mark.parametrize("limit", ["much", "0", "nan", "vm=", "-1"])
def test_a_limit_that_is_none_is_refused(limit):
    done = mlx_dist("generate", *PROMPT, "--memory-gb", limit)
    assert done.code == 1
    assert done.error_lines[0].startswith("mlx-dist: error: --memory-gb")


def test_a_limit_of_a_host_that_is_not_there_is_named():
    done = mlx_dist("generate", *PROMPT, "--memory-gb", "mini-9=4", num_ranks=2)
    assert done.code == 1
    assert "--memory-gb names mini-9, which is no host of these ranks" in done.error_lines[0]


def test_a_ring_of_four_leaves_nobody_out():
    """Between ranks that are no neighbours it carries nothing."""
    done = mlx_dist("generate", *PROMPT, "--leave-out", "--fabric", "ring", num_ranks=4)
    assert done.code == 1
    assert "--leave-out over ring could part neighbours" in done.error_lines[0]
