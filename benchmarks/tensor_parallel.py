"""Two ranks that share every layer, beside one, and beside mlx-lm's own tensor parallelism.

    python -m benchmarks.tensor_parallel [--rounds 3] [--tokens 48] [--prompt 512] [--no-servers]

A random float32 model of about 130 M parameters, one BLAS thread per process; all take turns,
round by round, so that a noisy machine is noisy for all. Among them are two ranks that never add up
what they compute: no way to add it up could be faster on this machine. Then what a layer's sum
costs: one hidden vector, added up over 2 and 3 ranks by a bare call, and by the call as a layer
makes it. At last the two servers, which have one stream each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.load import Prompts, closed_loop
from benchmarks.servers import KINDS, running, write_model
from mlx_dist.cluster.launch import mpirun_command

_MLX_LM = """
import sys
from mlx_dist.cluster import mpi
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
import mlx.core as mx, mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1], lazy=True)
rank = 0
if mpi.world_size() > 1:
    mpi.prepare()
    group = mx.distributed.init(strict=True, backend="mpi")
    rank = group.rank()
    model.shard(group)
mx.eval(model.parameters())
tokenizer._eos_token_ids = set()
prompt, tokens = [1] * int(sys.argv[2]), int(sys.argv[3])
for _ in range(2):
    *_, last = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=tokens)
if rank == 0:
    # mlx-lm divides all tokens by the time since the first.
    print(last.prompt_tps, last.generation_tps * (tokens - 1) / tokens)
"""

_SUMS = """
import sys, time
import mlx.core as mx
from mlx_dist.cluster.world import join
from mlx_dist.config import Fabric
with join(Fabric(sys.argv[1])) as world:
    group = world.tensor_group([range(world.size)])
    vector = mx.zeros((1, 1, int(sys.argv[2])))
    def bare():
        total = vector
        for _ in range(24):
            total = mx.distributed.all_sum(total, group=world.group)
        mx.eval(total)
    def ours():
        total = vector
        for _ in range(24):
            total = group.sum(total)
        mx.eval(total)
    for measured in (bare, ours):
        times = []
        for _ in range(int(sys.argv[3])):
            start = time.perf_counter()
            measured()
            times.append((time.perf_counter() - start) / 24)
        if world.is_leader:
            print(sorted(times)[len(times) // 2] * 1e6)
"""

_UNSUMMED = """
from mlx_dist.cluster import ending
ending.hold_back_sigterm()
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
from mlx_dist.__main__ import main
from mlx_dist.cluster.collective import TensorGroup
TensorGroup.sum = lambda self, array: array
main()
"""

_ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def ours(model: Path, prompt: int, tokens: int, *arguments: str) -> tuple[float, float]:
    """Tokens a second of prompt and answer."""
    command = [sys.executable, "-m", "mlx_dist", *_bench(model, prompt, tokens), *arguments]
    return _rates(_output(command))


def unsummed(model: Path, prompt: int, tokens: int) -> tuple[float, float]:
    """As `ours`, of two ranks that compute their slices and never wait for each other in a layer.

    What they say means nothing.
    """
    script = ["-c", _UNSUMMED, *_bench(model, prompt, tokens), "--parallel", "tensor"]
    return _rates(_output(mpirun_command(2, None, script)))


def _bench(model: Path, prompt: int, tokens: int) -> list[str]:
    command = ["bench", "--model", str(model), "-p", str(prompt), "-g", str(tokens)]
    return [*command, "-r", "1", "--json"]


def _rates(said: str) -> tuple[float, float]:
    mean = json.loads(said)["mean"]
    return float(mean["prompt_tokens_per_s"]), float(mean["generation_tokens_per_s"])


def mlx_lm(model: Path, prompt: int, tokens: int, num_ranks: int) -> tuple[float, float]:
    """As `ours`, of mlx-lm's own code: one process, or its slices over MPI."""
    script = ["-c", _MLX_LM, str(model), str(prompt), str(tokens)]
    command = [sys.executable, *script]
    if num_ranks > 1:
        command = mpirun_command(num_ranks, None, script)
    prompt_rate, rate = _output(command).split()
    return float(prompt_rate), float(rate)


def sums_us(fabric: str, num_ranks: int, hidden_size: int) -> tuple[float, float]:
    """Microseconds of a sum of one hidden vector: a bare call, and a layer's."""
    repeats = 30 if fabric == "ring" and num_ranks > 2 else 300
    script = ["-c", _SUMS, fabric, str(hidden_size), str(repeats)]
    bare, layer = _output(mpirun_command(num_ranks, None, script)).split()
    return float(bare), float(layer)


def served(kind: str, model: Path, scratch: Path) -> float:
    """Tokens a second that a server's single stream gets."""
    with running(KINDS[kind], model, scratch) as server:
        loads = [
            asyncio.run(
                closed_loop(
                    server.endpoint,
                    Prompts(seed),
                    concurrency=1,
                    requests_per_worker=3,
                    prompt_words=32,
                    max_tokens=32,
                )
            )
            for seed in range(2)
        ]
    return loads[-1].tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--no-servers", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        write_model(model)
        _streams(model, options)
        hidden_size = json.loads((model / "config.json").read_text())["hidden_size"]
        print(f"\na sum of {hidden_size} floats, microseconds: a bare call, and a layer's")
        for fabric in ("mpi", "ring"):
            for num_ranks in (2, 3):
                bare, layer = sums_us(fabric, num_ranks, hidden_size)
                print(f"{num_ranks} ranks over {fabric}: {bare:.1f}, {layer:.1f}")
        if not options.no_servers:
            _servers(model, Path(name))


def _streams(model: Path, options: argparse.Namespace) -> None:
    prompt, tokens = options.prompt, options.tokens
    two = ("-n", "2", "--parallel")
    rows: dict[str, Callable[[], tuple[float, float]]] = {
        "mlx-lm, one process": lambda: mlx_lm(model, prompt, tokens, 1),
        "one rank": lambda: ours(model, prompt, tokens),
        "two ranks, pipeline": lambda: ours(model, prompt, tokens, *two, "pipeline"),
        "two ranks, tensor over mpi": lambda: ours(model, prompt, tokens, *two, "tensor"),
        "two ranks, the same without sums": lambda: unsummed(model, prompt, tokens),
        "two ranks, tensor over ring": lambda: ours(
            model, prompt, tokens, *two, "tensor", "--fabric", "ring"
        ),
        "mlx-lm's slices, two ranks over mpi": lambda: mlx_lm(model, prompt, tokens, 2),
    }
    rates: dict[str, list[tuple[float, float]]] = {title: [] for title in rows}
    for _ in range(options.rounds):
        for title, measure in rows.items():
            rates[title].append(measure())
    singles = rates["one rank"]
    print(f"| | prompt of {prompt} | times one rank | answer | times one rank |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for title, measured in rates.items():
        cells = [title]
        for i in range(2):
            ratio = median(a[i] / b[i] for a, b in zip(measured, singles, strict=True))
            cells += [f"{median(each[i] for each in measured):.1f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")


def _servers(model: Path, scratch: Path) -> None:
    ours_rate, peer_rate = (served(kind, model, scratch) for kind in ("ours_tensor", "tensor"))
    print(
        f"\nserved, one stream: mlx-dist's slices over mpi {ours_rate:.1f} tokens/s, mlx-lm's over "
        f"ring {peer_rate:.1f}: {ours_rate / peer_rate:.1f} times"
    )


if __name__ == "__main__":
    main()
