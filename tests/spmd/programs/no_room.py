"""Runs `mlx-dist doctor` where the leader's host has no room for the model beside its stage."""

import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

from mlx_dist.__main__ import main
from mlx_dist.doctor import prompts

prompts.available_bytes = lambda: 1000
sys.argv[1:] = ["doctor", "--port", "0", "--quick", "--json"]
main()
