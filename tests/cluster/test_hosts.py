"""The program on hosts with names and addresses of their own, over links with a delay."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_dist.cluster.launch import mpirun_command
from mlx_dist.demo import MODEL_DIR
from tests.cluster.hosts import HOSTS
from tests.launching import PROGRAMS, Done, mlx_dist

PROMPT = ("--prompt", "What is a rank?", "--json")


@pytest.fixture(scope="module")
def alone():
    return mlx_dist("generate", *PROMPT).json()


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_three_hosts_answer_as_one(cluster, alone, fabric):
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


def test_a_host_that_is_cut_off_is_named_and_ends_itself(cluster, tmp_path):
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(_answer_in_danger, cluster, tmp_path / "decoding", timeout_s=2)
        _wait_for(tmp_path / "decoding")
        cluster.faults(down=["mxh3"])
        cut = time.monotonic()
        try:
            done = answer.result()
            assert time.monotonic() - cut < 10
            while left := [line for host in HOSTS for line in _of_a_job(cluster, host)]:
                assert time.monotonic() - cut < 10, left
                time.sleep(0.2)
        finally:
            cluster.faults()
    # Of a network that is cut mpirun does not recover; it is killed.
    assert done.code == 137, done.err
    assert "error: rank 2 (mxh3) is silent for 2." in done.err


def test_a_cut_that_heals_changes_nothing_but_the_time(cluster, alone, tmp_path):
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(_answer_in_danger, cluster, tmp_path / "decoding", timeout_s=10)
        _wait_for(tmp_path / "decoding")
        cluster.faults(down=["mxh2"])
        time.sleep(2)
        cluster.faults()
        assert answer.result().json()["text"] == alone["text"]


def _answer_in_danger(cluster, sign, timeout_s):
    """An answer to the prompt from three hosts; when it is half there, the file `sign` is."""
    python = [str(PROGRAMS / "faulty.py"), "1", "decode", str(sign)]
    python += ["generate", *PROMPT, "--heartbeat-timeout-s", str(timeout_s)]
    command = mpirun_command(3, cluster.hostfile, python)
    # Into files: what mpirun leaves behind on the way to a lost host would keep a pipe open.
    into = ["bash", "-c", 'exec "${@:2}" >"$1.out" 2>"$1.err"', "_", str(sign)]
    code = cluster.on("mxh1", *into, *command, timeout_s=100).code
    return Done(code, *(sign.with_suffix(kind).read_text() for kind in (".out", ".err")))


def _of_a_job(cluster, host):
    return [line for line in cluster.processes(host) if "faulty.py" in line or "prted" in line]


def _wait_for(path):
    deadline = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
