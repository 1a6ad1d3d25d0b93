"""What a command of the system prints, for those that read it."""

from __future__ import annotations

import subprocess

_ANSWERS_S = 5.0


def output_of(*command: str) -> str:
    """What `command` prints, or "" where it is not there, fails to answer or prints no text.

    Its exit code does not matter: sysctl fails for one unknown name and prints all others.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWERS_S, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout
