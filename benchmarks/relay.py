"""What the relay of a supervised server costs, beside the first rank asked directly.

    python -m benchmarks.relay [--streams 1,8,32] [--rounds 3] [--requests-per-stream 2]
        [--gap-ms 20] [--seconds 10] [--json FILE]

First the delay of a token: a stand-in for the first rank sends every stream an event each GAP ms,
with the time in it, and a client reads it directly and through the relay, in turns. The client and
the stand-in are one process, the relay is another. Then the throughput of two ranks with the model
of benchmarks.serving, through the relay and at the first rank's own port, in turns, of one server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.load import Endpoint, LoadError, Prompts, closed_loop, events, percentile
from benchmarks.servers import HOST, Kind, Running, free_port, ours, running, write_model

_SERVER = Kind("supervised", "mlx-dist serve --supervise", ours(2, "--supervise"), "/ready")
_PROMPT_TOKENS = _OUTPUT_TOKENS = 32
_STARTS_S = 20.0
_CHUNK = b'data: {"choices":[{"index":0,"text":"%d","logprobs":null,"finish_reason":null}]}\n\n'
_RELAY = """
import asyncio, sys, uvicorn
from mlx_dist.serve.settings import HttpConfig
from mlx_dist.serve.sockets import listen, uvicorn_config
from mlx_dist.supervise.gate import Gate, Upstream
from mlx_dist.supervise.relay import relay_app

async def main(port, upstream):
    gate = Gate(lambda: None)
    gate.open(Upstream.at(upstream, "secret"))
    config = HttpConfig(port=port)
    server = uvicorn.Server(uvicorn_config(relay_app(gate, config, 60), config, lifespan="off"))
    await server.serve([listen(config.host, port)])

asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
"""


@asynccontextmanager
async def stamping(gap_s: float, seconds: float) -> AsyncIterator[int]:
    """A stand-in for the first rank, at a port: streams of the time, each `gap_s`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split()[0]
        await reader.readexactly(int(length))
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for number in range(int(seconds / gap_s)):
            await asyncio.sleep(gap_s)
            event = b":t 0 %d\n" % number + _CHUNK % time.perf_counter_ns()
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@contextmanager
def relay(upstream: int) -> Iterator[int]:
    """The relay in a process of its own, at a port."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", _RELAY, str(port), str(upstream)])
    try:
        deadline_s = time.monotonic() + _STARTS_S
        while time.monotonic() < deadline_s:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


async def delays_s(port: int, num_streams: int) -> list[float]:
    """From when each event was written to when it was read here."""

    async def one() -> list[float]:
        found = []
        async for event in events(Endpoint(HOST, port, "m"), b'{"model":"m","prompt":"x"}'):
            if event["choices"]:
                sent_ns = int(event["choices"][0]["text"])
                found.append((time.perf_counter_ns() - sent_ns) / 1e9)
        return found

    return [
        delay for row in await asyncio.gather(*(one() for _ in range(num_streams))) for delay in row
    ]


async def measure_delays(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    async with stamping(options.gap_ms / 1e3, options.seconds / options.rounds) as port:
        with relay(port) as relayed:
            for num_streams in options.streams:
                found: dict[str, list[float]] = {"direct": [], "relayed": []}
                for _ in range(options.rounds):
                    found["direct"] += await delays_s(port, num_streams)
                    found["relayed"] += await delays_s(relayed, num_streams)
                row: dict[str, float] = {"streams": num_streams}
                for name, delays in found.items():
                    row[f"{name}_p50_ms"] = 1e3 * percentile(delays, 50)
                    row[f"{name}_p99_ms"] = 1e3 * percentile(delays, 99)
                rows.append(row)
    return rows


def private_port(server: Running) -> int:
    """Where the first rank listens for the relay: a socket of its own in /proc."""
    first = server.rank_pids()[0]
    links = [str(file.readlink()) for file in Path(f"/proc/{first}/fd").iterdir()]
    for line in Path(f"/proc/{first}/net/tcp").read_text().splitlines()[1:]:
        address, state, inode = (line.split()[column] for column in (1, 3, 9))
        if state == "0A" and address.startswith("0100007F:") and f"socket:[{inode}]" in links:
            return int(address.partition(":")[2], 16)
    raise LoadError("the first rank listens nowhere on this machine")


def measure_rates(options: argparse.Namespace) -> list[dict[str, float]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="relay-") as folder:
        scratch = Path(folder)
        write_model(scratch / "model")
        with running(_SERVER, scratch / "model", scratch) as server:
            direct = replace(server.endpoint, port=private_port(server))
            for num_streams in options.streams:
                rates: dict[str, list[float]] = {"direct": [], "relayed": []}
                for i in range(options.rounds):
                    prompts = Prompts(seed=i)
                    pair = {"direct": direct, "relayed": server.endpoint}
                    # Whoever goes second meets a warmer machine: they take turns in that, too.
                    for name in sorted(pair, reverse=bool(i % 2)):
                        load = closed_loop(
                            pair[name],
                            prompts,
                            concurrency=num_streams,
                            requests_per_worker=options.requests_per_stream,
                            prompt_words=_PROMPT_TOKENS,
                            max_tokens=_OUTPUT_TOKENS,
                        )
                        rates[name].append(asyncio.run(load).tokens_per_s)
                row: dict[str, float] = {"streams": num_streams}
                row |= {f"{name}_tokens_per_s": median(rate) for name, rate in rates.items()}
                pairs = zip(rates["direct"], rates["relayed"], strict=True)
                row["loss_percent"] = 100 * (1 - median(b / a for a, b in pairs))
                rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    lines = [" | ".join(rows[0]), " | ".join("---:" for _ in rows[0])]
    lines += [" | ".join(f"{value:.4g}" for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--gap-ms", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=10, help="of delays, for each number")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.streams = [int(number) for number in options.streams.split(",")]
    delays = asyncio.run(measure_delays(options))
    print(f"Delay of an event, one each {options.gap_ms:g} ms a stream\n\n{table(delays)}\n")
    rates = measure_rates(options)
    print(f"Throughput of two ranks\n\n{table(rates)}")
    if options.json:
        options.json.write_text(json.dumps({"delays": delays, "rates": rates}, indent=1))


if __name__ == "__main__":
    main()
