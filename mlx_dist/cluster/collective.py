"""Sums over a tensor group, on the fabric. Knows arrays; knows no model."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

# Of more than these, what comes between sums costs as much as they do.
_SMALL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Ranks that compute every layer together.

    What it answers is computed where it is needed, by all ranks of the group in the same order.
    """

    group: mx.distributed.Group

    @property
    def size(self) -> int:
        return self.group.size()

    def sum(self, array: mx.array) -> mx.array:
        """The sum of every rank's array, on every rank."""
        return mx.distributed.all_sum(array, group=self.group)

    def gather(self, array: mx.array) -> mx.array:
        """Every rank's array, one after the other along the first axis, on every rank."""
        return mx.distributed.all_gather(array, group=self.group)

    def sum_s(self, num_bytes: int, dtype: mx.Dtype, num_sums: int, num_trials: int) -> float:
        """Seconds of a sum of so many bytes, one of several in a row; the median of some trials.

        Every rank of the group must measure at the same time.
        """
        array, one = mx.zeros((num_bytes // dtype.size,), dtype), mx.ones((1,), dtype)
        mx.eval(array, one)
        times = []
        for _ in range(1 + num_trials):
            start, total = time.perf_counter(), array
            for _ in range(num_sums):
                # As between a layer's sums, the device that computes has its turn.
                total = self.sum(total * one if num_bytes <= _SMALL_BYTES else total)
            mx.eval(total)
            times.append((time.perf_counter() - start) / num_sums)
        return median(times[1:])


def kept(group: mx.distributed.Group) -> mx.distributed.Group:
    """The group, which never dies: MLX frees its communicator then, and MPI may be over."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group
