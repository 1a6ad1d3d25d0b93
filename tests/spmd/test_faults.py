"""Whatever ends or holds up one rank ends the whole job, soon, with a code and a line that name it.

Before it ends, the first rank tells its clients.
"""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from mlx_dist.cluster.launch import mpirun_command
from tests.launching import PROGRAMS, program
from tests.serving import serving

PROMPT = "one two three four five six seven eight nine ten eleven twelve"
TIMEOUT_S = 1.5
SERVE = ("--heartbeat-timeout-s", str(TIMEOUT_S), "--batching", "fixed:2,4,64")
ENDED = {"raise": "ended by ValueError: a fault that a test made", "exit": "ended by SystemExit: 0"}
# More than is said in the time that a test takes.
LONG = {"model": "model", "prompt": "Once", "max_tokens": 1900, "logit_bias": {"0": -100}}


def faulty(rank, where, kind, num_ranks=3, timeout_s="30"):
    options = ("--prefill-chunk", "4", "--heartbeat-timeout-s", timeout_s)
    done = program(
        "faulty",
        *(str(rank), where, kind, "generate", "--prompt", PROMPT, *options),
        num_ranks=num_ranks,
    )
    ended = time.time()
    faults = re.findall(r"fault at ([\d.]+)", done.err)
    return done, ended - float(faults[-1])


@pytest.mark.parametrize(
    ("rank", "where", "kind", "code"),
    [
        (1, "load", "kill", 137),
        (2, "load", "raise", 86),
        (0, "prefill", "raise", 86),
        (2, "prefill", "_exit", 7),
        (1, "decode", "exit", 86),
    ],
)
def test_a_rank_that_ends_ends_the_job(rank, where, kind, code):
    done, took_s = faulty(rank, where, kind)
    assert took_s < 5
    assert done.code == code, done.err
    if kind in ENDED:
        assert f"mlx-dist: rank {rank} (" in done.err
        assert ENDED[kind] in done.err
    elif kind == "kill":
        assert f"process rank {rank} with PID" in done.err
    else:
        assert f",{rank}]" in done.err, "mpirun names it"


def test_a_rank_that_hangs_in_a_step_is_found():
    """Its thread beats on; the others wait, idle or in a step of their own."""
    done, took_s = faulty(1, "decode", "hang", timeout_s=str(TIMEOUT_S))
    assert 4 * TIMEOUT_S - 0.5 < took_s < 4 * TIMEOUT_S + 5
    assert done.code == 86, done.err
    [line] = done.error_lines
    assert re.search(
        r"error: rank 1 \(.*\) is stuck: computing \(Step of 1 x 1 tokens\) for \d+\.\d s", line
    )


def test_ranks_that_wait_for_each_other_are_found():
    done, took_s = faulty(0, "decode", "skip", timeout_s=str(TIMEOUT_S))
    assert took_s < 4 * TIMEOUT_S + 5
    assert done.code == 86, done.err
    [line] = done.error_lines
    assert "no step has gone forward" in line
    assert len(re.findall(r"rank \d \(\S+\) is waiting", line)) == 3


def test_a_rank_that_never_joins_is_given_up():
    done, took_s = faulty(1, "join", "hang")
    assert took_s < 10
    assert done.code == 137
    assert "error: the mpi fabric has not come up within 2 s" in done.error_lines[0]


@pytest.mark.parametrize(
    ("kind", "rank", "num_ranks"),
    [("KILL", 1, 2), ("KILL", 1, 3), ("KILL", 2, 3), ("STOP", 1, 3), ("STOP", 2, 3)],
)
def test_clients_are_told_before_the_end(kind, rank, num_ranks):
    """A killed rank leaves the first one 200 ms for it, a verdict as long as it takes."""
    ends_with = 137 if kind == "KILL" else 86
    with serving(*SERVE, num_ranks=num_ranks, ends_with=ends_with) as server:
        pids = pids_of(server)
        started = []
        with server.client() as client, ThreadPoolExecutor(10) as pool:
            stream = pool.submit(what_a_stream_ends_with, client, started)
            wait_for(lambda: started)
            answers = [pool.submit(what_an_answer_ends_with, client) for _ in range(9)]
            wait_for(lambda: num_under_way(server) == 10)
            os.kill(pids[rank], getattr(signal, f"SIG{kind}"))
            began_s = time.monotonic()
            error = stream.result()
            assert error.code == "ending", error
            for each in answers:
                error = each.result()
                assert (error.status_code, error.code) == (503, "ending")
                assert error.response.headers["retry-after"] == "2"
            took_s = time.monotonic() - began_s
        assert_gone(pids)
    if kind == "KILL":
        assert took_s < 1
    else:
        assert took_s < TIMEOUT_S + 1
        assert f"error: rank {rank} (" in "".join(server.log)
        assert "is silent for 1." in "".join(server.log)


def test_every_rank_waits_for_the_last_words(tmp_path):
    """mpirun kills all that is left when a rank that it has sent SIGTERM is gone."""
    done = program("last_words", tmp_path, num_ranks=3)
    assert (done.code, done.out) == (137, "last words\n"), done.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_freezes_while_nothing_runs_is_found(rank):
    with serving(*SERVE, num_ranks=3, ends_with=86) as server:
        pids = pids_of(server)
        os.kill(pids[rank], signal.SIGSTOP)
        began_s = time.monotonic()
        assert server.process.wait(10) == 86
        took_s = time.monotonic() - began_s
        assert_gone(pids)
    assert took_s < TIMEOUT_S + 2, "a second to notice, another to end"
    log = "".join(server.log)
    if rank == 0:
        assert re.search(r"error: rank \d \(.*\) ends: nothing was heard of rank 0 \(", log)
    else:
        assert re.search(
            r"error: rank 1 \(.*\) is silent for 1.\d s; last it was (starting|idle)", log
        )


def test_a_failure_of_the_first_rank_itself_is_told(tmp_path):
    """An exception in the middle of a step, in the thread of the engine."""
    python = [str(PROGRAMS / "faulty.py"), "0", "decode", "raise", "serve", "--port", "0", *SERVE]
    with serving(command=mpirun_command(3, None, python), ends_with=86) as server:
        with server.client() as client:
            error = what_a_stream_ends_with(client, [])
        assert error.code == "ending"
    assert "ended by ValueError: a fault that a test made" in "".join(server.log)


def test_a_server_that_is_told_to_end_tells_its_clients():
    with serving(*SERVE, num_ranks=3, ends_with=1) as server:
        started = []
        with server.client() as client, ThreadPoolExecutor() as pool:
            stream = pool.submit(what_a_stream_ends_with, client, started)
            wait_for(lambda: started)
            server.process.terminate()
            assert stream.result().code == "ending"


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def num_under_way(server):
    """Eight of them in a sequence's place, the others in the queue."""
    return server.stats["num_active"] + server.stats["num_waiting"]


def pids_of(server):
    """The processes of the ranks, in order."""
    found = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, found.stdout.split()))


def assert_gone(pids):
    deadline = time.monotonic() + 5
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} are left"
        time.sleep(0.05)


def _is_alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def what_a_stream_ends_with(client, is_running):
    try:
        with client.completions.create(stream=True, **LONG) as stream:
            for chunk in stream:
                is_running.append(chunk)
    except openai.APIError as error:
        return error
    raise AssertionError("it ended")


def what_an_answer_ends_with(client):
    try:
        return client.completions.create(**LONG)
    except openai.APIError as error:
        return error
