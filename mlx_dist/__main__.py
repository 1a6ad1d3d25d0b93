"""What mpirun and the `mlx-dist` command start."""

from __future__ import annotations

import sys

from mlx_dist.cli import app
from mlx_dist.cluster import launch
from mlx_dist.errors import AgreedError, ConfigError, MlxDistError, PlacementError, RequestError

_SAME_ON_ALL_RANKS = (AgreedError, ConfigError, PlacementError, RequestError)


def main() -> None:
    """Run the command line. An error that a user can put right is one line and exit code 1."""
    try:
        app()
    except MlxDistError as error:
        # What is wrong on all ranks, one of them says: what they agreed on, or were all given.
        if launch.is_first_rank() or not isinstance(error, _SAME_ON_ALL_RANKS):
            print(f"mlx-dist: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
