"""Runs an `mlx-dist` command with a model of each rank's own.

own_model.py MODEL_OF_RANK_0 MODEL_OF_RANK_1 ... -- COMMAND ARGUMENTS
"""

import os
import sys

from mlx_dist.__main__ import main

split = sys.argv.index("--")
model = sys.argv[1 + int(os.environ["OMPI_COMM_WORLD_RANK"])]
sys.argv[1:] = [*sys.argv[split + 1 :], "--model", model]
main()
