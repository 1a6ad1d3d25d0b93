"""One language model on 2 to 8 machines: an MPI program for Apple's MLX."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM as LLM

__version__ = "0.1.0"

# transformers says on import that it found no PyTorch; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """`from mlx_dist import LLM`, which opens the BLAS before the first import of MLX."""
    if name != "LLM":
        raise AttributeError(f"module 'mlx_dist' has no attribute {name!r}")
    from mlx_dist.cluster import blas, ending, launch

    ending.hold_back_sigterm()
    blas.preload_blas(launch.threads_per_rank())
    from mlx_dist.serve.llm import LLM

    return LLM
