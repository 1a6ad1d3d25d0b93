"""What was measured, kept in the user's cache folder for the next start."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


def recall(kind: str, facts: Mapping[str, object], of_type: type[T]) -> T | None:
    """What was kept of this `kind` and type under exactly these `facts`, or None.

    What another release kept is not of this type, unless it had the same fields.
    """
    try:
        return msgspec.json.decode(_path(kind, facts, of_type).read_bytes(), type=of_type)
    except (OSError, msgspec.DecodeError):
        return None


def keep(kind: str, facts: Mapping[str, object], value: object) -> None:
    """Keep `value`, a struct or dataclass. Where that fails it is said on stderr, and no more."""
    path = _path(kind, facts, type(value))
    # Ranks of one host may keep the same at the same time.
    whole = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_bytes(msgspec.json.encode(value))
        whole.replace(path)
    except OSError as error:
        print(f"mlx-dist: {kind} are not remembered: {error}", file=sys.stderr)


def _path(kind: str, facts: Mapping[str, object], of_type: type) -> Path:
    known = [facts, msgspec.json.schema(of_type)]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / kind.replace(" ", "_") / f"{key}.json"


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mlx_dist"
