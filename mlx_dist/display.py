"""What a person sees: bars and tables on stderr, JSON on stdout. The leader's only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import msgspec
from msgspec.structs import asdict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mlx_dist.messages import Report

_GIB = 1 << 30
_MIB = 1 << 20


class Level(StrEnum):
    """How bad a finding is. Only `fail` keeps a server from being started."""

    ok = "ok"
    warn = "warn"
    fail = "FAIL"


def console() -> Console:
    """Stderr. Under mpirun it is a pipe, and the width is what the launching terminal had."""
    if width := os.environ.get("MLX_DIST_TERMINAL_WIDTH"):
        return Console(stderr=True, force_terminal=True, width=int(width))
    return Console(stderr=True)


@contextmanager
def progress_bar(
    label: str, is_shown: bool, in_bytes: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A function that takes (done, total) and moves a bar, if a person watches stderr."""
    screen = console()
    if not is_shown or not screen.is_terminal:
        yield lambda _done, _total: None
        return
    count = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    with Progress(
        TextColumn(label), BarColumn(), count, console=screen, transient=True
    ) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def rank_table(reports: list[Report], caption: str) -> None:
    """Print a line for each rank on stderr."""
    table = Table(caption=caption, caption_justify="left")
    for heading in ("rank", "host", "layers", "weights", "peak memory", "load", "busy"):
        table.add_column(heading, justify="left" if heading == "host" else "right")
    for report in reports:
        table.add_row(
            str(report.rank),
            report.host,
            escape(_layers(report)),
            _size(report.weights_bytes),
            _size(report.peak_rss_bytes),
            f"{report.load_s:.1f} s",
            f"{report.busy_s:.1f} s",
        )
    console().print(table)


def _layers(report: Report) -> str:
    start, end = report.layers
    place, sizes = report.slice
    part = f", slice {place + 1} of {len(sizes)}" if len(sizes) > 1 else ""
    return f"[{start}, {end}){part}" if start < end else "none"


def print_json(result: dict[str, Any]) -> None:
    """Print `result` as one JSON object on stdout."""
    print(json.dumps(result, indent=2), flush=True)


def rank_objects(
    reports: list[Report], fields: tuple[str, ...] = Report.__struct_fields__
) -> list[dict[str, Any]]:
    """These fields of the reports as JSON objects."""
    built: list[dict[str, Any]] = [msgspec.to_builtins(asdict(report)) for report in reports]
    return [{field: report[field] for field in fields} for report in built]


def write_text(text: str) -> None:
    """Print a piece of streamed text on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.2f} GiB"
    return f"{num_bytes / _MIB:.1f} MiB"
