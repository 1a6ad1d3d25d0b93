"""Tensor groups under a real mpirun, beside one process: logits, tokens, bits and bytes.

    python -m benchmarks.real_groups [FAMILY...] [--layouts mpi:3 ring:2 mpi:6:tensor=2 ...]

A layout is FABRIC:RANKS, FABRIC:RANKS:tensor=N for a pipeline of groups, or
FABRIC:RANKS:tensor:WEIGHTS for slices of several sizes. For every one and every variant of tiny
random models: the largest error of logits, as a part of the largest one, and the most that a rank
holds, and had allocated while it loaded, as parts of the whole. Exit code 1 if members of a group
differ in a bit, an error is too large, or another token comes first than in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.families import write
from benchmarks.members import TOLERANCE, relative_error
from benchmarks.proof import UnsupportedError
from benchmarks.tiny_models import variants
from mlx_dist.cluster.launch import mpirun_command
from mlx_dist.cluster.world import World, join
from mlx_dist.config import Fabric, RunConfig, parse_parallel, parse_slices
from mlx_dist.engine.placing import lay_out
from mlx_dist.engine.program import Rank
from mlx_dist.engine.sequence import Request
from mlx_dist.engine.session import Session
from mlx_dist.messages import Recording, Report, Sampling, expect
from mlx_dist.model.files import find_model
from mlx_dist.verify import answer, one_process

FAMILIES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "gpt_oss", "phi3"),
    *("olmo2", "glm4", "deepseek_v3"),
)
LAYOUTS = (
    *("mpi:2", "mpi:3", "mpi:4", "mpi:5", "mpi:3:tensor:2,1,1", "ring:2", "ring:3", "ring:4"),
    *("ring:5", "ring:2:tensor:3,1", "mpi:4:tensor=2", "mpi:6:tensor=2", "mpi:6:tensor=3"),
)
# In chunks, and longer than the window.
_PROMPT = tuple((7 * i + 3) % 160 for i in range(21))
_CHUNK = 5
_NUM_TOKENS = 4

Result = dict[str, Any]


def compare(world: World, config: RunConfig) -> Result | None:
    """The model as `config` lays it out, beside one process; an account of it on the leader."""
    files = find_model(config.model)
    session = Session(world, config, files, None, {}, lay_out(world, config, files))
    # The models before this one are gone.
    gc.collect()
    mx.reset_peak_memory()
    before_bytes = mx.get_active_memory()
    rank = session.load()
    assert isinstance(rank, Rank)
    peak_bytes = mx.get_peak_memory() - before_bytes
    request = Request(_PROMPT, _NUM_TOKENS, Sampling(), record=True) if world.is_leader else None
    tokens = [e.token for e in answer(session, rank, request) if e.token is not None]
    own = Recording([[array.tobytes() for array in step] for step in rank.recordings])
    recordings = [expect(m, Recording).steps for m in world.control.all_gather(own)]
    ours = Report(world.rank, world.host, (0, 0), rank.weights_bytes, peak_bytes, 0.0)
    reports = [expect(message, Report) for message in world.control.all_gather(ours)]
    if not world.is_leader:
        return None
    single, single_rank = one_process(session)
    events = answer(single, single_rank, request)
    expected_tokens = [event.token for event in events if event.token is not None]
    stages = session.layout.stages
    return {
        "model": Path(config.model).name,
        "error": _error(recordings[stages[-1][0]], single_rank, tokens, expected_tokens),
        "are_members_equal": all(
            recordings[rank] == recordings[ranks[0]] for ranks in stages for rank in ranks
        ),
        "are_tokens_equal": tokens == expected_tokens,
        "total_bytes": single_rank.weights_bytes,
        "weights_bytes": [report.weights_bytes for report in reports],
        "peak_bytes": [report.peak_rss_bytes for report in reports],
    }


def _error(
    steps: list[list[bytes]], single: Rank, tokens: Sequence[int], expected: Sequence[int]
) -> float:
    """The largest of all steps that had the same tokens before them."""
    pairs = list(zip(tokens, expected, strict=False))
    num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    # The first token comes of the last step of the prompt.
    num_same = len(steps) - _NUM_TOKENS + 1 + num_equal
    worst = 0.0
    for step, want in list(zip(steps, single.recordings, strict=True))[:num_same]:
        got = np.frombuffer(step[-1], np.float32).reshape(want[-1].shape)
        worst = max(worst, relative_error(got, mx.array(want[-1])))
    return worst


def run_layout(layout: str, folders: Sequence[Path], timeout_s: float = 600) -> list[Result]:
    """Every model's account. Raises CalledProcessError for a job that does not end well."""
    fabric, num_ranks, *rest = layout.split(":")
    parallel, slices = [*rest, *("tensor", "even")[len(rest) :]]
    python = ["-m", "benchmarks.real_groups", "--rank", fabric, parallel, slices]
    done = subprocess.run(
        mpirun_command(int(num_ranks), None, [*python, *map(str, folders)]),
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_rank(fabric: str, parallel: str, slices: str, folders: Sequence[str]) -> None:
    """The program of every rank: one model after another."""
    with join(Fabric(fabric)) as world:
        for folder in folders:
            config = RunConfig(
                folder,
                prefill_chunk=_CHUNK,
                kv_memory_gb=0.1,
                parallel=parse_parallel(parallel),
                slices=parse_slices(slices),
            )
            if (result := compare(world, config)) is not None:
                print(json.dumps(result), flush=True)


def write_models(families: Sequence[str], folder: Path) -> Iterator[tuple[Path, str]]:
    """The variants that run here, each in a folder, and the type of their weights."""
    for family in families:
        for variant in variants(family):
            path = folder / f"{family}, {variant.name}"
            try:
                write(family, variant, path)
            except UnsupportedError as error:
                print(f"{path.name} is left out: {error}")
                continue
            yield path, variant.dtype


def _fault(result: Result, dtype: str) -> str:
    if not result["are_members_equal"]:
        return "  MEMBERS DIFFER"
    if not result["error"] <= TOLERANCE[dtype]:
        return "  TOO FAR"
    # In bfloat16 two candidates are often as good as equal.
    is_precise = dtype == "float32"
    return "  OTHER TOKENS" if is_precise and not result["are_tokens_equal"] else ""


def main() -> int:
    """Run the layouts; see the module's docstring."""
    if sys.argv[1:2] == ["--rank"]:
        fabric, parallel, slices, *folders = sys.argv[2:]
        run_rank(fabric, parallel, slices, folders)
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_groups")
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=FAMILIES)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="LAYOUT")
    arguments = parser.parse_args()
    num_faults = 0
    with tempfile.TemporaryDirectory() as folder:
        models = dict(write_models(arguments.families, Path(folder)))
        for layout in arguments.layouts:
            print(layout)
            for result, dtype in zip(
                run_layout(layout, list(models)), models.values(), strict=True
            ):
                fault = _fault(result, dtype)
                num_faults += bool(fault)
                total_bytes = result["total_bytes"]
                print(
                    f"  {result['model']:22} {result['error']:.0e} of the largest logit, "
                    f"holds {max(result['weights_bytes']) / total_bytes:4.0%}, "
                    f"peak {max(result['peak_bytes']) / total_bytes:4.0%}, all "
                    f"{sum(result['weights_bytes']) / total_bytes:4.0%}{fault}",
                    flush=True,
                )
    print(f"{num_faults} faults")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
