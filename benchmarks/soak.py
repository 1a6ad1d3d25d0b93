"""Memory of every rank under a long mixed load.

    python -m benchmarks.soak [--minutes 10] [--ranks 3] [--json FILE]

The embedded model, which answers so fast that ten minutes hold ten thousand requests, as many as a
busy two hours of a larger one. Prompts of all lengths, a third of which begin alike, greedy and
sampled, JSON now and then, and a client that leaves in one of eight. After a fifth of the time for
warming up, each rank's resident memory should stay within 2% of its median. The medians of single
minutes tell a trend from what rises and falls with what is being served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Endpoint, get
from benchmarks.servers import Kind, Running, Start, rss_bytes, running
from mlx_dist.demo import MODEL_DIR

_NUM_STREAMS = 24
_VOCAB = range(5, 700)
_SHARED = tuple(random.Random(0).choice(_VOCAB) for _ in range(100))
_WARM_UP = 0.2
_BAR = 0.02
_SAMPLE_S = 2.0
_WINDOW = 30  # samples: a minute


@dataclass(slots=True)
class Counts:
    """What has been asked and what came of it."""

    requests: int = 0
    left: int = 0
    refused: int = 0


def _body(draw: random.Random) -> dict[str, Any]:
    prompt = [draw.choice(_VOCAB) for _ in range(draw.choice([1, 8, 30, 150]))]
    if draw.random() < 1 / 3:
        prompt = [*_SHARED[: draw.choice([20, 100])], *prompt]
    body: dict[str, Any] = {
        "model": MODEL_DIR.name,
        "max_tokens": draw.choice([1, 8, 32, 100]),
        "temperature": draw.choice([0, 0.8, 2.0]),
        "stream": True,
    }
    if draw.random() < 1 / 20:
        body["messages"] = [{"role": "user", "content": f"List {draw.randrange(9)} ranks."}]
        body["response_format"] = {"type": "json_object"}
    else:
        body["prompt"] = prompt
    return body


async def _ask(endpoint: Endpoint, draw: random.Random, counts: Counts) -> None:
    """One request, on a connection of its own, perhaps left in the middle."""
    body = _body(draw)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {endpoint.host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        counts.requests += 1
        counts.refused += b" 200 " not in await reader.readline()
        if draw.random() < 1 / 8:
            counts.left += 1
            await reader.read(draw.randrange(1, 2000))
        else:
            await reader.read()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _load(endpoint: Endpoint, pids: list[int], seconds: float) -> tuple[Counts, Any]:
    """Keep all streams busy; what came of it, and each sample: seconds and bytes of each rank."""
    counts, end_s = Counts(), time.monotonic() + seconds

    async def stream(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end_s:
            await _ask(endpoint, draw, counts)

    streams = asyncio.gather(*map(stream, range(_NUM_STREAMS)))
    samples = []
    while not streams.done():
        samples.append((time.monotonic() - end_s + seconds, [rss_bytes(pid) for pid in pids]))
        await asyncio.sleep(_SAMPLE_S)
    await streams
    return counts, samples


def _command(num_ranks: int, start: Start) -> list[str]:
    command = [sys.executable, "-m", "mlx_dist", "serve", "-n", str(num_ranks)]
    # Small, so that kept prefixes fill it while it warms up.
    return [*command, "--port", str(start.port), "--kv-memory-gb", "0.02"]


def _soak(server: Running, seconds: float) -> dict[str, Any]:
    counts, samples = asyncio.run(_load(server.endpoint, server.rank_pids(), seconds))
    time.sleep(2)
    _, left = asyncio.run(get(server.endpoint.host, server.endpoint.port, "/cluster"))
    stats = json.loads(left)["stats"]
    steady = [rss for at_s, rss in samples if at_s > _WARM_UP * seconds]
    ranks = []
    for column in zip(*steady, strict=True):
        middle = median(column)
        minutes = [median(column[i : i + _WINDOW]) for i in range(0, len(column), _WINDOW)]
        ranks.append(
            {
                "median_bytes": int(middle),
                "lowest": min(minutes) / middle - 1,
                "highest": max(minutes) / middle - 1,
                "lowest_sample": min(column) / middle - 1,
                "highest_sample": max(column) / middle - 1,
            }
        )
    return {
        "seconds": seconds,
        "requests": counts.requests,
        "left": counts.left,
        "refused": counts.refused,
        "slots_left": sum(stats["rank_slots"]),
        "ranks": ranks,
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kind = Kind("soak", "mlx-dist", lambda start: _command(options.ranks, start), "/ready")
    with tempfile.TemporaryDirectory() as scratch, running(kind, MODEL_DIR, Path(scratch)) as up:
        result = _soak(up, options.minutes * 60)
    print(
        f"{result['requests']} requests in {result['seconds']:.0f} s, {result['left']} left in the "
        f"middle, {result['refused']} refused, {result['slots_left']} slots left at the end"
    )
    print("| rank | median | lowest minute | highest minute | lowest and highest moment |")
    print("|---:|---:|---:|---:|---:|")
    for number, rank in enumerate(result["ranks"]):
        size = f"{rank['median_bytes'] / 1e6:.1f} MB"
        print(
            f"| {number} | {size} | {rank['lowest']:+.1%} | {rank['highest']:+.1%} | "
            f"{rank['lowest_sample']:+.1%}, {rank['highest_sample']:+.1%} |"
        )
    is_flat = all(
        -_BAR <= rank["lowest_sample"] <= rank["highest_sample"] <= _BAR for rank in result["ranks"]
    )
    print("flat" if is_flat else "NOT FLAT")
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
