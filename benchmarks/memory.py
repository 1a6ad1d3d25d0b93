"""What each rank's memory peaks at while it loads and runs, over an idle process.

    python -m benchmarks.memory [--ranks 3]

An idle process has everything imported and the embedded model loaded. Allowed is the rank's
shard, the largest tensor of the model, and 15% of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dist.demo import MODEL_DIR
from mlx_dist.model.files import find_model


@dataclass(frozen=True, slots=True)
class Use:
    """One rank's peak over an idle rank, and what it may be."""

    rank: int
    shard_bytes: int
    over_idle_bytes: int
    allowed_bytes: int


def _generate(model: Path, ranks: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "mlx_dist", "generate", "-n", str(ranks), "--json", "--raw"]
    command += ["--prompt", "Hello", "--max-tokens", "4", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    result: list[dict[str, Any]] = json.loads(done.stdout)["ranks"]
    return result


def measure(model: Path, ranks: int) -> list[Use]:
    """Run `model` on `ranks` ranks and the embedded model as the idle ones."""
    [file] = find_model(str(model)).weights
    offsets = [tensor["data_offsets"] for tensor in file.tensors().values()]
    largest_bytes = max(end - start for start, end in offsets)
    idle = _generate(MODEL_DIR, ranks)
    return [
        Use(
            rank=loaded["rank"],
            shard_bytes=loaded["weights_bytes"],
            over_idle_bytes=loaded["peak_rss_bytes"] - rank["peak_rss_bytes"],
            allowed_bytes=int(1.15 * (loaded["weights_bytes"] + largest_bytes)),
        )
        for rank, loaded in zip(idle, _generate(model, ranks), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.random_model import write_random_model

        model = write_random_model(Path(folder))
        for use in measure(model, ranks):
            print(
                f"rank {use.rank}: shard {use.shard_bytes / 1e6:.0f} MB, peak over idle "
                f"{use.over_idle_bytes / 1e6:.0f} MB, allowed {use.allowed_bytes / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
