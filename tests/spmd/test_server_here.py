"""`mlx-dist cluster` on this machine alone: a server that outlives the command that started it."""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_dist.cluster import jobs
from mlx_dist.cluster.state import ServerRecord, StateFolder
from tests.launching import mlx_dist, run

_SERVE = ("--port", "0", "--batching", "fixed:1,1,64")


@pytest.fixture
def type_(tmp_path):
    """Runs `mlx-dist cluster WORDS` in a folder of its own; afterwards no server is left."""

    def run_one(*words, **options):
        return mlx_dist("cluster", *words, "--state-dir", tmp_path / "s", cwd=tmp_path, **options)

    yield run_one
    assert run_one("down", "--timeout-s", "5").code == 0


def _state(tmp_path):
    return StateFolder(tmp_path / "s")


def test_a_server_is_started_shown_and_stopped(type_, tmp_path):
    key = {"MLX_DIST_API_KEY": "open sesame"}
    done = type_("up", "-n", "2", *_SERVE, env=key)
    assert done.code == 0, done.err
    record = _state(tmp_path).read()
    assert done.out.strip() == record.url
    assert "sesame" not in _state(tmp_path).record_path.read_text()
    assert len(jobs.processes(record.job)) == 4
    status = type_("status", "--json", env=key)
    assert status.code == 0, status.out
    assert [rank["rank"] for rank in json.loads(status.out)["cluster"]["ranks"]] == [0, 1]
    locked_out = type_("status")
    assert locked_out.code == 4
    assert "MLX_DIST_API_KEY" in locked_out.out
    done = type_("down")
    assert (done.code, jobs.processes(record.job)) == (0, {}), done.err
    assert "drained" in type_("logs", "-n", "3").out


def test_of_two_at_the_same_time_one_starts(tmp_path, type_):
    words = [sys.executable, "-m", "mlx_dist", "cluster", "up", "--state-dir", tmp_path / "s"]
    both = [
        subprocess.Popen([*words, *_SERVE], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert any("is at work in" in text or "runs already" in text for text in errors)


def test_a_server_that_does_not_come_up_says_why_and_is_gone(type_, tmp_path):
    done = type_("up", "-n", "2", "--model", "/nowhere")
    assert done.code == 1
    assert "before it was up" in done.error_lines[-1]
    assert "--model /nowhere" in done.error_lines[-1]
    assert _state(tmp_path).read() is None
    done = type_("up", *_SERVE, "--timeout-s", "0.01")
    assert "was not up within 0.01 s and was ended" in done.error_lines[-1]
    assert _state(tmp_path).read() is None


def test_a_mistake_is_told_before_anything_starts(type_, tmp_path):
    assert type_("up", "--no-such-flag").code == 2
    assert "--timeout-s is 0" in type_("up", "--timeout-s", "0").error_lines[0]
    (tmp_path / "mlx-dist.toml").write_text("[cluster]\nnmae = 'x'\n")
    [error] = run([sys.executable, "-m", "mlx_dist", "cluster", "status"], cwd=tmp_path).error_lines
    assert "nmae in [cluster]" in error
    (tmp_path / "mlx-dist.toml").unlink()


def test_a_state_of_before_a_reboot_is_taken_for_what_it_is(type_, tmp_path):
    """Its number belongs to another process by now, which must not be touched."""
    state = _state(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        job, hosts = secrets.token_hex(8), [socket.gethostname()]
        with state.lock():
            state.write(ServerRecord(job, other.pid, time.time(), hosts, [*_SERVE]))
        assert type_("status").code == 3
        assert type_("down").code == 0
        assert other.poll() is None
        other.send_signal(signal.SIGKILL)
    assert not Path(state.record_path).exists()
