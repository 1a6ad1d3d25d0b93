"""Clients that leave at random moments: what they leave behind on every rank.

    python -m benchmarks.disconnects [--ranks 3] [--num 1300] [--seed 0]

They leave while they send, before the answer's head, in the queue, in the prompt, in the answer.
Afterwards nothing may wait or hold a slot, no memory may be reserved, and the ranks must agree
on what they hold, by digest. At the end the server must answer a plain request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.load import Endpoint
from benchmarks.overload import ask, settled
from benchmarks.servers import Kind, Start, running
from mlx_dist.demo import MODEL_DIR

_VOCAB = range(5, 700)
_NUM_STREAMS = 48
_LONGEST_WAIT_S = 0.5
_MOMENTS = ("while sending", "before the head", "in the stream", "in the whole answer", "stays")


async def leave(endpoint: Endpoint, draw: random.Random) -> str:
    """Ask for something and leave; says when. One in five stays to the end."""
    moment = draw.choice(_MOMENTS)
    prompt = [draw.choice(_VOCAB) for _ in range(draw.choice([1, 20, 200, 600]))]
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": draw.choice([1, 20, 200]),
        "n": draw.choice([1, 1, 3]),
        "stream": moment != "in the whole answer",
        "logit_bias": {"0": -100},
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    sent = head.encode() + data
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        if moment == "while sending":
            writer.write(sent[: draw.randrange(len(sent))])
        else:
            writer.write(sent)
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_wait_s(draw, moment)):
                if moment == "in the stream":
                    await reader.readuntil(b"\r\n\r\n")
                    await reader.read(draw.randrange(1, 3000))
                else:
                    while moment != "while sending" and await reader.read(1 << 16):
                        pass
    except asyncio.IncompleteReadError:
        moment = "refused"
    finally:
        if draw.random() < 1 / 2:
            writer.transport.abort()  # A reset, in the place of an orderly end.
        writer.close()
    return moment


def _wait_s(draw: random.Random, moment: str) -> float | None:
    """How long a client stays at most; moments of milliseconds are as likely as long ones."""
    if moment in ("stays", "in the stream"):
        return None
    return _LONGEST_WAIT_S * 10 ** -draw.uniform(0, 3)


async def leave_many(endpoint: Endpoint, num: int, seed: int) -> Counter[str]:
    """`num` such clients, many at a time; how many left at which moment."""
    limit = asyncio.Semaphore(_NUM_STREAMS)

    async def one(number: int) -> str:
        async with limit:
            return await leave(endpoint, random.Random(seed * 1_000_003 + number))

    return Counter(await asyncio.gather(*map(one, range(num))))


def left_behind(stats: dict[str, Any]) -> list[str]:
    """What these numbers of an idle server say that should not be."""
    wrong = [
        f"{name} is {stats[name]}"
        for name in ("num_waiting", "num_active", "rank_slots", "kv_reserved_bytes")
        if _total(stats[name])
    ]
    # The fullest rank holds what the leader counts at least; none more than that rounds up to.
    if stats["prefix_entries"] == 0 and _total(stats["rank_kv_bytes"]):
        wrong.append(f"rank_kv_bytes is {stats['rank_kv_bytes']} with no prefix kept")
    if len(set(stats["rank_digests"])) > 1:
        wrong.append(f"the ranks differ: rank_digests is {stats['rank_digests']}")
    return wrong


def _total(value: float | Sequence[float]) -> float:
    return value if isinstance(value, int | float) else sum(value)


def _command(num_ranks: int, start: Start) -> list[str]:
    command = [sys.executable, "-m", "mlx_dist", "serve", "-n", str(num_ranks)]
    # Few slots, so that most wait; no prefixes, so that nothing at all may be left.
    command += ["--port", str(start.port), "--batching", "fixed:2,4,64"]
    return [*command, "--no-reuse-prefixes"]


async def _run(endpoint: Endpoint, num: int, seed: int) -> list[str]:
    moments = await leave_many(endpoint, num, seed)
    stats = await settled(endpoint)
    told = ", ".join(f"{moment} {count}" for moment, count in sorted(moments.items()))
    print(f"{num - moments['stays']} of {num} clients left: {told}")
    names = ("rank_slots", "rank_kv_bytes", "rank_digests", "kv_reserved_bytes", "num_waiting")
    print(", ".join(f"{name} {stats[name]}" for name in names))
    answer = await ask(endpoint, {"prompt": "Once", "max_tokens": 4})
    return left_behind(stats) + ([] if answer.status == 200 else [f"then {answer.status}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--num", type=int, default=1300, help="clients; four in five leave")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kind = Kind("disconnects", "mlx-dist", lambda start: _command(options.ranks, start), "/ready")
    with tempfile.TemporaryDirectory() as folder, running(kind, MODEL_DIR, Path(folder)) as up:
        wrong = asyncio.run(_run(up.endpoint, options.num, options.seed))
    print("nothing is left behind" if not wrong else "LEFT BEHIND: " + "; ".join(wrong))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
