"""How one tensor gets from the leader's files to a rank: read, sent, passed on, received, checked.

Knows what is under way on this rank; knows no schedule (`model.feed` has it). Over MPI a tensor
goes straight to its rank. A ring sends to neighbours only, and each rank passes on what is for
those behind it.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import mlx.core as mx

from mlx_dist.cluster.world import World
from mlx_dist.errors import ModelError, ProtocolError
from mlx_dist.messages import Tensor, Want, expect
from mlx_dist.model.cutting import PartOf, RawTensors, parts_of_files
from mlx_dist.model.files import ModelFiles, WeightFile
from mlx_dist.model.slicing import Cut
from mlx_dist.model.weights import OpenStage

# MLX's shapes are 32-bit numbers, and so are MPI's counts.
_MOST_PIECE_BYTES = 1 << 30
# Of small tensors several are sent at a time, of larger ones one while the next is read.
_IN_FLIGHT_BYTES = 64 << 20

# The raw tensors that a rank lacks, by the tensors of its stage that are made of them.
Needs = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor in a file, as its header says, or what `cut` leaves of it.

    `place` is among the sorted names of all.
    """

    place: int
    name: str
    file: WeightFile
    shape: tuple[int, ...]
    num_bytes: int
    cut: Cut | None = None

    def part(self, cut: Cut | None) -> RawTensor:
        """What `cut` leaves of this whole tensor."""
        if cut is None:
            return self
        shape = cut.shape(self.shape)
        num_bytes = self.num_bytes // self.shape[cut.axis] * shape[cut.axis]
        return replace(self, shape=shape, num_bytes=num_bytes, cut=cut)

    @property
    def want(self) -> Want:
        """This, in an order to the leader."""
        if self.cut is None:
            return Want(self.place)
        return Want(self.place, self.cut.axis, list(self.cut.ranges), self.cut.num_parts)

    def pieces(self) -> list[tuple[int, int, int]]:
        """(first row, end, bytes) of what is sent at once; a row is an entry of the first axis."""
        num_rows = self.shape[0] if self.shape else 1
        row_bytes = self.num_bytes // num_rows
        most = max(1, _MOST_PIECE_BYTES // row_bytes)
        rows = [(start, min(start + most, num_rows)) for start in range(0, num_rows, most)]
        return [(start, end, (end - start) * row_bytes) for start, end in rows]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A tensor that goes from the leader to `rank`."""

    rank: int
    tensor: RawTensor

    def comes_by(self, world: World) -> bool:
        """Whether this rank takes it or passes it on."""
        return self.rank == world.rank or (self.rank > world.rank and not world.is_direct)


def catalog_of(files: ModelFiles) -> dict[str, RawTensor]:
    """All tensors in the model's files, sorted by name: the same wherever the model is."""
    entries = {
        name: (file, tuple(entry["shape"]), entry["data_offsets"])
        for file in files.weights
        for name, entry in file.tensors().items()
    }
    return {
        name: RawTensor(place, name, file, shape, end - start)
        for place, (name, (file, shape, (start, end))) in enumerate(
            sorted(entries.items(), key=lambda entry: entry[0])
        )
    }


class Shelf:
    """The leader's raw tensors: each is read when its turn comes, and not kept."""

    def __init__(self, files: ModelFiles) -> None:
        self._model = files.name
        self._paths = {file.name: file.path for file in files.weights}
        self._part = parts_of_files(files)
        self._lazy: dict[str, RawTensors] = {}

    def take(self, tensor: RawTensor) -> list[mx.array]:
        """The pieces of `tensor` as bytes. Raises ModelError if it cannot be read."""
        try:
            raw = self._whole(tensor) if tensor.cut is None else self._part(tensor.name, tensor.cut)
            rows = [raw[start:end] if raw.ndim else raw for start, end, _ in tensor.pieces()]
            pieces = [row.reshape(-1).view(mx.uint8) for row in rows]
            mx.eval(pieces)
        except (RuntimeError, KeyError) as error:
            raise ModelError(
                f"{self._model}: tensor {tensor.name} cannot be read: {error}"
            ) from None
        return pieces

    def _whole(self, tensor: RawTensor) -> mx.array:
        file = tensor.file.name
        lazy = self._lazy.get(file, {})
        if tensor.name not in lazy:
            # Once more for a tensor that goes to two ranks.
            lazy = self._lazy[file] = cast(RawTensors, mx.load(str(self._paths[file])))
        return lazy.pop(tensor.name)


class Outbox:
    """What this rank is sending, of which a bounded number of bytes is on its way at a time.

    `on_sent` hears of each delivery. `done_s` says when each rank's last one so far was sent, in
    seconds from the beginning.
    """

    def __init__(
        self, world: World, on_sent: Callable[[Delivery], None] = lambda _delivery: None
    ) -> None:
        self._world = world
        self._on_sent = on_sent
        self._in_flight: deque[tuple[Delivery, list[mx.array]]] = deque()
        self._in_flight_bytes = 0
        self._start = time.perf_counter()
        self.done_s: dict[int, float] = {}

    def send(self, delivery: Delivery, pieces: list[mx.array]) -> None:
        """Announce and send the pieces of a delivery's tensor, which are here."""
        self._send(delivery, Tensor(delivery.tensor.place, checksum(pieces)), pieces)

    def pass_on(self, delivery: Delivery, ahead: Tensor) -> None:
        """Send on what `ahead` announced, once it has come."""
        self._send(delivery, ahead, promised(self._world, delivery.tensor))

    def drain(self) -> None:
        """Wait until all is sent."""
        while self._in_flight:
            self._wait_for_first()

    def _send(self, delivery: Delivery, ahead: Tensor, pieces: list[mx.array]) -> None:
        world = self._world
        hop = delivery.rank if world.is_direct else world.rank + 1
        world.control.send(ahead, hop)
        stream = world.streams.send
        sent = [mx.distributed.send(p, hop, group=world.group, stream=stream) for p in pieces]
        _begin(sent)
        self._in_flight.append((delivery, sent))
        self._in_flight_bytes += delivery.tensor.num_bytes
        while len(self._in_flight) > 1 and self._in_flight_bytes > _IN_FLIGHT_BYTES:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        delivery, sent = self._in_flight.popleft()
        mx.eval(sent)
        self._in_flight_bytes -= delivery.tensor.num_bytes
        self.done_s[delivery.rank] = time.perf_counter() - self._start
        self._on_sent(delivery)


class Inbox:
    """The raw tensors that come to this rank, in this order, and what is made of them."""

    def __init__(
        self,
        world: World,
        catalog: Mapping[str, RawTensor],
        needs: Needs,
        cuts: Mapping[str, Cut],
        part_here: PartOf,
    ) -> None:
        names = dict.fromkeys(chain.from_iterable(needs.values()))
        self.tensors = [catalog[name].part(cuts.get(name)) for name in names]
        self.num_bytes = sum(tensor.num_bytes for tensor in self.tensors)
        self._world = world
        self._part_here = part_here
        self._dtypes: dict[str, mx.Dtype] = {}
        self._parts: RawTensors = {}
        self._promised: dict[str, list[mx.array]] = {}
        self._coming: tuple[RawTensor, int] | None = None
        self._arrived: set[str] = set()
        self._unmade = deque(needs.items())

    def promise(self, raw: RawTensors) -> RawTensors:
        """`raw` with what will come in the place of what is not here, where it comes whole."""
        self._dtypes = {tensor.name: raw[tensor.name].dtype for tensor in self.tensors}
        return raw | {t.name: self._promise(t) for t in self.tensors if t.cut is None}

    def part_of(self, name: str, cut: Cut) -> mx.array:
        """The part of a raw tensor that has come, or is in a file here."""
        return self._parts.pop(name) if name in self._parts else self._part_here(name, cut)

    def _promise(self, tensor: RawTensor) -> mx.array:
        dtype = self._dtypes[tensor.name]
        pieces = promised(self._world, tensor)
        self._promised[tensor.name] = pieces
        # Of one piece it is no copy.
        rows = [piece.view(dtype).reshape(-1, *tensor.shape[1:]) for piece in pieces]
        return (rows[0] if len(rows) == 1 else mx.concatenate(rows)).reshape(tensor.shape)

    def begin(self, tensor: RawTensor, ahead: Tensor, stage: OpenStage) -> int:
        """Take `tensor` while the one before is looked at; answers that one's bytes."""
        if tensor.cut is not None:
            self._parts[tensor.name] = self._promise(tensor)
        _begin(self._promised[tensor.name])
        num_bytes = self.finish(stage)
        self._coming = tensor, ahead.checksum
        return num_bytes

    def finish(self, stage: OpenStage) -> int:
        """Wait for what is coming, and make what it was missing for; answers its bytes.

        Raises ProtocolError if they are not what was sent.
        """
        if self._coming is None:
            return 0
        tensor, due = self._coming
        self._coming = None
        # Kept no longer than until the stage's tensors are made of it.
        pieces = self._promised.pop(tensor.name)
        mx.eval(pieces)
        if checksum(pieces) != due:
            raise ProtocolError(
                f"tensor {tensor.name} arrived damaged; start again, and test this host's memory "
                "and network if it does so again"
            )
        del pieces
        self._arrived.add(tensor.name)
        while self._unmade and self._arrived.issuperset(self._unmade[0][1]):
            stage.make(self._unmade.popleft()[0])
        return tensor.num_bytes


def announced(world: World, delivery: Delivery) -> Tensor:
    """What comes ahead of a delivery. Raises ProtocolError if it announces another tensor."""
    ahead = expect(world.control.receive(_source(world)), Tensor)
    tensor = delivery.tensor
    if ahead.place != tensor.place:
        raise ProtocolError(
            f"tensor {ahead.place} was announced where {tensor.place}, {tensor.name}, was due"
        )
    return ahead


def promised(world: World, tensor: RawTensor) -> list[mx.array]:
    """The pieces of `tensor` as bytes, to be received when they are evaluated, in order."""
    source, group, stream = _source(world), world.group, world.streams.receive
    return [
        mx.distributed.recv((num_bytes,), mx.uint8, source, group=group, stream=stream)
        for _, _, num_bytes in tensor.pieces()
    ]


def checksum(pieces: list[mx.array]) -> int:
    """The CRC-32 of bytes that are here."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(memoryview(piece), value)  # type: ignore[arg-type]
    return value


def _source(world: World) -> int:
    """Where this rank's tensors come from, and those that it passes on."""
    return world.leader_rank if world.is_direct else world.rank - 1


def _begin(pieces: list[mx.array]) -> None:
    # One by one, for the order of those that are evaluated together is MLX's.
    for piece in pieces:
        mx.async_eval(piece)  # type: ignore[no-untyped-call]
