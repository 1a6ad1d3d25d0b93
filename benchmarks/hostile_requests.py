"""Requests that schemathesis makes of the server's own schema: right ones, and wrong ones.

    python -m benchmarks.hostile_requests [--ranks 2] [--examples 300] [--seed 0]

Right ones must be answered, wrong ones refused, every answer must be one that the schema documents,
and none may be a fault of the server's. Then a plain request must be answered as before, with every
rank's memory about what it was.

schemathesis runs in a process of its own, which loads this module for what a schema cannot say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext

from benchmarks.load import Completion
from benchmarks.servers import Kind, Running, Start, rss_bytes, running
from tests.models import write_tool_model

_TIMEOUT_S = 3600
_MOST_TOKENS = 2
_BAR = 0.10
# How many tokens a prompt has is nothing that a schema can say: 413 is right.
_CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "413"]
"""
_LEAST_CASES = 2000


@dataclass(slots=True)
class Sweep:
    """What came of a run. `answers` counts operation, right or wrong, and status."""

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    log: str = ""

    @property
    def num_cases(self) -> int:
        return self.answers.total()

    @property
    def share_answered(self) -> float:
        """How many of the right cases were answered with 200."""
        counts: Counter[int] = Counter()
        for (_, mode, status), number in self.answers.items():
            if mode == "positive":
                counts[status] += number
        return counts[200] / counts.total()


@schemathesis.hook
def before_call(_context: HookContext, case: Case[Any], _kwargs: dict[str, Any]) -> None:
    """Make a right case keep to what a schema cannot say, and ask for few tokens."""
    meta = case.meta
    is_right = meta is not None and meta.generation.mode is GenerationMode.POSITIVE
    if is_right and isinstance(case.body, dict):
        case.body = _sayable(case.body)


def _sayable(body: dict[str, Any]) -> dict[str, Any]:
    body = {key: _whole(value) for key, value in body.items()}
    body |= {"max_tokens": _MOST_TOKENS, "max_completion_tokens": None}
    if "prompt" in body:
        del body["max_completion_tokens"]
        body["n"] = None
    for message in body.get("messages", ()):
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = "{}"
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("function"):
        choice["function"]["name"] = body["tools"][0]["function"]["name"]
    return body


def _whole(value: Any) -> Any:
    """`value` with 3 for 3.0: JSON schemas take both for integers, the server only the first."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_whole(part) for part in value]
        case dict():
            return {key: _whole(part) for key, part in value.items()}
        case _:
            return value


def sweep(url: str, *, examples: int, phases: str, seed: int, scratch: Path) -> Sweep:
    """Run schemathesis against the server at `url`; its report goes to `scratch`."""
    report = scratch / "report.ndjson"
    config = scratch / "schemathesis.toml"
    config.write_text(_CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)]
    command += ["run", f"{url}/openapi.json"]
    command += ["--mode", "all", "--phases", phases, "--max-examples", str(examples)]
    command += ["--seed", str(seed), "--continue-on-failure", "--suppress-health-check", "all"]
    command += ["--report-ndjson-path", str(report), "--request-timeout", "60"]
    command += ["--output-sanitize", "false"]
    done = subprocess.run(
        command,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.hostile_requests"},
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    result = Sweep(log=done.stdout + done.stderr)
    for scenario in _scenarios(report):
        _add(result, scenario)
    if done.returncode != 0 and not result.failures:
        result.failures.append(f"schemathesis ended with {done.returncode}")
    return result


def _scenarios(report: Path) -> Iterator[dict[str, Any]]:
    with report.open() as lines:
        for line in lines:
            yield from (
                e["recorder"] for k, e in json.loads(line).items() if k == "ScenarioFinished"
            )


def _add(result: Sweep, recorder: dict[str, Any]) -> None:
    for number, case in recorder.get("cases", {}).items():
        mode = case["value"]["meta"]["generation"]["mode"]
        response = recorder["interactions"][number]["response"]
        status = response["status_code"] if response else 0
        result.answers[recorder["label"], mode, status] += 1
    for checks in recorder.get("checks", {}).values():
        for check in checks:
            if check["status"] != "success":
                result.failures.append(f"{recorder['label']}: {check}")


def _serve(num_ranks: int) -> Kind:
    def command(start: Start) -> list[str]:
        arguments = ["serve", "-n", str(num_ranks), "--model", str(start.model)]
        arguments += ["--port", str(start.port), "--max-choices", "4"]
        # Small, so that kept prefixes fill it early and take no more memory later.
        arguments += ["--kv-memory-gb", "0.02"]
        return [sys.executable, "-m", "mlx_dist", *arguments]

    return Kind("hostile", "mlx-dist", command, "/ready")


async def _plain_answer(up: Running) -> str | None:
    """What went wrong with a plain request, or None."""
    done = await Completion("Once upon a time", 4).run(up.endpoint, max_retries=0)
    return done.error


def _memory(up: Running) -> list[int]:
    return [rss_bytes(pid) for pid in up.rank_pids()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--examples", type=int, default=400, help="of each operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = write_tool_model(scratch / "tools")
        with running(_serve(options.ranks), model, scratch) as up:
            url = f"http://{up.endpoint.host}:{up.endpoint.port}"

            def run(examples: int, phases: str, seed: int) -> Sweep:
                return sweep(url, examples=examples, phases=phases, seed=seed, scratch=scratch)

            warm_up = run(options.examples, "coverage,fuzzing", options.seed + 1)
            before = _memory(up)
            result = run(options.examples, "coverage,fuzzing", options.seed)
            after, fault = _memory(up), asyncio.run(_plain_answer(up))
    failures = warm_up.failures + result.failures
    print("| operation | cases | answers |\n|---|---|---|")
    for operation, mode in sorted({key[:2] for key in result.answers}):
        counts = {k[2]: n for k, n in result.answers.items() if k[:2] == (operation, mode)}
        told = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        print(f"| {operation} | {mode} | {told} |")
    growth = [now / then - 1 for then, now in zip(before, after, strict=True)]
    print(
        f"{result.num_cases} cases, {len(failures)} failures; memory of the ranks grew by ", end=""
    )
    print(", ".join(f"{part:.1%}" for part in growth), end="; ")
    print("a plain request is answered" if fault is None else f"a plain request fails: {fault}")
    if failures:
        print(warm_up.log if warm_up.failures else result.log)
    if failures or fault or max(growth) > _BAR or result.num_cases < _LEAST_CASES:
        sys.exit(1)


if __name__ == "__main__":
    main()
