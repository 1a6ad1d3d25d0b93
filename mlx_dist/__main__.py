"""What mpirun and the `mlx-dist` command start."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# transformers says on import that it found no PyTorch; only its tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from mlx_dist.cli import app
from mlx_dist.cluster import launch
from mlx_dist.errors import AgreedError, MlxDistError


def main() -> None:
    """Run the command line. An error that a user can put right is one line and exit code 1."""
    try:
        app()
    except MlxDistError as error:
        # All ranks know what they agreed on; one of them says it.
        if launch.is_first_rank() or not isinstance(error, AgreedError):
            print(f"mlx-dist: error: {error}", file=sys.stderr, flush=True)
        _end(1)
    except SystemExit as end:
        if launch.under_a_launcher() and isinstance(end.code, int | None):
            _end(end.code or 0)
        raise


def _end(code: int) -> NoReturn:
    """End with `code` at once: at an ordinary exit MLX would finalize MPI a second time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
