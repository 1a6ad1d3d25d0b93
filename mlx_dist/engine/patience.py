"""Work that need not end, done in threads that can be left to themselves. Knows no text.

A tokenizer's patterns came with the model, and matching one may take as good as forever. It does
so in native code, which nothing can interrupt, and which lets other threads run meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from mlx_dist.errors import RequestError

T = TypeVar("T")


class Patience:
    """Waits `limit_s` for each piece of work, and leaves at most `most_left` to themselves.

    Those go on in their threads, which end with the process.
    """

    def __init__(self, limit_s: float = 60.0, most_left: int = 2) -> None:
        self._limit_s = limit_s
        self._most_left = most_left
        self._left: list[threading.Thread] = []
        self._lock = threading.Lock()

    def do(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Raises RequestError if it breaks or does not end."""
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:
                failed.append(error)

        with self._lock:
            self._left = [thread for thread in self._left if thread.is_alive()]
            if len(self._left) >= self._most_left:
                raise RequestError(f"{what} is still busy with earlier prompts; try another model")
        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()
        thread.join(self._limit_s)
        if done:
            return done[0]
        if failed:
            raise sayable(failed[0], what)
        with self._lock:
            self._left.append(thread)
        raise RequestError(f"{what} takes more than {self._limit_s:.0f} s for this prompt")


def sayable(error: BaseException, what: str) -> BaseException:
    """`error`, or a RequestError for what native code raises that is no Exception."""
    if type(error).__module__ != "pyo3_runtime":
        return error
    return RequestError(f"{what} breaks on this prompt: {str(error)[:300]}")
