"""Puts what a command prints between two marks in a page of docs/."""

from __future__ import annotations

import sys
from pathlib import Path

_DOCS = Path(__file__).parents[1] / "docs"
_END = "<!-- end -->"


def put(page: str, name: str, command: str, text: str) -> None:
    """Replace what stands between `<!-- name: command -->` and the next end mark by `text`."""
    path = _DOCS / page
    begin = f"<!-- {name}: {command} -->"
    before, mark, rest = path.read_text().partition(begin)
    _old, end, after = rest.partition(_END)
    if not mark or not end:
        sys.exit(f"{path} has no {begin} with {_END} behind it")
    path.write_text(f"{before}{begin}\n{text}\n{_END}{after}")
