"""Runs `mlx-dist ARGUMENTS` with a fault in one rank: faulty.py RANK WHERE KIND ARGUMENTS.

WHERE is join, load, prefill or decode; KIND is kill, exit, _exit, raise, hang (for ever), skip
(what is due) or the path of a file, which is written in a slow step.
Says on stderr when it happens.
"""

import os
import signal
import sys
import time
from pathlib import Path

from mlx_dist.cluster import ending
from mlx_dist.cluster.blas import preload_blas

ending.hold_back_sigterm()
preload_blas(1)

from mlx_dist.__main__ import main
from mlx_dist.cli import options
from mlx_dist.cluster import world
from mlx_dist.engine import session
from mlx_dist.engine.program import Rank

RANK, WHERE, KIND = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# Of a prompt in chunks of four tokens.
STEP = {"prefill": 2, "decode": 12}


def fail(*_args):
    print(f"fault at {time.time()}", file=sys.stderr, flush=True)
    match KIND:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(0)
        case "_exit":
            os._exit(7)
        case "raise":
            raise ValueError("a fault that a test made")
        case "hang":
            time.sleep(1000)
        case path if "/" in path:
            Path(path).touch()
            time.sleep(0.5)  # For whoever waits for it to do something meanwhile.


def failing(run_step):
    count = 0

    def counted(self, step):
        nonlocal count
        count += 1
        if count != STEP[WHERE]:
            return run_step(self, step)
        fail()
        return run_step(self, step) if "/" in KIND else None

    return counted


if WHERE == "join":
    world.JOIN_S = 2
if int(os.environ["OMPI_COMM_WORLD_RANK"]) == RANK:
    if WHERE == "join":
        world._join_under_mpirun = fail
    elif WHERE == "load":
        session.load_stage = fail
    else:
        Rank._step = failing(Rank._step)
# It is open already.
options.preload_blas = lambda _num_threads: "test"
sys.argv[1:] = sys.argv[4:]
main()
