"""Reading parts of a tensor from its file. Knows files and bytes; knows no models.

MLX reads a safetensors file through anything that looks like one, straight into an array. What it
is given here has a single tensor, made of ranges of another.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dist.model.slicing import Cut

_NAME = "part"
_LENGTH = struct.Struct("<Q")


def read_part(path: Path, data_start: int, entry: dict[str, Any], cut: Cut) -> mx.array:
    """The part `cut` of a tensor in a safetensors file. Raises RuntimeError if it cannot be read.

    `entry` is what the file's header says of the tensor, whose offsets count from `data_start`.
    """
    part: Any = _PartFile(path, data_start, entry, cut)
    tensors: Any = mx.load(part, format="safetensors")
    array: mx.array = tensors[_NAME]
    return array


class _PartFile(io.RawIOBase):
    """Looks like a file with one tensor. Only the bytes of the ranges are touched."""

    def __init__(self, path: Path, data_start: int, entry: dict[str, Any], cut: Cut) -> None:
        self._path = path
        self._shape: Sequence[int] = entry["shape"]
        self._cut = cut
        start, self._end = (data_start + offset for offset in entry["data_offsets"])
        self._start = start
        shape = cut.shape(self._shape)
        self._num_bytes: int = (self._end - start) // self._shape[cut.axis] * shape[cut.axis]
        described = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [0, self._num_bytes]}
        text = json.dumps({_NAME: described}).encode()
        self._header = _LENGTH.pack(len(text)) + text
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        start = self._position
        if start < len(self._header):
            found = self._header[start : start + len(target)]
            target[: len(found)] = found
            self._position += len(found)
            return len(found)
        # MLX reads a tensor at once.
        assert (start, len(target)) == (len(self._header), self._num_bytes)
        self._gather(target)
        self._position += len(target)
        return len(target)

    @property
    def _size(self) -> int:
        return len(self._header) + self._num_bytes

    def _gather(self, target: memoryview) -> None:
        axis, num_bytes = self._cut.axis, self._end - self._start
        outer, length = int(np.prod(self._shape[:axis], dtype=np.int64)), self._shape[axis]
        file = np.memmap(self._path, np.uint8, "r", self._start, (num_bytes,))
        whole = file.reshape(outer, length, -1)
        part = np.frombuffer(target, np.uint8).reshape(outer, -1, whole.shape[2])
        at = 0
        for start, end in self._cut.entries(length):
            part[:, at : at + end - start] = whole[:, start:end]
            at += end - start
