"""Reading a server's log while it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_dist.errors import ConfigError

_LOOK_EVERY_S = 0.2
_BLOCK_BYTES = 1 << 16


def follow(log: Path, num_lines: int | None, is_over: Callable[[], bool]) -> Iterator[str]:
    """The last `num_lines` lines of `log`, or all of them, and then each that is written.

    Ends once `is_over` and everything is read. Lines come without their end, and without the NUL
    characters of mpirun's. Raises ConfigError if there is no log.
    """
    try:
        file = log.open("rb")
    except OSError as error:
        raise ConfigError(f"there is no log: {log}: {error.strerror}") from None
    with file:
        if num_lines is not None:
            file.seek(_start_of_last(log, num_lines))
        rest = b""
        while True:
            # Asked before reading, or what is written in between is lost.
            is_last = is_over()
            while block := file.read(_BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                yield from map(_as_text, lines)
            if is_last:
                break
            time.sleep(_LOOK_EVERY_S)
        if rest:
            yield _as_text(rest)


def tail(log: Path, num_lines: int) -> list[str]:
    """The last `num_lines` lines of `log`. Raises ConfigError if there is no log."""
    return list(follow(log, num_lines, lambda: True))


def errors_in(log: Path) -> list[str]:
    """What mlx-dist says went wrong, near the end of `log`."""
    begins = "mlx-dist: error: "
    return [line.removeprefix(begins) for line in tail(log, 1000) if line.startswith(begins)]


def _as_text(line: bytes) -> str:
    return line.decode(errors="replace").replace("\0", "").rstrip("\r")


def _start_of_last(log: Path, num_lines: int) -> int:
    """Where in `log` its last `num_lines` lines begin."""
    with log.open("rb") as file:
        position = file.seek(0, 2)
        if num_lines < 1:
            return position
        # The last line's own end is no border.
        borders_left = num_lines + 1
        is_at_end = True
        while position > 0:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            block = file.read(size)
            if is_at_end and not block.endswith(b"\n"):
                borders_left -= 1
            is_at_end = False
            found = len(block)
            while (found := block.rfind(b"\n", 0, found)) >= 0:
                borders_left -= 1
                if borders_left == 0:
                    return position + found + 1
        return 0
