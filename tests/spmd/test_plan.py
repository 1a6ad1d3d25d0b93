"""`mlx-dist plan` on real ranks: all of them are measured, and only the first one speaks."""

from __future__ import annotations

import pytest

from tests.launching import mlx_dist


def test_the_ranks_of_a_job_are_planned_for(spmd_ranks):
    done = mlx_dist(
        "plan", "-n", str(spmd_ranks), "--streams", "4", "--context", "200", "--json", timeout_s=110
    )
    found = done.json()
    assert [stage["machine"] for stage in found["stages"]] == list(range(spmd_ranks))
    assert [layer for s in found["stages"] for layer in range(*s["layers"])] == list(range(6))
    assert found["stream_tokens_per_s"] > 0
    assert found["total_tokens_per_s"] > 0
    assert found["left_out"] == []


def test_ranks_are_planned_for_as_a_group():
    done = mlx_dist(
        *("plan", "-n", "2", "--parallel", "tensor", "--context", "200", "--json"), timeout_s=110
    )
    found = done.json()
    assert [stage["layers"] for stage in found["stages"]] == [[0, 6]] * 2
    assert [stage["slice"]["weights"] for stage in found["stages"]] == [[1, 1]] * 2
    # What was measured of sums, over ranks of one host.
    assert all(0 < s["collectives_s"] < s["step_s"] for s in found["stages"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # Found before anything is measured, and after it.
        (["--context", "100000"], "--context is 100000 and the model takes 2048"),
        (["--memory-gb", "0.1"], "does not fit"),
    ],
)
def test_what_is_wrong_is_said_once(flags, words):
    done = mlx_dist("plan", *flags, num_ranks=2, timeout_s=110)
    assert done.code != 0
    (line,) = done.error_lines
    assert words in line
