"""What a chat template may still use, and what a step of it would use. Knows no templates.

Sizes are those of values written out: characters of text and items, each as often as it comes.
What is over the limit is a SecurityError, as for whatever else Jinja's sandbox forbids.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

# Of one value: characters of text and items, each as often as it would be written out.
_MOST_SIZE = 1 << 23
# Of all values that the renderings of one prompt make.
_MOST_IN_ALL = 1 << 27
_MOST_CPU_S = 5.0
# In characters, by the memory that it takes.
_ITEM_SIZE = 16
# Numbers of more, as JSON can have, are not computed with. Below this no two share a hash.
_MOST_BITS = 60
# A search from the end may take the product of both lengths.
_MOST_STEPS = 1 << 28
# What writes one of its arguments for each item or line of its text.
_REPEATING = ("batch", "expandtabs", "indent", "slice", "tojson")
TEXT = (str, bytes)
SIZED = (str, bytes, list, tuple, dict)
_WIDE_FIELD = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")


class Allowance:
    """What the renderings of one prompt may still use. Belongs to one thread."""

    def __init__(self) -> None:
        self._left = _MOST_IN_ALL
        self._until_s = time.thread_time() + _MOST_CPU_S
        # By id, with the container, whose id else might become another's. None is ever changed.
        self._sizes: dict[int, tuple[Any, int]] = {}
        # Those do change, yet not while one value is looked at.
        self._namespaces: dict[int, int] = {}

    def spend(self, size: int) -> None:
        """Count `size` characters or items more. Raises SecurityError for too many, or too late."""
        self._left -= size + 1
        if self._left < 0:
            raise SecurityError(f"it makes more than {_MOST_IN_ALL} characters")
        if time.thread_time() > self._until_s:
            raise SecurityError(f"it has not come to an end in {_MOST_CPU_S:.0f} s")

    def checked(self, value: Any) -> int:
        """The size of `value` written out. Raises SecurityError if it is too large to be."""
        self._namespaces.clear()
        return self.fitting(self._size(value))

    def remember(self, container: Any, size: int) -> None:
        """Take `size` for the size of a container, which need not be looked through then."""
        self._sizes[id(container)] = container, size

    @staticmethod
    def fitting(size: int) -> int:
        """`size`. Raises SecurityError if no value may have it."""
        if size > _MOST_SIZE:
            raise SecurityError(f"it makes a value of more than {_MOST_SIZE} characters")
        return size

    def _size(self, value: Any) -> int:
        if isinstance(value, TEXT):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 8
        if isinstance(value, Namespace):
            if id(value) not in self._namespaces:
                attributes = object.__getattribute__(value, "_Namespace__attrs")
                self._namespaces[id(value)] = 1 + sum(map(self._size, attributes.values()))
            return self._namespaces[id(value)]
        if not isinstance(value, list | tuple | dict):
            return 1
        if (known := self._sizes.get(id(value))) is not None:
            return known[1]
        parts = chain(value, value.values()) if isinstance(value, dict) else value
        size = 1 + sum(map(self._size, parts)) + _ITEM_SIZE * len(value)
        self.remember(value, size)
        return size


_ALLOWANCE: ContextVar[Allowance] = ContextVar("allowance")


@contextmanager
def bounded() -> Iterator[None]:
    """A block in which all renderings of this thread share one allowance."""
    token = _ALLOWANCE.set(Allowance())
    try:
        yield
    finally:
        _ALLOWANCE.reset(token)


def current() -> Allowance:
    """What the rendering under way may still use, or one step where there is none."""
    return _ALLOWANCE.get(None) or Allowance()


def check_call(allowance: Allowance, name: str, value: Any, others: tuple[Any, ...]) -> None:
    """Raise SecurityError if the filter or text's method `name` makes of `value` too much."""
    check_numbers(others)
    size = allowance.checked(value)
    sizes = [allowance.checked(other) for other in others]
    texts = [other for other in others if isinstance(other, TEXT)]
    if isinstance(value, TEXT) and name not in ("default", "d"):
        _check_steps(size * max(map(len, texts), default=0))
    if name == "replace" and len(texts) > 1:
        allowance.fitting(size + str(value).count(str(texts[0])) * len(texts[1]))
    elif name in ("format", "format_map"):
        # One a filter of fields with %, the other a method of fields in braces.
        _check_fields(allowance, value, list(others))
    elif name == "sum" and any(isinstance(other, list | tuple) for other in others):
        # Each sum of lists is a copy of the one before.
        raise SecurityError("it sums what are no numbers")
    elif name in _REPEATING:
        numbers = [other for other in others if isinstance(other, int)]
        _check_steps(size * max([*numbers, *sizes], default=0))


def check_made(allowance: Allowance, made: Any) -> int:
    """The size of what a step has made. Raises SecurityError if it is too large."""
    if isinstance(made, int) and made.bit_length() > _MOST_BITS:
        raise SecurityError(f"it makes a number of more than {_MOST_BITS} bits")
    return allowance.checked(made)


def pieces_of(allowance: Allowance, pieces: Any, separator: Any) -> Any:
    """`pieces`, which may have had no length, if they can be joined."""
    if not isinstance(pieces, SIZED):
        pieces = list(pieces)
    between = max(len(pieces) - 1, 0) * allowance.checked(separator)
    allowance.fitting(allowance.checked(pieces) + between)
    return pieces


def _check_fields(allowance: Allowance, text: Any, values: Any) -> None:
    """Raise SecurityError if `text` does not fit with `values` in its fields."""
    size = allowance.checked(text)
    if isinstance(text, TEXT):
        plain = text if isinstance(text, str) else text.decode("latin-1")
        if _WIDE_FIELD.search(plain.replace("{{", "").replace("}}", "")):
            raise SecurityError("it formats a text with fields of great width")
        num_fields = max(plain.count("{"), plain.count("%"))
        allowance.fitting(size + num_fields * allowance.checked(values))


def check_operation(allowance: Allowance, operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError if `operator` makes too much of both."""
    sizes = allowance.checked(left), allowance.checked(right)
    if operator == "%":
        _check_fields(allowance, left, right)
    elif operator == "+":
        allowance.fitting(sum(sizes))
    elif isinstance(left, int) and isinstance(right, int):
        if operator == "**" and left.bit_length() * right > 2 * _MOST_BITS:
            raise SecurityError(f"it makes a number of more than {_MOST_BITS} bits")
    elif isinstance(left, SIZED) and isinstance(right, int):
        allowance.fitting(sizes[0] * max(right, 1))
    elif isinstance(left, int) and isinstance(right, SIZED):
        allowance.fitting(sizes[1] * max(left, 1))


def _check_steps(num_steps: int) -> None:
    if num_steps > _MOST_STEPS:
        raise SecurityError(f"a single one of its calls takes {num_steps:.0e} steps")


def check_numbers(values: tuple[Any, ...]) -> None:
    """Raise SecurityError for a number that would be too great a length."""
    if any(isinstance(value, int) and value > _MOST_SIZE for value in values):
        raise SecurityError(f"it asks for more than {_MOST_SIZE} characters")
