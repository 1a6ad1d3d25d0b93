"""Run on every host: prints which version of a model's files is there, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlx_dist.errors import ModelError


def main() -> None:
    """The model's folder is the argument. A folder that is not there is no fault and has none."""
    name = sys.argv[1]
    found: dict[str, str | None] = {"fingerprint": None, "fault": None}
    if Path(name).exists():
        # MLX comes with it, which takes its time.
        from mlx_dist.model.files import find_model

        try:
            found["fingerprint"] = find_model(name).fingerprint()
        except ModelError as error:
            found["fault"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
