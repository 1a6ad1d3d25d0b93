"""The last rank is killed once all watch for their end; the first one has 150 ms of last words."""

import os
import signal
import sys
import time
from pathlib import Path

from mlx_dist.cluster import mpi
from mlx_dist.cluster.ending import Ending, hold_back_sigterm


def say():
    time.sleep(0.15)
    print("last words", flush=True)


hold_back_sigterm()
rank, met = int(os.environ["OMPI_COMM_WORLD_RANK"]), Path(sys.argv[1])
ending = Ending(None)
if rank == 0:
    ending.before(say)
ending.watch()
(met / str(rank)).touch()
while len(list(met.iterdir())) < mpi.world_size():
    time.sleep(0.01)
if rank == mpi.world_size() - 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(30)
