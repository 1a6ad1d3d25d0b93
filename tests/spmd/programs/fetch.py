"""Loads one stage of a model in this process alone: fetch.py MODEL START,END"""

import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

from mlx_dist.config import Dtype
from mlx_dist.model.files import find_model
from mlx_dist.model.weights import load_stage

start, end = map(int, sys.argv[2].split(","))
loaded = load_stage(find_model(sys.argv[1]), start, end, Dtype.auto, lambda _done, _total: None)
print(loaded.weights_bytes)
