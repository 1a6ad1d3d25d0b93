"""Becomes a command that ends when the process that started it does: bound.py PARENT COMMAND...

Run as a file by a bare Python, which is sooner there than a package. On Linux only: elsewhere the
first rank's line to the supervisor must do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; it outlasts an exec.


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # It may have gone before it was asked for.
        if os.getppid() != parent:
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
