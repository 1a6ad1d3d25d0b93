"""The program on hosts with names and addresses of their own, over links with a delay."""

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.launching import mlx_dist

PROMPT = ("--prompt", "What is a rank?", "--json")


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_three_hosts_answer_as_one(cluster, fabric):
    alone = mlx_dist("generate", *PROMPT).json()
    answer = cluster.mlx_dist("generate", *PROMPT, "--fabric", fabric).json()
    assert answer["text"] == alone["text"]
    assert [rank["host"] for rank in answer["ranks"]] == ["mxh1", "mxh2", "mxh3"]


def test_a_slow_link_changes_nothing_but_the_time(cluster):
    cluster.faults(delay_ms=2, rate_mbit=100)
    done = cluster.mlx_dist("verify")
    cluster.faults()
    assert (done.code, done.out) == (0, "equal\n"), done.err


def test_errors_name_the_host(cluster, tmp_path):
    """The leader's host has the model; what it finds wrong is said with its name."""
    done = cluster.mlx_dist("generate", *PROMPT, "--model", tmp_path)
    assert done.code == 1
    assert done.error_lines == [
        f"mlx-dist: error: {tmp_path} has no config.json; is this a model's folder?"
    ]
    done = cluster.mlx_dist("generate", "--prompt", "word " * 5000, "--model", MODEL_DIR)
    assert "rank 0 (mxh1): the prompt has" in done.error_lines[0]
