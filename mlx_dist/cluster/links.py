"""Latency and rate between every two ranks, over the fabric and over the control plane.

Knows frames and arrays; knows no model. Pairs are measured one after the other, in an order that
all ranks know, so that they do not disturb each other. The lower rank of a pair decides how much
is sent and announces it; the other one sends everything back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Protocol

import mlx.core as mx

from mlx_dist.cluster import network, traffic
from mlx_dist.cluster.costs import Link
from mlx_dist.cluster.world import World
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Identity, Interface, LinkReport, Outcome, Ping, SumReport, expect

_NUM_WARMUPS = 2
_NUM_TRIPS = 20
# Where a trip takes long, few tell enough.
_FEWEST_TRIPS = 5
_TRIPS_S = 0.1
_FIRST_BYTES = 64 << 10
_GROWTH = 4
_NUM_REPEATS = 2
# What takes so long is large enough for a rate: by then a connection has reached it.
_ENOUGH_S = 0.05
_LARGEST_ARRAY_BYTES = 4 << 20
_LARGEST_FRAME_BYTES = 256 << 10

# Of a sum: from one hidden vector of a small model to those of a chunk of a large one's prompt, and
# how many of them follow each other, as layers' do.
_SUMS = {4 << 10: 8, 32 << 10: 8, 256 << 10: 4, 4 << 20: 2}
_NUM_SUM_TRIALS = 5

_NOWHERE = Link(0.0, math.inf)
_UNREACHABLE = Link(math.inf, math.inf)

Row = tuple[Link | None, ...]


@dataclass(frozen=True, slots=True)
class LinkMatrix:
    """Row: from that rank, column: to that one. Equal on every rank.

    A link is half a round trip, so the two directions of a pair are the same. It is None where
    the carrier does not connect the pair: a ring goes to neighbours only. `used` names the
    interface that the arrays went by, or None within a host; `warnings` say where a faster one
    lies idle.
    """

    fabric: tuple[Row, ...]
    control: tuple[Row, ...]
    used: tuple[tuple[Interface | None, ...], ...]
    warnings: tuple[str, ...]

    def for_placement(self) -> tuple[tuple[Link, ...], ...]:
        """The fabric's links, and for pairs that it does not connect one that takes for ever."""
        return tuple(tuple(link or _UNREACHABLE for link in row) for row in self.fabric)


def measure(world: World) -> LinkMatrix:
    """Measure all links. Every rank must call this at the same time.

    A pair takes 0.1 s at 10 Gbit/s, 0.3 s at 1 Gbit/s and up to 1 s below that.
    """
    interfaces = network.interfaces()
    row = _Row(world.size, frozenset(interface.name for interface in interfaces))
    for low, high in combinations(range(world.size), 2):
        if world.rank in (low, high):
            _measure_pair(world, low, high, row)
        # Nobody begins before all are done.
        world.control.all_gather(Outcome())
    used = [
        None if peer == world.host else _interface(peer, row.carriers[rank], interfaces)
        for rank, peer in enumerate(world.hosts)
    ]
    report = LinkReport(row.fabric, row.control, used, interfaces)
    reports = [expect(message, LinkReport) for message in world.control.all_gather(report)]
    return LinkMatrix(
        fabric=_matrix([r.fabric for r in reports]),
        control=_matrix([r.control for r in reports]),
        used=tuple(tuple(r.used) for r in reports),
        warnings=_warnings(world.hosts, reports),
    )


def measure_sums(
    world: World, sizes: Sequence[int], dtype: str | None
) -> dict[int, dict[int, float]]:
    """Seconds of a sum over tensor groups of each of `sizes` ranks, by its bytes.

    Every rank must call this at the same time; the answer is the same on all: that of the slowest
    group, while all groups of a size are at it. `dtype` is the leader's, others may give None.
    """
    told = world.control.all_gather(Identity(world.host, {"dtype": dtype or ""}))
    kind = getattr(mx, expect(told[world.leader_rank], Identity).facts["dtype"])
    found: dict[int, dict[int, float]] = {}
    for size in sizes:
        firsts = range(0, world.size, size)
        group = world.tensor_group([range(first, first + size) for first in firsts])
        if group is None:
            continue
        own = {
            num_bytes: group.sum_s(num_bytes, kind, num_sums, _NUM_SUM_TRIALS)
            for num_bytes, num_sums in _SUMS.items()
        }
        gathered = world.control.all_gather(SumReport(own))
        reports = [expect(message, SumReport).seconds for message in gathered]
        found[size] = {n: max(seconds[n] for seconds in reports) for n in _SUMS}
    return found


class _Row:
    """What one rank finds out of its links, filled pair by pair. Seconds and bytes a second."""

    def __init__(self, size: int, names: frozenset[str]) -> None:
        self.interface_names = names
        self.fabric: list[tuple[float, float] | None] = [None] * size
        self.control: list[tuple[float, float] | None] = [None] * size
        self.carriers: list[str | None] = [None] * size


def _measure_pair(world: World, low: int, high: int, row: _Row) -> None:
    peer = high if world.rank == low else low
    planes: list[tuple[_Plane, list[tuple[float, float] | None]]] = []
    is_near = _are_neighbours(world.size, low, high)
    if is_near or world.mpi_wire is not None:
        planes.append((_ControlPlane(world, peer), row.control))
    if is_near or world.is_direct:
        planes.append((_FabricPlane(world, peer), row.fabric))
    before, num_bytes = traffic.sent_bytes(row.interface_names), 0
    for plane, found in planes:
        if world.rank == low:
            found[peer], sent_bytes = _sound(plane)
            world.control.send(Outcome(), peer)
        else:
            sent_bytes = _send_back(world, plane, peer)
        num_bytes += sent_bytes
    # Nearly all of it are arrays.
    after = traffic.sent_bytes(row.interface_names)
    row.carriers[peer] = traffic.carrier(before, after, num_bytes)


class _Plane(Protocol):
    """One way from this rank to a peer and back."""

    largest_bytes: int

    def trips_s(self, num_bytes: int, num_trips: int) -> list[float]:
        """Send so many bytes to the peer and have them sent back, so many times; seconds each."""

    def send_back(self, ping: Ping) -> None:
        """The peer's part of what `ping` announces."""


class _ControlPlane:
    largest_bytes = _LARGEST_FRAME_BYTES

    def __init__(self, world: World, peer: int) -> None:
        self._control = world.control
        self._peer = peer

    def trips_s(self, num_bytes: int, num_trips: int) -> list[float]:
        ping = Ping(padding=bytes(num_bytes))
        return [_seconds(lambda: self._trip(ping)) for _ in range(num_trips)]

    def send_back(self, ping: Ping) -> None:
        self._control.send(ping, self._peer)

    def _trip(self, ping: Ping) -> None:
        self._control.send(ping, self._peer)
        expect(self._control.receive(self._peer), Ping)


class _FabricPlane:
    largest_bytes = _LARGEST_ARRAY_BYTES

    def __init__(self, world: World, peer: int) -> None:
        self._world = world
        self._peer = peer

    def trips_s(self, num_bytes: int, num_trips: int) -> list[float]:
        array = mx.zeros((num_bytes,), mx.uint8)
        mx.eval(array)
        self._world.control.send(Ping(num_bytes, num_trips), self._peer)
        expect(self._world.control.receive(self._peer), Ping)
        return [_seconds(lambda: self._trip(array)) for _ in range(num_trips)]

    def send_back(self, ping: Ping) -> None:
        # The peer waits for this, so that the first trip is as long as the others.
        self._world.control.send(Ping(), self._peer)
        for _ in range(ping.num_arrays):
            self._send(self._receive(ping.array_bytes))

    def _trip(self, array: mx.array) -> None:
        self._send(array)
        self._receive(array.size)

    def _send(self, array: mx.array) -> None:
        world = self._world
        mx.eval(
            mx.distributed.send(array, self._peer, group=world.group, stream=world.streams.send)
        )

    def _receive(self, num_bytes: int) -> mx.array:
        world = self._world
        received = mx.distributed.recv(
            (num_bytes,), mx.uint8, self._peer, group=world.group, stream=world.streams.receive
        )
        mx.eval(received)
        return received


def _sound(plane: _Plane) -> tuple[tuple[float, float], int]:
    """(seconds one way, bytes a second) of `plane`, and how many bytes were sent for the rate.

    The rate is that of the largest transfer less one of a quarter of it: what does not grow with
    the size, such as MPI asking whether it may send, falls out.
    """
    first_s = min(plane.trips_s(1, _NUM_WARMUPS))
    num_trips = max(_FEWEST_TRIPS, min(_NUM_TRIPS, int(_TRIPS_S / first_s)))
    latency_s = median(plane.trips_s(1, num_trips)) / 2
    num_bytes, sent_bytes = _FIRST_BYTES, _NUM_REPEATS * _FIRST_BYTES
    way_s = min(plane.trips_s(num_bytes, _NUM_REPEATS)) / 2
    bytes_per_s = num_bytes / max(way_s - latency_s, way_s / 2)
    while num_bytes < plane.largest_bytes and way_s < _ENOUGH_S:
        smaller_s, smaller_bytes = way_s, num_bytes
        num_bytes *= _GROWTH
        sent_bytes += _NUM_REPEATS * num_bytes
        way_s = min(plane.trips_s(num_bytes, _NUM_REPEATS)) / 2
        bytes_per_s = (num_bytes - smaller_bytes) / max(way_s - smaller_s, way_s / 2)
    return (latency_s, bytes_per_s), sent_bytes


def _send_back(world: World, plane: _Plane, peer: int) -> int:
    """Send back what `peer` sends until it is done; how many bytes that were."""
    sent_bytes = 0
    while True:
        match world.control.receive(peer):
            case Ping() as ping:
                plane.send_back(ping)
                sent_bytes += len(ping.padding) + ping.array_bytes * ping.num_arrays
            case Outcome():
                return sent_bytes
            case other:
                raise ProtocolError(f"{type(other).__name__} arrived where Ping was due")


def _seconds(trip: Callable[[], None]) -> float:
    start = time.perf_counter()
    trip()
    return time.perf_counter() - start


def _are_neighbours(size: int, low: int, high: int) -> bool:
    return high - low in (1, size - 1)


def _interface(host: str, carrier: str | None, interfaces: list[Interface]) -> Interface | None:
    """The interface that led to `host`: the one that was seen to, else the one by the routes."""
    by_route = network.interface_towards(host, interfaces)
    if by_route is not None and by_route.name == carrier:
        return by_route
    return next((interface for interface in interfaces if interface.name == carrier), by_route)


def _matrix(rows: list[list[tuple[float, float] | None]]) -> tuple[Row, ...]:
    """All links, of which each pair's lower rank has measured one direction for both."""
    ranks = range(len(rows))

    def link(a: int, b: int) -> Link | None:
        if a == b:
            return _NOWHERE
        measured = rows[min(a, b)][max(a, b)]
        return None if measured is None else Link(*measured)

    return tuple(tuple(link(a, b) for b in ranks) for a in ranks)


def _warnings(hosts: tuple[str, ...], reports: list[LinkReport]) -> tuple[str, ...]:
    """What is worth saying of the interfaces used, once for two hosts."""
    said: dict[frozenset[str], str] = {}
    for a, b in combinations(range(len(hosts)), 2):
        for here, there in ((a, b), (b, a)):
            used = reports[here].used[there]
            if used is None:
                continue
            warning = network.warning(used, reports[here].interfaces, reports[there].interfaces)
            if warning is not None:
                words = f"{hosts[here]} -> {hosts[there]}: {warning}"
                said.setdefault(frozenset((hosts[a], hosts[b])), words)
    return tuple(said.values())
