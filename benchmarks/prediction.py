"""What is predicted beside what is achieved, on the ranks of this machine.

    python -m benchmarks.prediction [--ranks 1,2,3,tensor=2] [--streams 1,16] [--rounds 3]
        [--json FILE] [--write]

A random float32 model of about 130 M parameters, one BLAS thread per rank. `mlx-dist bench` first
measures the machine, all ranks at the same time, for they share its cores. Then it predicts, and
runs the model: prompts of 32 tokens, all at once, and 32 tokens of answer to each. The table has
the medians of the rounds. More ranks than cores take turns on them, which no prediction knows.
With tensor=2, two ranks share every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.pages import put
from benchmarks.servers import write_model
from mlx_dist.cluster.launch import threads_per_rank

PROMPT_TOKENS = 32
GENERATION_TOKENS = 32
_TIMEOUT_S = 600
# What a prediction may be off by, where every rank has a core.
_BAR = 0.15


@dataclass(frozen=True, slots=True)
class Round:
    """One start of the program: tokens a second, and seconds to the first token of all streams."""

    ranks: str
    num_streams: int
    predicted: float
    achieved: float
    predicted_ttft_s: float
    achieved_ttft_s: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.achieved


def run(model: Path, ranks: str, num_streams: int) -> Round:
    """Predict and measure once, with a fresh look at the machine."""
    command = [sys.executable, "-m", "mlx_dist", "bench", "-n", str(number_of(ranks))]
    command += ["--parallel", "pipeline" if ranks.isdecimal() else "tensor"]
    command += ["--model", str(model), "--streams", str(num_streams), "-r", "2", "--json"]
    command += ["-p", str(PROMPT_TOKENS), "-g", str(GENERATION_TOKENS)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    result = json.loads(done.stdout)
    predicted, achieved = result["predicted"], result["mean"]
    return Round(
        ranks,
        num_streams,
        predicted["generation_tokens_per_s"],
        achieved["generation_tokens_per_s"],
        predicted["ttft_s"],
        achieved["ttft_s"],
    )


def number_of(ranks: str) -> int:
    """How many ranks "3" or "tensor=2" are."""
    return int(ranks.rpartition("=")[2])


def table(rounds: Sequence[Round], num_cores: int) -> str:
    """Medians of predictions, achievements and their ratios, in Markdown."""
    rows = ["ranks | streams | predicted, tokens/s | achieved | ratio | within 15% | "]
    rows[0] += "first token, predicted | achieved"
    rows.append("---: | " * 7 + "---:")
    for key in dict.fromkeys((r.ranks, r.num_streams) for r in rounds):
        same = [r for r in rounds if (r.ranks, r.num_streams) == key]
        ratio = median(r.ratio for r in same)
        within = "yes" if abs(ratio - 1) <= _BAR else "no"
        cells = [
            *map(str, key),
            f"{median(r.predicted for r in same):.1f}",
            f"{median(r.achieved for r in same):.1f}",
            f"{ratio:.2f}",
            within if number_of(key[0]) <= num_cores else "no bar",
            f"{median(r.predicted_ttft_s for r in same):.2f} s",
            f"{median(r.achieved_ttft_s for r in same):.2f} s",
        ]
        rows.append(" | ".join(cells))
    return "\n".join(f"| {row} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,3,tensor=2")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rounds to this file")
    parser.add_argument("--write", action="store_true", help="put the table into docs/plans.md")
    options = parser.parse_args()
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(model)
        for number in range(1, options.rounds + 1):
            for ranks in options.ranks.split(","):
                for num_streams in map(int, options.streams.split(",")):
                    rounds.append(run(model, ranks, num_streams))
                    last = rounds[-1]
                    print(
                        f"round {number}: ranks {ranks}, {num_streams} streams: predicted "
                        f"{last.predicted:.1f}, achieved {last.achieved:.1f} tokens/s",
                        file=sys.stderr,
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in rounds], indent=2))
    # This process is no rank: all cores are its own.
    text = table(rounds, threads_per_rank())
    print(text)
    if options.write:
        put("plans.md", "achieved", "python -m benchmarks.prediction --write", text)


if __name__ == "__main__":
    main()
