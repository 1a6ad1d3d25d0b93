"""A policy belongs to a thread, so each of these has one of its own."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_dist.cluster.cores import become_batch_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these policies")


def policies_after(chosen: int | None) -> tuple[int, int]:
    """Of a thread that has called it, and of one that this starts."""
    if chosen is not None:
        os.sched_setscheduler(0, chosen, os.sched_param(0))
    become_batch_job()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(os.sched_getscheduler, 0).result()
    return os.sched_getscheduler(0), started


def test_threads_that_are_started_are_batch_jobs_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(policies_after, None).result() == (os.SCHED_BATCH, os.SCHED_BATCH)


def test_a_policy_that_was_chosen_stays():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(policies_after, os.SCHED_IDLE).result() == (os.SCHED_IDLE, os.SCHED_IDLE)


@pytest.mark.parametrize("call", ["sched_getscheduler", "sched_setscheduler"])
def test_a_container_may_forbid_it(call, monkeypatch):
    def refuse(*_):
        raise PermissionError(f"{call} is not permitted")

    before = os.sched_getscheduler(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        become_batch_job()
    assert os.sched_getscheduler(0) == before
