"""How Linux shares a host's cores among the threads of ranks."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def become_batch_job() -> None:
    """Have this thread and those it starts wait for a core, once woken, instead of taking one.

    MLX hands its operations to a thread one by one, more than a thousand in a step. Where ranks
    have a core each, that thread would else interrupt the one that builds what comes next.
    A policy that somebody has chosen stays. Elsewhere than on Linux nothing changes.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # A container may forbid it.
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
