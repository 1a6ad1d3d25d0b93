"""Runs `mlx-dist ARGUMENTS` with a fault in one rank: faulty.py RANK WHERE KIND ARGUMENTS.

WHERE is load, prefill or decode; KIND is kill, exit or raise. Says on stderr when it happens.
"""

import os
import signal
import sys
import time

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

from mlx_dist.__main__ import main
from mlx_dist.cli import options
from mlx_dist.engine import session
from mlx_dist.engine.program import Rank

RANK, WHERE, KIND = int(sys.argv[1]), sys.argv[2], sys.argv[3]
# The first plan opens a slot; the second is a chunk of the prompt.
PLAN = {"prefill": 2, "decode": 8}


def fail(*_args):
    print(f"fault at {time.time()}", file=sys.stderr, flush=True)
    match KIND:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(0)
        case "raise":
            raise ValueError("a fault that a test made")


def failing(execute):
    count = 0

    def counted(self, plan):
        nonlocal count
        count += 1
        if count == PLAN[WHERE]:
            fail()
        return execute(self, plan)

    return counted


if int(os.environ["OMPI_COMM_WORLD_RANK"]) == RANK:
    if WHERE == "load":
        session.load_stage = fail
    else:
        Rank.execute = failing(Rank.execute)
# It is open already.
options.preload_blas = lambda _num_threads: "test"
sys.argv[1:] = sys.argv[4:]
main()
