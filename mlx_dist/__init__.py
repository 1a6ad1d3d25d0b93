"""One language model on 2 to 8 machines: an MPI program for Apple's MLX."""

__version__ = "0.1.0"
