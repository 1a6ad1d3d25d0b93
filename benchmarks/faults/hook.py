"""Makes a rank fail from within: appended, on a host of the lab, to modules of the product.

Order a fault with `order`; the next plan, or the next loading, on that host meets it, once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CODE = 7
# By file: what is put behind its last line.
WRAPPED = {
    "engine/program.py": """
from benchmarks.faults import hook
Rank.execute = hook.failing(Rank.execute, "plan", "{folder}")
""",
    "engine/session.py": """
from benchmarks.faults import hook
load_stage = hook.failing(load_stage, "load", "{folder}")
""",
}


class OrderedError(Exception):
    """What was ordered."""


def order(folder: Path, host: str, where: str, kind: str) -> Path:
    """Order `kind`, raise or exit, of the rank on `host` in its next plan or load.

    The file that is returned appears when it happens, and has the time by the machine's clock.
    """
    done = folder / f"{host}-{where}-done"
    done.unlink(missing_ok=True)
    ordered = folder / f"{host}-{where}-new"
    ordered.write_text(kind)
    ordered.rename(folder / f"{host}-{where}")
    return done


def failing(run: Callable[..., Any], where: str, folder: str) -> Callable[..., Any]:
    """`run`, which fails instead once that is ordered."""
    path = f"{folder}/{socket.gethostname()}-{where}"

    def run_or_fail(*args: Any, **options: Any) -> Any:
        if Path(path).exists():
            _fail(path)
        return run(*args, **options)

    return run_or_fail


def _fail(path: str) -> None:
    kind = Path(path).read_text()
    Path(path).unlink()
    Path(f"{path}-part").write_text(str(time.monotonic()))
    Path(f"{path}-part").rename(f"{path}-done")
    if kind == "exit":
        os._exit(_CODE)
    raise OrderedError("a fault that was ordered")
