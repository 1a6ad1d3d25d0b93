"""What a long prompt costs its sender and the others, and what idling costs.

    python -m benchmarks.long_prompts [first-token] [stall] [idle] [--rounds 3]
        [--server ours|ours_tensor|...] [--json FILE]

The model, BLAS and threads of benchmarks.serving; without names, all three are measured. --server
says of which of that benchmark's servers, for first-token one of our own with two ranks.

first-token  time to first token of a 2,048-token prompt on an idle server, at one rank and at two
             in turn, and the ratio (bar 0.58)
stall        8 streams decode on two ranks and a 2,048-token prompt comes: the 99th percentile of
             their token gaps until its first token, over the median gap before (bar 2.5); and
             their median gap while its answer is generated
idle         CPU share of each of two ranks over 60 s without a request (bar 3% of a core), and the
             first token's time after that less that of a server that has just answered (bar 5 ms);
             beside it, what the machine takes longer after the same 60 s for a process that only
             sleeps, and multiplies one row by each of the model's weights when it is asked to
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.load import Completion, Endpoint, Prompts, percentile
from benchmarks.servers import KINDS, Kind, Running, cpu_s, running, write_model

LONG_PROMPT_TOKENS = 2048
NUM_STREAMS = 8
IDLE_S = 60.0
# The streams must outlive the long prompt and its answer; then they are broken off.
_STREAM_TOKENS = 1500
_BEFORE_S = 6.0
_ANSWER_TOKENS = 32
# A short prompt, so that the time is the server's waking and not its work.
_SHORT_PROMPT_TOKENS = 4
_NUM_BUSY = 8

# Answers each line with the seconds of one row's product with each weight.
_PRODUCTS = """
import sys, time
from mlx_dist.cluster.blas import preload_blas
preload_blas(1)
import mlx.core as mx
mx.set_default_device(mx.cpu)
weights = [w for name, w in mx.load(sys.argv[1]).items() if w.ndim == 2 and "embed" not in name]
rows = {w.shape[1]: mx.ones((1, w.shape[1])) for w in weights}
mx.eval(weights, rows)
for line in sys.stdin:
    start = time.perf_counter()
    mx.eval([rows[w.shape[1]] @ w.T for w in weights])
    print(time.perf_counter() - start, flush=True)
"""

Measurement = dict[str, object]


async def _ask(
    endpoint: Endpoint, prompts: Prompts, num_tokens: int, answer_tokens: int = 1
) -> Completion:
    request = await Completion(prompts.take(num_tokens), answer_tokens).run(endpoint)
    if request.error is not None:
        sys.exit(f"a prompt of {num_tokens} tokens failed: {request.error}")
    return request


def _first_token_s(server: Running, prompts: Prompts, num_tokens: int) -> float:
    return asyncio.run(_ask(server.endpoint, prompts, num_tokens)).first_piece_s


def first_token(kind: Kind, model: Path, scratch: Path, rounds: int) -> Measurement:
    """Both servers are up and take turns, so that a noisy machine is noisy for both."""
    prompts = Prompts(1)
    times_s: tuple[list[float], list[float]] = ([], [])
    with (
        running(KINDS["ours1"], model, scratch) as one,
        running(kind, model, scratch) as two,
    ):
        for i in range(rounds + 1):
            for times, server in zip(times_s, (one, two), strict=True):
                taken_s = _first_token_s(server, prompts, LONG_PROMPT_TOKENS)
                if i:  # The first of each is the warm-up.
                    times.append(taken_s)
    one_s, two_s = (median(times) for times in times_s)
    print(
        f"first token of {LONG_PROMPT_TOKENS} tokens: {one_s:.3f} s at one rank, {two_s:.3f} s at "
        f"two; ratio {two_s / one_s:.3f} (bar 0.58)"
    )
    return {"one_rank_s": times_s[0], "two_ranks_s": times_s[1], "ratio": two_s / one_s}


async def _stall_once(endpoint: Endpoint, prompts: Prompts) -> tuple[list[float], ...]:
    """The token gaps of all streams before the long prompt, until its first and its last token."""
    streams = [Completion(prompts.take(32), _STREAM_TOKENS) for _ in range(NUM_STREAMS)]
    tasks = [asyncio.create_task(stream.run(endpoint)) for stream in streams]
    try:
        while any(len(stream.piece_times_s) < 8 for stream in streams):
            await asyncio.sleep(0.05)
        start_s = time.perf_counter()
        await asyncio.sleep(_BEFORE_S)
        long = await _ask(endpoint, prompts, LONG_PROMPT_TOKENS, _ANSWER_TOKENS)
        # The gaps that are open now belong to the long prompt too.
        while any(stream.piece_times_s[-1] < long.ended_s for stream in streams):
            await asyncio.sleep(0.05)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if any(task.done() and not task.cancelled() for task in tasks):
        sys.exit("a stream ended before the long prompt's answer")
    times = [start_s, long.sent_s, long.piece_times_s[0], long.ended_s]
    return tuple(
        [gap for stream in streams for gap in _gaps(stream, *span)] for span in pairwise(times)
    )


def _gaps(stream: Completion, start_s: float, end_s: float) -> list[float]:
    """The gaps that overlap [start_s, end_s)."""
    times = stream.piece_times_s
    return [b - a for a, b in pairwise(times) if a < end_s and b > start_s]


def stall(kind: Kind, model: Path, scratch: Path, rounds: int) -> Measurement:
    prompts = Prompts(2)
    before: list[float] = []
    during: list[float] = []
    beside: list[float] = []
    with running(kind, model, scratch) as server:
        _first_token_s(server, prompts, LONG_PROMPT_TOKENS)
        for _ in range(rounds):
            found = asyncio.run(_stall_once(server.endpoint, prompts))
            for gaps, more in zip((before, during, beside), found, strict=True):
                gaps += more
    usual_s, worst_s, beside_s = median(before), percentile(during, 99), median(beside)
    print(
        f"token gap of {NUM_STREAMS} streams: median {1e3 * usual_s:.0f} ms before, 99% "
        f"{1e3 * worst_s:.0f} ms (median {1e3 * median(during):.0f}) during a "
        f"{LONG_PROMPT_TOKENS}-token prompt; ratio {worst_s / usual_s:.2f} (bar 2.5); median "
        f"{1e3 * beside_s:.0f} ms beside its answer"
    )
    return {
        "median_before_s": usual_s,
        "p99_during_s": worst_s,
        "ratio": worst_s / usual_s,
        "median_beside_s": beside_s,
    }


@contextmanager
def _products(model: Path) -> Iterator[Callable[[], float]]:
    """A process that multiplies when it is called, and answers the seconds of that."""
    command = [sys.executable, "-c", _PRODUCTS, str(model / "model.safetensors")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin as asked, process.stdout as answers:

        def multiply() -> float:
            asked.write("\n")
            asked.flush()
            return float(answers.readline())

        yield multiply
        asked.close()


def idle(kind: Kind, model: Path, scratch: Path, rounds: int) -> Measurement:
    prompts = Prompts(3)
    shares: list[list[float]] = []
    busy_s: tuple[list[float], list[float]] = ([], [])
    woken_s: tuple[list[float], list[float]] = ([], [])
    with running(kind, model, scratch) as server, _products(model) as multiply:
        pids = server.rank_pids()
        asked = [lambda: _first_token_s(server, prompts, _SHORT_PROMPT_TOKENS), multiply]
        for i in range(rounds):
            for ask, times in zip(asked, busy_s, strict=True):
                ask()  # The first comes after a pause.
                times += [ask() for _ in range(_NUM_BUSY)]
            before, start_s = [cpu_s(pid) for pid in pids], time.perf_counter()
            time.sleep(IDLE_S)
            used = [cpu_s(pid) - at_start for pid, at_start in zip(pids, before, strict=True)]
            shares.append([each / (time.perf_counter() - start_s) for each in used])
            # Each is first to wake the machine in every other round.
            for which in (0, 1) if i % 2 else (1, 0):
                woken_s[which].append(asked[which]())
    most = [max(of_rank) for of_rank in zip(*shares, strict=True)]
    extra_ms, machine_ms = (
        1e3 * (median(woken) - median(busy)) for woken, busy in zip(woken_s, busy_s, strict=True)
    )
    print(
        f"idle for {IDLE_S:.0f} s: CPU {', '.join(f'{100 * share:.1f}%' for share in most)} of a "
        f"core by rank (bar 3%); the first token then takes {1e3 * median(woken_s[0]):.1f} ms, "
        f"{extra_ms:+.1f} ms over a busy server's (bar 5 ms); a process that slept and multiplied "
        f"took {machine_ms:+.1f} ms"
    )
    return {
        "cpu_shares": shares,
        "busy_s": busy_s[0],
        "woken_s": woken_s[0],
        "extra_ms": extra_ms,
        "products_busy_s": busy_s[1],
        "products_woken_s": woken_s[1],
        "machine_ms": machine_ms,
    }


_MEASUREMENTS = {"first-token": first_token, "stall": stall, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(_MEASUREMENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", choices=KINDS, default="ours", help="what is measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if unknown := set(options.names) - _MEASUREMENTS.keys():
        parser.error(f"no measurement {', '.join(sorted(unknown))}")
    results: dict[str, Measurement] = {}
    with tempfile.TemporaryDirectory(prefix="long-prompts-") as scratch:
        model = Path(scratch) / "model"
        write_model(model)
        for name in options.names or _MEASUREMENTS:
            measure = _MEASUREMENTS[name]
            results[name] = measure(KINDS[options.server], model, Path(scratch), options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
