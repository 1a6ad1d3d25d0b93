"""The tables of docs/plans.md: real models on hypothetical Macs, and published measurements.

    python -m benchmarks.plan_tables [--write]

Configurations and machines are those in docs/plans. Nothing is run and nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.pages import put
from mlx_dist.cluster import groups
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.costs import Workload
from mlx_dist.cluster.machines import read_cluster
from mlx_dist.cluster.placement import fits
from mlx_dist.cluster.prediction import Prediction
from mlx_dist.config import Dtype, Objective
from mlx_dist.model.counted import Counted
from mlx_dist.model.files import find_described

_DOCS = Path(__file__).parents[1] / "docs"
_MODELS, _MACHINES = _DOCS / "plans" / "models", _DOCS / "plans" / "machines"
_PROMPT_TOKENS = 2048
_CONTEXT_TOKENS = 4096
_NUM_STREAMS = 16

MODELS = {
    "llama-3.3-70b": "Llama 3.3 70B",
    "qwen3-235b-a22b": "Qwen3 235B-A22B",
    "deepseek-v3": "DeepSeek V3",
    "gpt-oss-120b": "gpt-oss 120B",
}
CLUSTERS = {
    "three-minis": "3x mini M4 16 GB, 10 GbE",
    "two-pro-minis": "2x mini M4 Pro 64 GB, Thunderbolt 5",
    "four-pro-minis": "4x mini M4 Pro 48 GB, Thunderbolt 5",
    "eight-pro-minis": "8x mini M4 Pro 64 GB, Thunderbolt 5",
    "four-studios": "4x Studio M4 Max 128 GB, 10 GbE",
    "two-halves": "2x Studio M3 Ultra 256 GB, 10 GbE",
    "two-ultras": "2x Studio M3 Ultra 512 GB, RDMA",
    "four-ultras": "4x Studio M3 Ultra 512 and 256 GB, RDMA",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement that somebody has published: tokens a second of one stream, or of a prompt.

    `prompt_tokens` is the length of the prompt for the latter.
    """

    what: str
    machines: str
    model: str
    bits: int
    tokens_per_s: float
    source: str
    prompt_tokens: int | None = None
    is_tensor: bool = False


MEASURED = (
    Measured("llama.cpp Q4_K_M", "one-ultra", "llama-3.3-70b", 4, 14.4, "[1]"),
    Measured("llama.cpp Q4_K_M", "one-ultra", "llama-3.3-70b", 4, 162, "[1]", 512),
    Measured("mlx-lm, Llama 3.1", "one-ultra", "llama-3.3-70b", 4, 170, "[2]", 4096),
    Measured("llama.cpp Q4_K_M, R1", "one-ultra", "deepseek-v3", 4, 20.2, "[1]"),
    Measured("llama.cpp Q4_K_M, R1", "one-ultra", "deepseek-v3", 4, 169, "[1]", 512),
    Measured("MLX, MXFP4", "one-max", "gpt-oss-120b", 4, 43.9, "[3]"),
    Measured("MLX, MXFP4", "one-max", "gpt-oss-120b", 4, 189, "[3]", 1024),
    Measured("mlx-lm", "one-ultra", "gpt-oss-120b", 8, 60, "[7]"),
    Measured("mlx-lm", "one-ultra", "gpt-oss-120b", 8, 1000, "[7]", 4096),
    Measured("exo, December 2024", "eight-pro-minis", "deepseek-v3", 4, 5.37, "[4]"),
    Measured("exo, December 2024", "eight-pro-minis", "llama-3.3-70b", 4, 3.89, "[4]"),
    Measured("without RDMA", "four-ultras", "qwen3-235b-a22b", 8, 15.2, "[5]"),
    Measured("exo, RDMA", "four-ultras", "qwen3-235b-a22b", 8, 31.9, "[5]", is_tensor=True),
    Measured("exo, RDMA, V3.1", "two-ultras", "deepseek-v3", 8, 27.8, "[6]", is_tensor=True),
    Measured("exo, RDMA, V3.1", "four-ultras", "deepseek-v3", 8, 32.5, "[6]", is_tensor=True),
)


def cluster_tables() -> Iterator[str]:
    """For each model, what each cluster does with it in 4 and in 8 bits."""
    for model, title in MODELS.items():
        yield f"### {title}\n"
        yield (
            f"| machines | 4 bits: one stream | {_NUM_STREAMS} streams | first token "
            f"| 8 bits: one stream | {_NUM_STREAMS} streams | first token |"
        )
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for machines, words in CLUSTERS.items():
            cells = [cell for bits in (4, 8) for cell in _cells(model, machines, bits)]
            yield f"| {words} | {' | '.join(cells)} |"
        yield ""


def measured_table() -> Iterator[str]:
    """Published measurements beside what is predicted there for the same way to split."""
    yield "| model | machines | measured with | split | measured | predicted | ratio | source |"
    yield "|---|---|---|---|---:|---:|---:|---|"
    for m in MEASURED:
        predicted = _predicted(m)
        what = "" if m.prompt_tokens is None else f", prompt of {m.prompt_tokens}"
        by_layers = "none" if m.machines.startswith("one-") else "layers"
        split = "tensor" if m.is_tensor else by_layers
        yield (
            f"| {MODELS[m.model]}, {m.bits} bits | {_count(m.machines)} | {m.what}{what} "
            f"| {split} | {m.tokens_per_s:g} | {predicted:.1f} "
            f"| {predicted / m.tokens_per_s:.2f} | {m.source} |"
        )


def _cells(model: str, machines: str, bits: int) -> tuple[str, str, str]:
    """One stream, many streams, and the time to the first token; a dash where it does not fit."""
    asked = Workload(_CONTEXT_TOKENS, 1, (_PROMPT_TOKENS,))
    stream = _prediction(model, machines, bits, asked, Objective.latency)
    prompt = _prediction(model, machines, bits, asked, Objective.throughput)
    together = Workload(_CONTEXT_TOKENS, _NUM_STREAMS, ())
    many = _prediction(model, machines, bits, together, Objective.throughput)
    return (
        "-" if stream is None else f"{stream.stream_tokens_per_s:.1f}",
        "-" if many is None else f"{many.total_tokens_per_s:.0f}",
        "-" if prompt is None else f"{prompt.ttft_s[_PROMPT_TOKENS]:.1f} s",
    )


def _predicted(measured: Measured) -> float:
    """What all machines do there, split as for the measurement: tokens a second."""
    num_tokens = measured.prompt_tokens
    # Measurements of streams are of short ones.
    workload = Workload(num_tokens or 512, 1, (num_tokens or 512,))
    prediction = _prediction(
        measured.model,
        measured.machines,
        measured.bits,
        workload,
        Objective.throughput,
        is_tensor=measured.is_tensor,
    )
    assert prediction is not None, f"{measured} does not fit"
    if num_tokens is None:
        return prediction.stream_tokens_per_s
    return num_tokens / prediction.ttft_s[num_tokens]


def _prediction(
    model: str,
    machines: str,
    bits: int,
    workload: Workload,
    objective: Objective,
    is_tensor: bool = False,
) -> Prediction | None:
    """What the best cut does, or all machines as a tensor group; None if the model does not fit."""
    counted = _counted(model, bits)
    costs = counted.of()
    cluster = read_cluster(_MACHINES / f"{machines}.toml")
    speedy = cluster.machines(costs.dtype, costs.bits)
    case = Case(costs, speedy, cluster.links, workload, objective, costs_of=counted.of)
    if is_tensor:
        return case.predicted(groups.place(case, len(speedy)))
    return case.predicted() if fits(case.problem()) else None


@cache
def _counted(model: str, bits: int) -> Counted:
    files = find_described(model, _MODELS / model, (), revision="")
    return Counted(files, Dtype.auto, fused=True, bits=bits)


def _count(machines: str) -> str:
    names = {"one-ultra": "1x M3 Ultra 512 GB", "one-max": "1x M2 Max 96 GB"}
    return names.get(machines) or CLUSTERS[machines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/plans.md")
    options = parser.parse_args()
    parts = {
        "clusters": "\n".join(cluster_tables()).rstrip(),
        "measured": "\n".join(measured_table()),
    }
    for name, part in parts.items():
        if options.write:
            put("plans.md", name, "python -m benchmarks.plan_tables --write", part)
        else:
            print(f"{part}\n")


if __name__ == "__main__":
    main()
