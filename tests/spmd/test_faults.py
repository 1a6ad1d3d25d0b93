"""Whatever ends one rank ends the whole job, soon, with a code and a line that name it."""

import re
import time

import pytest

from tests.launching import mlx_dist, program

PROMPT = "one two three four five six seven eight nine ten eleven twelve"
CODE = {"kill": 137, "exit": 86, "raise": 86}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("where", ["load", "prefill", "decode"])
@pytest.mark.parametrize("kind", ["kill", "exit", "raise"])
def test_a_rank_that_ends_ends_the_job(rank, where, kind):
    done = program(
        "faulty",
        *(str(rank), where, kind, "generate", "--prompt", PROMPT, "--prefill-chunk", "4"),
        num_ranks=3,
        timeout_s=30,
    )
    ended = time.time()
    [fault] = re.findall(r"fault at ([\d.]+)", done.err)
    assert ended - float(fault) < 5
    assert done.code == CODE[kind], done.err
    if kind == "kill":
        assert f"process rank {rank} with PID" in done.err
    else:
        what = "SystemExit: 0" if kind == "exit" else "ValueError: a fault that a test made"
        assert f"mlx-dist: rank {rank} (" in done.err
        assert f"ended by {what}" in done.err


def test_a_clean_run_ends_with_0(spmd_ranks):
    done = mlx_dist("generate", "--prompt", "Hello", num_ranks=spmd_ranks)
    assert done.code == 0
    assert "prterun" not in done.err
