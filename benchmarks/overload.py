"""Ten times more requests than a server can serve: what it refuses, and how the others fare.

    python -m benchmarks.overload [--ranks 2] [--seconds 60] [--factor 10] [--random] [--json FILE]

Before and after, a closed loop of as many streams as the server takes without refusing: every slot
and every place in the queue is taken. That is its capacity, and what it is like to be served there.
In between requests arrive by chance at `factor` times the rate of that, whatever becomes of the
earlier ones. Refusals must be 429 or 503 and say when to come again; those who are taken must be
served as at capacity: median and 99th percentile of the time to the first token and to the last
within 20%.

The embedded model is so small that the first rank's Python, which also refuses, takes longer than
the arithmetic. With --random it is the model of benchmarks.serving, of 130 M parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import Endpoint, get, percentile
from benchmarks.servers import Kind, Running, Start, rss_bytes, running, write_model
from mlx_dist.demo import MODEL_DIR

_VOCAB = range(5, 700)
_PROMPT_TOKENS = 32
_MAX_TOKENS = 64
_BATCHING = (2, 4)  # microbatches, sequences in each
_MAX_QUEUE = 16
_STAGGER_S = 0.05
_BAR = 1.2
_FLAT = 0.05
_SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's: its status, and the seconds to the first piece and the end of a good one.

    Status 0 is an answer that broke off.
    """

    status: int
    has_retry_after: bool = False
    first_s: float = 0.0
    whole_s: float = 0.0


async def ask(endpoint: Endpoint, body: dict[str, Any]) -> Answer:
    """Stream one completion on a connection of its own. Raises OSError if it cannot connect."""
    data = json.dumps({"model": endpoint.model, "stream": True} | body).encode()
    sent_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint.host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        told = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(told.split(b" ", 2)[1])
        first_s, rest = 0.0, b""
        while piece := await reader.read(1 << 16):
            if not first_s and b"data:" in piece:
                first_s = time.perf_counter() - sent_s
            rest = piece if len(piece) > 20 else rest + piece
        if status == 200 and b"[DONE]" not in rest:
            # What an error event says is a refusal that came late.
            status = 503 if b"not_ready" in rest else 0
        whole_s = time.perf_counter() - sent_s
        return Answer(status, b"\r\nretry-after:" in told, first_s, whole_s)
    except (asyncio.IncompleteReadError, ConnectionError):
        return Answer(0)
    finally:
        writer.close()


def request(draw: random.Random, max_tokens: int = _MAX_TOKENS) -> dict[str, Any]:
    """A greedy completion of a prompt of its own."""
    prompt = [draw.choice(_VOCAB) for _ in range(_PROMPT_TOKENS)]
    # Token 0 ends an answer.
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logit_bias": {"0": -100},
    }


async def at_capacity(endpoint: Endpoint, num_streams: int, seconds: float) -> list[Answer]:
    """What streams get that each ask again when they are answered."""
    end_s = time.monotonic() + seconds

    async def stream(number: int) -> list[Answer]:
        draw, answers = random.Random(number), []
        await asyncio.sleep(number * _STAGGER_S)
        while time.monotonic() < end_s:
            answers.append(await ask(endpoint, request(draw)))
            if answers[-1].status != 200:  # Ended and asked again before the next had entered.
                await asyncio.sleep(_STAGGER_S)
        return answers

    rows = await asyncio.gather(*map(stream, range(num_streams)))
    return [answer for row in rows for answer in row]


async def overloaded(
    endpoint: Endpoint, per_s: float, seconds: float, bodies: Any = request
) -> list[Answer]:
    """What requests get that arrive `per_s` a second on average, as a Poisson process."""
    draw, tasks = random.Random(0), []
    start_s, at_s = time.monotonic(), 0.0
    while (at_s := at_s + draw.expovariate(per_s)) < seconds:
        await asyncio.sleep(max(0.0, start_s + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(ask(endpoint, bodies(draw))))
    return await asyncio.gather(*tasks)


async def settled(endpoint: Endpoint) -> dict[str, Any]:
    """The server's numbers once nothing waits or runs; those at the deadline if it never is so."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        _, body = await get(endpoint.host, endpoint.port, "/cluster")
        stats: dict[str, Any] = json.loads(body)["stats"]
        is_idle = not stats["num_waiting"] + stats["num_active"] + sum(stats["rank_slots"])
        if is_idle or time.monotonic() > deadline:
            return stats
        await asyncio.sleep(0.1)


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """Seconds to the first and the last token of those who were served."""
    served = [answer for answer in answers if answer.status == 200]
    first, whole = [a.first_s for a in served], [a.whole_s for a in served]
    return {
        "first token, median": percentile(first, 50),
        "first token, 99%": percentile(first, 99),
        "whole, median": percentile(whole, 50),
        "whole, 99%": percentile(whole, 99),
    }


def _command(num_ranks: int, start: Start) -> list[str]:
    batching = f"fixed:{_BATCHING[0]},{_BATCHING[1]},512"
    command = [sys.executable, "-m", "mlx_dist", "serve", "-n", str(num_ranks)]
    command += ["--model", str(start.model), "--port", str(start.port), "--batching", batching]
    command += ["--max-queue", str(_MAX_QUEUE), "--max-choices", "4"]
    # Small, so that kept prefixes fill it while it warms up.
    return [*command, "--kv-memory-gb", "0.02"]


async def _measure(up: Running, seconds: float, factor: float) -> dict[str, Any]:
    num_streams = _BATCHING[0] * _BATCHING[1] + _MAX_QUEUE

    async def usual(seconds: float) -> tuple[list[Answer], float]:
        start_s = time.monotonic()
        answers = await at_capacity(up.endpoint, num_streams, seconds)
        num_served = sum(answer.status == 200 for answer in answers)
        return answers, num_served / (time.monotonic() - start_s)

    await usual(seconds / 6)
    before, rate = await usual(seconds / 2)
    await overloaded(up.endpoint, factor * rate, seconds / 2)
    pids = up.rank_pids()
    memory = [rss_bytes(pid) for pid in pids]
    after = await overloaded(up.endpoint, factor * rate, seconds)
    growth = [rss_bytes(pid) / size - 1 for pid, size in zip(pids, memory, strict=True)]
    # Before and after, as other work on the machine comes and goes.
    before += (await usual(seconds / 2))[0]
    stats = await settled(up.endpoint)
    return {
        "rate": rate,
        "arrivals": len(after),
        "statuses": dict(Counter(answer.status for answer in after)),
        "unsaid": sum(a.status in (429, 503) and not a.has_retry_after for a in after),
        "capacity": figures(before),
        "overload": figures(after),
        "growth": growth,
        "slots_left": sum(stats["rank_slots"]),
        "refusals_at_capacity": sum(answer.status != 200 for answer in before),
        "answers": [asdict(answer) for answer in after],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factor", type=float, default=10)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kind = Kind("overload", "mlx-dist", lambda start: _command(options.ranks, start), "/ready")
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL_DIR
        if options.random:
            model = Path(folder, "model")
            write_model(model)
        with running(kind, model, Path(folder)) as up:
            result = asyncio.run(_measure(up, options.seconds, options.factor))
    print(f"capacity {result['rate']:.2f} requests/s; {result['arrivals']} came: ", end="")
    print(", ".join(f"{status}: {n}" for status, n in sorted(result["statuses"].items())), end="; ")
    print(f"{result['refusals_at_capacity']} refused at capacity, ", end="")
    print(f"{result['unsaid']} refused without Retry-After, {result['slots_left']} slots left; ")
    print("memory of the ranks grew by " + ", ".join(f"{part:.1%}" for part in result["growth"]))
    print("| | at capacity | overloaded | ratio |\n|---|---:|---:|---:|")
    ratios = []
    for name, usual_s in result["capacity"].items():
        ratios.append(result["overload"][name] / usual_s)
        print(f"| {name} | {usual_s:.3f} s | {result['overload'][name]:.3f} s | {ratios[-1]:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(result))
    is_clean = set(result["statuses"]) <= {200, 429, 503}
    is_clean = is_clean and not result["unsaid"] and not result["slots_left"]
    if not (is_clean and max(ratios) <= _BAR and max(result["growth"]) <= _FLAT):
        print("MISSED")
        sys.exit(1)


if __name__ == "__main__":
    main()
