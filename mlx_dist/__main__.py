"""What mpirun and the `mlx-dist` command start."""

from __future__ import annotations

import sys
import time

from mlx_dist.cli import app
from mlx_dist.cluster import ending, launch
from mlx_dist.errors import AgreedError, ConfigError, MlxDistError, PlacementError, RequestError

_FROM_THE_COMMAND_LINE = (ConfigError, PlacementError, RequestError)
_FIRST_RANK_SPEAKS_S = 2.0


def main() -> None:
    """Run the command line. An error that a user can put right is one line and exit code 1."""
    ending.hold_back_sigterm()
    try:
        app()
    except MlxDistError as error:
        # Most likely all ranks have it; the first one's end keeps the others from saying it again.
        if not launch.is_first_rank() and isinstance(error, _FROM_THE_COMMAND_LINE):
            time.sleep(_FIRST_RANK_SPEAKS_S)
        # What the ranks agreed on, the world has said.
        if not isinstance(error, AgreedError):
            print(f"mlx-dist: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
