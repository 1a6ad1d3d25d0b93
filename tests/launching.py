"""Real jobs for tests: mlx-dist and small programs under a real mpirun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dist.cluster.launch import mpirun_command

PROGRAMS = Path(__file__).parent / "spmd" / "programs"


@dataclass(frozen=True, slots=True)
class Done:
    """A job that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0 and self.out, self.err
        return json.loads(self.out)

    @property
    def error_lines(self) -> list[str]:
        """What mlx-dist itself said went wrong, without mpirun's own words (which end in NUL)."""
        lines = self.err.replace("\0", "").splitlines()
        return [line for line in lines if line.startswith("mlx-dist: error:")]


def run(
    command: Sequence[str | Path],
    *,
    env: dict[str, str] | None = None,
    stdin: str = "",
    cwd: Path | None = None,
    timeout_s: float = 60,
) -> Done:
    """Run `command` to its end. A hang fails the test, and leaves no process behind."""
    with subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | (env or {}),
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{command} hung for {timeout_s} s:\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


def mlx_dist(*arguments: str | Path, num_ranks: int = 1, **options: Any) -> Done:
    """Run `mlx-dist ARGUMENTS` on `num_ranks` ranks."""
    command = [sys.executable, "-m", "mlx_dist", *arguments]
    if num_ranks > 1:
        command += ["-n", str(num_ranks)]
    return run(command, **options)


def program(name: str, *arguments: str | Path, num_ranks: int, **options: Any) -> Done:
    """Run tests/spmd/programs/NAME.py on `num_ranks` ranks."""
    python = [str(PROGRAMS / f"{name}.py"), *map(str, arguments)]
    return run(mpirun_command(num_ranks, None, python), **options)
