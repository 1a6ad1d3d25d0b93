"""This server and its peers on one machine, one after another, under the same load.

    python -m benchmarks.serving [--servers ours,mlx_lm,tensor,pipeline]
        [--concurrency 1,16,32,64] [--requests-per-stream 3] [--rounds 1] [--burst 500]
        [--json FILE] [--plot FILE] [--write-docs]

A random float32 model of about 130 M parameters, the same BLAS with one thread for every process.
Requests of 32 prompt and 32 output tokens, greedy and streamed, no two prompts alike, in a closed
loop after a warm-up round. For this the peers get a longer listen queue, or the broken connections
would hide how fast they are. Then a burst of connections that are opened at once, to the servers
as they are. With several rounds every server takes its turn in each, and the tables show medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import Completion, LoadResult, Prompts, burst, closed_loop
from benchmarks.servers import KINDS, Kind, Running, ServerError, running, write_model

PROMPT_TOKENS = 32
OUTPUT_TOKENS = 32
# A single stream's three requests would be too few to mean anything.
_MIN_REQUESTS = 6
_BURST_TIMEOUT_S = 120
_DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


@dataclass(slots=True)
class Measured:
    """What one server did, in all rounds."""

    kind: Kind
    loads: list[LoadResult] = field(default_factory=list)
    bursts: list[dict[str, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def at(self, concurrency: int) -> list[LoadResult]:
        return [load for load in self.loads if load.concurrency == concurrency]

    def rate(self, concurrency: int) -> float:
        """Median tokens a second, nan if it was not measured."""
        rates = [load.tokens_per_s for load in self.at(concurrency)]
        return median(rates) if rates else math.nan

    def as_json(self) -> dict[str, Any]:
        return {
            "server": self.kind.name,
            "title": self.kind.title,
            "loads": [asdict(load) for load in self.loads],
            "bursts": self.bursts,
            "failures": self.failures,
        }


def measure(server: Running, measured: Measured, options: argparse.Namespace, seed: int) -> None:
    """Put the server under every load in turn and add what came of it to `measured`."""
    prompts = Prompts(seed)
    for concurrency in options.concurrency:
        each = max(options.requests_per_stream, math.ceil(_MIN_REQUESTS / concurrency))
        load = asyncio.run(
            closed_loop(
                server.endpoint,
                prompts,
                concurrency=concurrency,
                requests_per_worker=each,
                prompt_words=PROMPT_TOKENS,
                max_tokens=OUTPUT_TOKENS,
            )
        )
        measured.loads.append(load)
        _say(f"  {concurrency:3d} at once: {_load_words(load)}")
        if load.errors and not load.tokens_per_s:
            raise ServerError(f"no answer at {concurrency} at once: {load.errors}")


def measure_burst(server: Running, measured: Measured, num_connections: int, seed: int) -> None:
    """Open connections to the server at once and add what came of them to `measured`."""
    prompts = Prompts(seed)
    # The first answer comes when the model is loaded.
    asyncio.run(Completion(prompts.take(1), 1).run(server.endpoint))
    start_s = time.monotonic()
    endpoint = replace(server.endpoint, timeout_s=_BURST_TIMEOUT_S)
    outcome = asyncio.run(burst(endpoint, prompts, num_connections))
    measured.bursts.append(outcome)
    _say(f"  burst of {num_connections}: {_counts(outcome)}; {time.monotonic() - start_s:.0f} s")


def _load_words(load: LoadResult) -> str:
    words = f"{load.tokens_per_s:.1f} tokens/s"
    words += f", first token {load.first_token_p50_s:.3f} s (99%: {load.first_token_p99_s:.3f})"
    words += f", gap {1e3 * load.gap_p50_s:.0f} ms (99%: {1e3 * load.gap_p99_s:.0f})"
    words += f", {load.prompt_tokens:.1f} prompt tokens"
    if load.cached_tokens:
        words += f" ({load.cached_tokens} cached in all)"
    if load.retries:
        words += f"; sent again after: {_counts(load.retries)}"
    return words + (f"; failed: {_counts(load.errors)}" if load.errors else "")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items())) or "none"


def _sum(counts: Sequence[dict[str, int]]) -> int:
    return sum(number for each in counts for number in each.values())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: Sequence[Measured], concurrency: Sequence[int], num_burst: int) -> str:
    """Tokens a second of every server, and what each made of the burst, in Markdown."""
    head = ["server", *(f"{number} at once" for number in concurrency)]
    head += ["connections broken under load"] + [f"burst of {num_burst} answered"] * bool(num_burst)
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results:
        row = [result.kind.title, *(_number(result.rate(number)) for number in concurrency)]
        row.append(str(_sum([load.retries for load in result.loads])))
        if num_burst:
            answered = [outcome.get("ok", 0) for outcome in result.bursts]
            row.append(f"{median(answered):.0f}" if answered else "-")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def latency_table(results: Sequence[Measured], concurrency: Sequence[int]) -> str:
    """First-token times and token gaps, the medians of the rounds, in Markdown."""
    rows = [["server", "at once", "first token, median", "99%", "token gap, median", "99%"]]
    rows.append(["---", *["---:"] * 5])
    for result in results:
        for number in concurrency:
            if loads := result.at(number):
                seconds = (
                    median(load.first_token_p50_s for load in loads),
                    median(load.first_token_p99_s for load in loads),
                    median(load.gap_p50_s for load in loads),
                    median(load.gap_p99_s for load in loads),
                )
                cells = [f"{1e3 * value:.0f} ms" for value in seconds]
                rows.append([result.kind.title, str(number), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def ratios(results: Sequence[Measured], concurrency: Sequence[int]) -> str:
    """Our rate over that of mlx_lm.server as one process, if both were measured."""
    by_name = {result.kind.name: result for result in results}
    if not {"ours", "mlx_lm"} <= by_name.keys():
        return ""
    pairs = [(n, by_name["ours"].rate(n) / by_name["mlx_lm"].rate(n)) for n in concurrency]
    words = ", ".join(f"{ratio:.2f} at {number}" for number, ratio in pairs)
    return f"Two ranks of mlx-dist over one process of mlx_lm.server: {words} at once."


def plot(results: Sequence[Measured], concurrency: Sequence[int], file: Path) -> None:
    """Tokens a second over the number of concurrent requests."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        is_ours = result.kind.name.startswith("ours")
        rates = [result.rate(number) for number in concurrency]
        style = "o-" if is_ours else "s--"
        axes.plot(concurrency, rates, style, label=result.kind.title, lw=2.4 if is_ours else 1.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrency, [str(number) for number in concurrency])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel("output tokens/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _conditions(options: argparse.Namespace) -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown CPU",
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx-dist", "mlx", "mlx-lm"))
    return (
        f"{os.cpu_count()} cores of {cpu}, {versions}; {options.rounds} round(s), "
        f"{options.requests_per_stream} requests per stream of {PROMPT_TOKENS} prompt and "
        f"{OUTPUT_TOKENS} output tokens, after a warm-up round."
    )


def report(results: Sequence[Measured], options: argparse.Namespace) -> str:
    parts = [
        _conditions(options),
        "Output tokens a second:",
        table(results, options.concurrency, options.burst),
        ratios(results, options.concurrency),
        latency_table(results, options.concurrency),
        *(f"{result.kind.title}: {failure}" for result in results for failure in result.failures),
    ]
    return "\n\n".join(part for part in parts if part)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", default="ours,mlx_lm,tensor,pipeline")
    parser.add_argument("--concurrency", default="1,16,32,64")
    parser.add_argument("--requests-per-stream", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--burst", type=int, default=500, help="0 for none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write-docs", action="store_true", help=f"into {_DOCS}")
    options = parser.parse_args()
    options.servers = options.servers.split(",")
    options.concurrency = [int(number) for number in options.concurrency.split(",")]
    if unknown := set(options.servers) - KINDS.keys():
        parser.error(f"no server {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return options


def run(options: argparse.Namespace, scratch: Path) -> list[Measured]:
    model = scratch / "model"
    write_model(model)
    results = [Measured(KINDS[name]) for name in options.servers]
    for i in range(1, options.rounds + 1):
        for result in results:
            start_s = time.monotonic()
            _say(f"{result.kind.title}, round {i} of {options.rounds}")
            try:
                with running(result.kind, model, scratch) as server:
                    measure(server, result, options, seed=i)
                if options.burst:
                    with running(
                        result.kind, model, scratch, has_stock_listen_queue=True
                    ) as server:
                        measure_burst(server, result, options.burst, seed=i)
            except ServerError as error:
                result.failures.append(f"round {i}: {error}")
                _say(f"  {error}")
            _say(f"  {time.monotonic() - start_s:.0f} s")
    return results


def main() -> None:
    options = _options()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        results = run(options, Path(scratch))
    text = report(results, options)
    print(text)
    if options.json:
        options.json.write_text(json.dumps([result.as_json() for result in results], indent=1))
    if options.plot:
        plot(results, options.concurrency, options.plot)
    if options.write_docs:
        _DOCS.mkdir(parents=True, exist_ok=True)
        plot(results, options.concurrency, _DOCS / "serving.png")
        page = f"# Serving beside its peers\n\n{text}\n\n![Tokens a second](serving.png)\n"
        (_DOCS / "serving.md").write_text(page)


if __name__ == "__main__":
    main()
