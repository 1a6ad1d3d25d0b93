"""The control plane on the fabric itself, for worlds without MPI. Knows bytes, no messages."""

from __future__ import annotations

import struct

import mlx.core as mx
import numpy as np

from mlx_dist.cluster.control import deadline


class FabricWire:
    """The control plane on the fabric itself, for worlds without MPI.

    `mlx.distributed` needs to know each size before it receives, so a frame travels as blocks of
    `BLOCK_BYTES`, the first of which begins with the frame's length. A waiting rank spins: the
    fabric has no way to look whether something has come.
    """

    can_poll = False
    BLOCK_BYTES = 4096
    _LENGTH = struct.Struct("<I")

    def __init__(
        self, group: mx.distributed.Group, send_stream: mx.Stream, receive_stream: mx.Stream
    ) -> None:
        self._group = group
        # The same streams as the arrays', so that frames and arrays keep their order.
        self._send_stream = send_stream
        self._receive_stream = receive_stream

    def send(self, frame: bytes, destination: int) -> None:
        for block in self._blocks(frame):
            # One by one: of those that are evaluated together MLX sends the last one first.
            mx.eval(
                mx.distributed.send(
                    _array(block), destination, group=self._group, stream=self._send_stream
                )
            )

    def receive(self, source: int, is_idle: bool = False) -> bytes:
        frame = self._receive_block(source)
        (length,) = self._LENGTH.unpack_from(frame)
        while len(frame) < self._LENGTH.size + length:
            frame += self._receive_block(source)
        return frame[self._LENGTH.size : self._LENGTH.size + length]

    def poll(self, source: int) -> bytes | None:
        raise AssertionError("nobody can look whether a fabric has something")

    def all_gather(self, frame: bytes, deadline_s: float | None) -> list[bytes]:
        with deadline(deadline_s):
            blocks = self._blocks(frame)
            num_blocks = self._most(len(blocks))
            block_of = mx.zeros((num_blocks * self.BLOCK_BYTES,), mx.uint8)
            block_of[: len(blocks) * self.BLOCK_BYTES] = _array(b"".join(blocks))
            gathered = mx.distributed.all_gather(
                block_of[None], group=self._group, stream=self._send_stream
            )
            mx.eval(gathered)
        frames = []
        for row in gathered:
            data = np.array(row).tobytes()
            (length,) = self._LENGTH.unpack_from(data)
            frames.append(data[self._LENGTH.size : self._LENGTH.size + length])
        return frames

    def _blocks(self, frame: bytes) -> list[bytes]:
        data = self._LENGTH.pack(len(frame)) + frame
        data += bytes(-len(data) % self.BLOCK_BYTES)
        return [data[i : i + self.BLOCK_BYTES] for i in range(0, len(data), self.BLOCK_BYTES)]

    def _receive_block(self, source: int) -> bytes:
        block = mx.distributed.recv(
            (self.BLOCK_BYTES,), mx.uint8, source, group=self._group, stream=self._receive_stream
        )
        mx.eval(block)
        return np.array(block).tobytes()

    def _most(self, count: int) -> int:
        counts = mx.distributed.all_gather(
            mx.array([count], mx.int32), group=self._group, stream=self._send_stream
        )
        return int(np.array(counts).max())


def _array(data: bytes) -> mx.array:
    return mx.array(np.frombuffer(data, np.uint8))
