"""Runs `mlx-dist verify` where no rank has room for all layers."""

import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

from mlx_dist.__main__ import main
from mlx_dist.cli import options
from mlx_dist.engine import session
from mlx_dist.errors import ModelError

load_stage = session.load_stage


def load_if_part(files, start, end, *arguments):
    if (start, end) == (0, 6):
        raise ModelError("no room")
    return load_stage(files, start, end, *arguments)


session.load_stage = load_if_part
# It is open already.
options.preload_blas = lambda _num_threads: "test"
sys.argv[1:] = ["verify"]
main()
