"""The embedded model: its text, its training and its files. Knows nothing of ranks."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR"]
