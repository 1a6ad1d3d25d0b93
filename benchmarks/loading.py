"""How fast ranks read their shards, beside what the machine can do at best.

    python -m benchmarks.loading [--rounds 5]

A random float32 model of 0.5 GB, which the system has in its cache. The ranks of each number of
ranks read at the same time, in turn with as many `dd`, each of the bytes of one rank: once to
/dev/null in blocks of 1 MB, which stay in the processor's cache, and once in one block, which
keeps what it reads as a rank must. Memory that a process touches for the first time is cleared by
the system and brought in page by page; that is what the two differ by. Of more `dd` than cores, one
that starts second keeps a core to itself: rounds begin with another one each. Rates are the medians
of all rounds, in GB/s. `one by one` reads a tensor when the one before is there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

_RANKS = (1, 2, 3)
_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 120

_MAKE = """
import sys, pathlib
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
from benchmarks.random_model import write_random_model
write_random_model(pathlib.Path(sys.argv[1]))
"""

# A rank as far as loading goes: it says that it is ready, and begins when it is told to.
_RANK = """
import json, sys, time
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
from mlx_dist.cluster.placement import even_counts
from mlx_dist.config import Dtype
from mlx_dist.model import weights
from mlx_dist.model.files import find_model
folder, rank, num_ranks, ahead = sys.argv[1], *map(int, sys.argv[2:])
weights._AHEAD_BYTES = ahead if ahead >= 0 else weights._AHEAD_BYTES
files = find_model(folder)
counts = even_counts(files.config["num_hidden_layers"], num_ranks)
start = sum(counts[:rank])
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
stage = weights.open_stage(files, start, start + counts[rank], Dtype.auto)
built = time.perf_counter()
for _ in stage.read():
    pass
done = time.perf_counter()
print(json.dumps({"bytes": stage.num_bytes, "build_s": built - begun, "read_s": done - built}))
"""


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _output(process: subprocess.Popen[str], said: str = "") -> tuple[str, str]:
    out, err = process.communicate(said, timeout=_TIMEOUT_S)
    if process.returncode:
        sys.exit(f"{process.args!r} ended with {process.returncode}:\n{err}")
    return out, err


def load(model: Path, num_ranks: int, ahead_bytes: int = -1) -> list[dict[str, Any]]:
    """Each rank's bytes, and the seconds to build the model and to read them, all at once.

    `ahead_bytes` below 0 is what ranks do by themselves.
    """
    ranks = [
        _start([sys.executable, "-c", _RANK, *map(str, (model, rank, num_ranks, ahead_bytes))])
        for rank in range(num_ranks)
    ]
    for process in ranks:
        assert process.stdout is not None
        process.stdout.readline()
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(_output(process)[0]) for process in ranks]


def dd_s(file: Path, sizes: Sequence[int], keeps: bool, first: int) -> list[float]:
    """Seconds that `dd` of so many bytes each takes by its own account, all at once.

    They start in order, beginning with `first`.
    """
    jobs: dict[int, subprocess.Popen[str]] = {}
    starts = [0, *accumulate(sizes)]
    for i in (*range(first, len(sizes)), *range(first)):
        block = sizes[i] if keeps else _BLOCK_BYTES
        skipped = 0 if keeps else starts[i] // block
        place = [f"skip={skipped}", f"count={sizes[i] // block}"]
        jobs[i] = _start(["dd", f"if={file}", "of=/dev/null", f"bs={block}", *place])
    took = []
    for i in range(len(sizes)):
        _, err = _output(jobs[i])
        # GNU: "…copied, 0.1 s, 5 GB/s"; BSD: "…transferred in 0.1 secs (5 bytes/sec)".
        [seconds] = re.findall(r"(?:copied,|transferred in) ([\d.e-]+) s", err)
        took.append(float(seconds))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    num_rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        _output(_start([sys.executable, "-c", _MAKE, folder]))
        model, file = Path(folder), Path(folder) / "model.safetensors"
        print("ranks rank     MB | dd to /dev/null  dd in one block | one by one  load | ratios")
        for num_ranks in _RANKS:
            sizes = [rank["bytes"] for rank in load(model, num_ranks)]
            rounds = []
            for number in range(num_rounds):
                first = number % num_ranks
                single = [rank["read_s"] for rank in load(model, num_ranks, 0)]
                several = [rank["read_s"] for rank in load(model, num_ranks)]
                dd = [dd_s(file, sizes, keeps, first) for keeps in (False, True)]
                rounds.append((*dd, single, several))
            for rank, size in enumerate(sizes):
                seconds = [[column[rank] for column in row] for row in rounds]
                rates = [size / 1e9 / median(column) for column in zip(*seconds, strict=True)]
                away, kept, single_rate, rate = rates
                print(
                    f"{num_ranks:5} {rank:4} {size / 1e6:6.0f} | {away:15.2f} {kept:16.2f} | "
                    f"{single_rate:10.2f} {rate:5.2f} | {rate / away:.2f} {rate / kept:.2f}"
                )


if __name__ == "__main__":
    main()
