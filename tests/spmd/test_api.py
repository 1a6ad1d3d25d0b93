"""The Python API and the terminal chat, on one rank and on several."""

from pathlib import Path

import pytest

from mlx_dist.cluster.launch import mpirun_command
from tests.launching import mlx_dist, program, run

EXAMPLE = Path(__file__).parents[2] / "examples" / "api.py"


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_example_runs(num_ranks):
    done = run(mpirun_command(num_ranks, None, [str(EXAMPLE)]))
    assert done.code == 0, done.err
    assert done.out.strip()
    assert len(EXAMPLE.read_text().splitlines()) < 30


def test_an_answer_is_the_same_by_every_way(spmd_ranks):
    answers = program("api", num_ranks=spmd_ranks).json()
    assert answers["generate"] == answers["stream"] == answers["many"][0]
    assert answers["many"] == answers["many again"]
    assert answers["chat"] == answers["chat in a thread"]


@pytest.mark.parametrize(("num_ranks", "end"), [(1, []), (3, ["/exit"])])
def test_a_conversation_in_the_terminal(num_ranks, end):
    """It ends with /exit, or with its input."""
    lines = ["What is a rank?", "/clear", "What is a rank?", "x " * 4000, *end]
    done = mlx_dist(
        "chat", "--max-tokens", "12", num_ranks=num_ranks, stdin="".join(f"{s}\n" for s in lines)
    )
    assert done.code == 0, done.err
    first, _cleared, second, *_ = (answer.strip() for answer in done.out.split("> ")[1:])
    assert first == second != ""
    assert "shorten" in done.err
