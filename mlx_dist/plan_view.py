"""How a plan looks: a table and a few lines on stdout, or one JSON object."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_dist import display
from mlx_dist.cluster import launch
from mlx_dist.cluster.additions import Addition
from mlx_dist.cluster.case import Case
from mlx_dist.cluster.prediction import Prediction
from mlx_dist.config import Objective

_GIB, _MIB = 1 << 30, 1 << 20
# Where no terminal says how wide it is.
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes out: the prediction for the placement, and the best thing to add.

    `chosen` says what it was chosen from, if it was; `warnings` are about links.
    """

    case: Case
    prediction: Prediction
    addition: Addition | None
    chosen: str = ""
    warnings: tuple[str, ...] = ()


def show(plan: Plan, as_json: bool) -> None:
    """Print `plan` on stdout."""
    if as_json:
        display.print_json(as_object(plan))
        return
    console = _console()
    console.print(_table(plan))
    for line in lines(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_object(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it. Bytes, seconds and tokens a second."""
    case, prediction = plan.case, plan.prediction
    found = asdict(prediction)
    for stage in found["stages"]:
        machine = case.machines[stage["machine"]]
        stage["chip"] = machine.chip
        stage["usable_bytes"] = machine.usable_bytes
    addition = None if plan.addition is None else asdict(plan.addition)
    return {
        "model": case.costs.name,
        "bits": case.costs.bits,
        "dtype": case.costs.dtype,
        "context_tokens": case.workload.context_tokens,
        "optimize": case.objective,
        **found,
        "left_out": _left_out(plan),
        "chosen": plan.chosen,
        "addition": addition,
        "warnings": list(plan.warnings),
    }


def lines(plan: Plan) -> list[str]:
    """What the table does not say."""
    prediction = plan.prediction
    cached = f"with {prediction.cached_tokens} tokens cached"
    said = [f"one stream: {prediction.stream_tokens_per_s:.1f} tokens/s {cached}"]
    if prediction.num_sequences > 1:
        each = (
            "each"
            if prediction.num_microbatches == 1
            else (f"each, in {prediction.num_microbatches} microbatches")
        )
        said.append(
            f"{prediction.num_sequences} streams: {prediction.total_tokens_per_s:.1f} tokens/s "
            f"in all, {cached} {each}"
        )
    times = [f"{seconds:.2f} s for {n} tokens" for n, seconds in prediction.ttft_s.items()]
    if times:
        said.append(f"first token of a prompt: {', '.join(times)}")
    said.append(f"limited by: {prediction.limit}")
    if plan.chosen:
        said.append(plan.chosen)
    said.append(f"best single addition: {_addition(plan)}")
    if left_out := _left_out(plan):
        said.append(f"left out: {', '.join(left_out)}")
    said += [f"warning: {warning}" for warning in plan.warnings]
    return said


def _table(plan: Plan) -> Table:
    case = plan.case
    bits = f", {case.costs.bits} bits" if case.costs.bits else ""
    streams = plan.prediction.num_sequences
    table = Table(
        title=f"{escape(case.costs.name)}{bits}, {streams} x {case.workload.context_tokens} tokens",
        title_justify="left",
    )
    has_slices = any(stage.slice.size > 1 for stage in plan.prediction.stages)
    sliced = ("slice",) if has_slices else ()
    held = ("weights", "KV", "headroom", "step")
    for heading in ("rank", "host", "chip", "layers", *sliced, *held):
        is_name = heading in ("host", "chip")
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name)
    for rank, stage in enumerate(plan.prediction.stages):
        start, end = stage.layers
        table.add_row(
            str(rank if case.leader is None else stage.machine),
            escape(stage.name),
            escape(case.machines[stage.machine].chip),
            escape(f"[{start}, {end})"),
            *((stage.slice.spelled,) if has_slices else ()),
            *(_size(n) for n in (stage.weights_bytes, stage.kv_bytes, stage.headroom_bytes)),
            f"{stage.step_s * 1e3:.1f} ms",
        )
    return table


def _addition(plan: Plan) -> str:
    addition = plan.addition
    if addition is None:
        return "none makes it much faster"
    rate = plan.case.rate_of(plan.prediction) * addition.speedup
    is_stream = plan.case.objective is Objective.latency
    what = "one stream" if is_stream else f"{plan.prediction.num_sequences} streams"
    return f"{addition.what}: {rate:.1f} tokens/s for {what} ({addition.speedup - 1:+.0%})"


def _left_out(plan: Plan) -> list[str]:
    used = {stage.machine for stage in plan.prediction.stages}
    return [m.name for i, m in enumerate(plan.case.machines) if i not in used]


def _size(num_bytes: int) -> str:
    if abs(num_bytes) >= _GIB:
        return f"{num_bytes / _GIB:.2f} GiB"
    return f"{num_bytes / _MIB:.1f} MiB"


def _console() -> Console:
    """Stdout. Under mpirun it looks like a terminal and leads anywhere."""
    if launch.under_a_launcher() or not sys.stdout.isatty():
        width = os.environ.get("MLX_DIST_TERMINAL_WIDTH", _WIDTH)
        return Console(width=int(width), force_terminal=False)
    return Console()
