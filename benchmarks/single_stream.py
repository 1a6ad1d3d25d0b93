"""One stream on two ranks beside one mlx-lm process, and what a hop costs.

    python -m benchmarks.single_stream [--rounds 3] [--tokens 48]

A random float32 model of about 130 M parameters, one BLAS thread per process. The two take turns,
round by round, so that a noisy machine is noisy for both. A pipeline of two ranks does the work of
one process in turn, so the ratio of their speeds is 1 less what the hops cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from mlx_dist.cluster.launch import mpirun_command

_ONE_PROCESS = """
import sys
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
import mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1])
tokenizer._eos_token_ids = set()
for _ in range(2):
    *_, last = mlx_lm.stream_generate(model, tokenizer, [1], max_tokens=int(sys.argv[2]))
# mlx-lm divides all tokens by the time since the first.
print(last.generation_tps * (last.generation_tokens - 1) / last.generation_tokens)
"""

_PING_PONG = """
import sys, time
import mpi4py
from mpi4py import MPI
world, message = MPI.COMM_WORLD, bytearray(int(sys.argv[1]))
times = []
for _ in range(2000):
    start = time.perf_counter()
    if world.rank == 0:
        world.Send(message, 1)
        world.Recv(message, 1)
    else:
        world.Recv(message, 0)
        world.Send(message, 0)
    times.append(time.perf_counter() - start)
if world.rank == 0:
    print(sorted(times)[len(times) // 2] / 2 * 1e6)
"""

_HOPS = """
import sys, time
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
import mlx.core as mx
from mlx_dist.cluster.world import join
from mlx_dist.config import Fabric
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import Tokens
hidden = mx.zeros((1, 1, int(sys.argv[1])))
mx.eval(hidden)
times = []
with join(Fabric.mpi) as world:
    transport = Transport(world, [[rank] for rank in range(world.size)])
    for _ in range(200):
        if world.is_leader:
            time.sleep(0.02)  # The other rank waits as long as a stage computes.
            start = time.perf_counter()
            transport.send_hidden(hidden, [])
            transport.receive_tokens()
            times.append(time.perf_counter() - start)
        else:
            transport.await_hidden(transport.promise_hidden(hidden.shape, hidden.dtype))
            transport.send_tokens(Tokens(0, [1]))
if times:
    print(sorted(times)[len(times) // 2] * 1e6)
"""

_ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1"}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def one_process(model: Path, tokens: int) -> float:
    """Tokens a second of mlx-lm's stream_generate, second run of two."""
    return float(_output([sys.executable, "-c", _ONE_PROCESS, str(model), str(tokens)]))


def two_ranks(model: Path, tokens: int) -> float:
    """Tokens a second of mlx-dist on two ranks, second run of two."""
    command = [sys.executable, "-m", "mlx_dist", "bench", "-n", "2", "--model", str(model)]
    command += ["-p", "1", "-g", str(tokens), "-r", "1", "--json"]
    return float(json.loads(_output(command))["mean"]["generation_tokens_per_s"])


def hops_us(hidden_size: int) -> float:
    """Microseconds that a token's two hops take: hidden state there, token id back."""
    return float(_output(mpirun_command(2, None, ["-c", _HOPS, str(hidden_size)])))


def ping_pong_us(num_bytes: int) -> float:
    """Microseconds one way for `num_bytes` between two ranks by mpi4py alone."""
    return float(_output(mpirun_command(2, None, ["-c", _PING_PONG, str(num_bytes)])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        make = "import sys, pathlib; from mlx_dist.cluster.blas import preload_blas; "
        make += "preload_blas(1); from benchmarks.random_model import write_random_model; "
        make += "write_random_model(pathlib.Path(sys.argv[1]))"
        _output([sys.executable, "-c", make, folder])
        hidden_size = json.loads((model / "config.json").read_text())["hidden_size"]
        singles, doubles = [], []
        for i in range(1, options.rounds + 1):
            singles.append(one_process(model, options.tokens))
            doubles.append(two_ranks(model, options.tokens))
            print(f"round {i}: one process {singles[-1]:.2f}, two ranks {doubles[-1]:.2f} tokens/s")
    ratio = median(b / a for a, b in zip(singles, doubles, strict=True))
    print(f"two ranks over one process: {ratio:.3f} (median of {options.rounds} rounds)")
    print(f"a token's two hops: {hops_us(hidden_size):.0f} us")
    print(f"raw MPI one way, {4 * hidden_size} bytes: {ping_pong_us(4 * hidden_size):.1f} us")


if __name__ == "__main__":
    main()
