"""Watching over hosts whose ranks join: what is told of, and what a watchman ends by itself."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from mlx_dist.cluster import jobs
from mlx_dist.cluster.remote import source_of
from mlx_dist.supervise.lookout import Lookout

_TIMEOUT_S = 1.0
_AGENT = """\
#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift 2; done
[[ "$1" == cut.example ]] && exec sleep 60
shift
exec bash -c "$*"
"""


@pytest.fixture(autouse=True)
def agent(monkeypatch, tmp_path):
    script = tmp_path / "ssh_agent"
    script.write_text(_AGENT)
    script.chmod(0o755)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(script))


@pytest.fixture
def process():
    """One of a job of its own, which is the name of its variable."""
    env = os.environ | {jobs.VARIABLES[0]: secrets.token_hex(8)}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        process.job = env[jobs.VARIABLES[0]]
        yield process
        process.kill()


def _told_of(job, hosts, seconds):
    """What a lookout says within so many seconds."""

    async def look():
        told = []
        lookout = Lookout(job, hosts, _TIMEOUT_S, told.append)
        await asyncio.sleep(seconds)
        await lookout.close()
        return told

    return asyncio.run(look())


def test_hosts_that_are_well_are_not_told_of(process):
    assert _told_of(process.job, ["localhost", "far.example"], 3 * _TIMEOUT_S) == []


def test_a_host_that_is_cut_off_is_told_of_in_time():
    [told] = _told_of("a-job", ["localhost", "cut.example"], _TIMEOUT_S + 1)
    assert told == "while ranks join, cut.example is silent for 1 s"


def test_a_process_that_is_stopped_is_told_of(process):
    process.send_signal(signal.SIGSTOP)
    [told] = _told_of(process.job, ["far.example"], _TIMEOUT_S + 1)
    assert told == "while ranks join, far.example has a process that is stopped (sleep 60) for 1 s"


def _watchman(job, lease_s):
    command = [sys.executable, "-c", f"{source_of(jobs)}\nwatch({job!r}, 0.05, {lease_s})"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_watchman_who_hears_nothing_more_ends_the_job(process):
    with _watchman(process.job, 0.5) as watchman:
        assert watchman.stdout.readline() == "well\n"
        end_s = time.monotonic() + 1
        while time.monotonic() < end_s:
            watchman.stdin.write("\n")
            watchman.stdin.flush()
            time.sleep(0.1)
        assert process.poll() is None
        assert process.wait(5) == -signal.SIGKILL
        watchman.stdout.read()


def test_a_watchman_who_is_sent_home_ends_nothing(process):
    with _watchman(process.job, 0.5) as watchman:
        watchman.stdout.readline()
        watchman.stdin.close()
        watchman.stdout.read()
        assert watchman.wait(5) == 0
    time.sleep(0.5)
    assert process.poll() is None
