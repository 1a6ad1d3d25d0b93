"""One language model on 2 to 8 machines: an MPI program for Apple's MLX."""

import os

__version__ = "0.1.0"

# transformers says on import that it found no PyTorch; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
