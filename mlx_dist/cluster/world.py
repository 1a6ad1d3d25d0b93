"""The world of ranks: how it comes up, who is who, how ranks agree, and how it ends.

Knows MPI and the fabric; knows no model. The order of initialization matters and is explained
in docs/architecture.md, "How a world comes up".
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import mlx.core as mx

from mlx_dist.cluster import mpi
from mlx_dist.cluster.collective import TensorGroup, kept
from mlx_dist.cluster.control import MEETING_S, Control, LoneWire, Wire, deadline
from mlx_dist.cluster.cores import become_batch_job
from mlx_dist.cluster.ending import Ending, bounded, hold_back_sigterm
from mlx_dist.cluster.fabric import FabricWire
from mlx_dist.cluster.mpi import MpiWire
from mlx_dist.cluster.pulse import Pulse
from mlx_dist.cluster.watch import Watch
from mlx_dist.config import HEARTBEAT_TIMEOUT_S, Fabric
from mlx_dist.errors import AgreedError, ConfigError, MlxDistError, WorldError
from mlx_dist.messages import Address, Identity, Outcome, expect

# MPI and a ring come up when the last rank has started.
JOIN_S = 60.0
_LEAVING_S = 30.0


@dataclass(frozen=True, slots=True)
class Streams:
    """CPU streams of their own for sending and receiving.

    On one stream a receive that waits would hold up every later send.
    """

    send: mx.Stream = field(default_factory=lambda: mx.new_stream(mx.cpu))
    receive: mx.Stream = field(default_factory=lambda: mx.new_stream(mx.cpu))


@dataclass(frozen=True, slots=True)
class World:
    """All ranks of this run, seen from one of them.

    `group` is None in a world of one, where nothing is ever sent.
    """

    rank: int
    size: int
    fabric: str
    control: Control
    group: mx.distributed.Group | None
    hosts: tuple[str, ...]
    streams: Streams
    pulse: Pulse
    ending: Ending
    watch: Watch | None = None
    mpi_wire: MpiWire | None = None

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def is_direct(self) -> bool:
        """Whether the fabric connects any two ranks; a ring connects neighbours only.

        Over jaccl it has not been tried.
        """
        return self.fabric == "mpi"

    @property
    def talks_directly(self) -> bool:
        """Whether any two ranks can send each other messages; without MPI neighbours only can."""
        return self.mpi_wire is not None

    @property
    def leader_rank(self) -> int:
        return 0

    @property
    def host(self) -> str:
        return self.hosts[self.rank]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """A block that every rank runs, and that fails on all ranks if it fails on one.

        Raises AgreedError, the same on every rank, if the block raises MlxDistError on any.
        """
        error = None
        try:
            yield
        except AgreedError:
            raise
        except MlxDistError as caught:
            error = str(caught)
        outcomes = [expect(m, Outcome) for m in self.control.all_gather(Outcome(error))]
        failed = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if not failed:
            return
        if len(failed) == self.size and len(set(failed.values())) == 1:
            raise AgreedError(failed[self.leader_rank])
        raise AgreedError(
            "; ".join(f"rank {rank} ({self.hosts[rank]}): {what}" for rank, what in failed.items())
        )

    @contextmanager
    def decision(self) -> Iterator[None]:
        """As `agreement`, of a block in which only the leader does anything."""
        try:
            with self.agreement():
                yield
        except AgreedError as error:
            # What is wrong is nothing of the leader's host.
            raise AgreedError(
                str(error).removeprefix(f"{self._name([self.leader_rank])}: ")
            ) from None

    def compare(self, facts: dict[str, str]) -> None:
        """Raise AgreedError, the same on every rank, unless `facts` are equal on all of them."""
        gathered = self.control.all_gather(Identity(self.host, facts), MEETING_S)
        identities = [expect(message, Identity) for message in gathered]
        differences = []
        for fact in sorted({name for identity in identities for name in identity.facts}):
            ranks_with: dict[str, list[int]] = {}
            for rank, identity in enumerate(identities):
                ranks_with.setdefault(identity.facts.get(fact, "nothing"), []).append(rank)
            if len(ranks_with) > 1:
                values = ", ".join(
                    f"{value} on {self._name(ranks)}" for value, ranks in ranks_with.items()
                )
                differences.append(f"{fact} is {values}")
        if differences:
            raise AgreedError(
                f"the ranks differ: {'; '.join(differences)}; make them equal on every host"
            )

    def _name(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in ranks)

    def tensor_group(self, stages: Sequence[Sequence[int]]) -> TensorGroup | None:
        """This rank's group among `stages`; None where it has a stage, or nothing, of its own.

        Every rank must ask at once. Only MPI can make groups of some of the ranks.
        """
        index = next((i for i, ranks in enumerate(stages) if self.rank in ranks), len(stages))
        own = stages[index] if index < len(stages) else (self.rank,)
        group = self.group
        if group is not None and max(map(len, stages)) not in (1, self.size):
            place = own.index(self.rank)
            group = kept(group.split(index, place))
        return None if group is None or len(own) == 1 else TensorGroup(group)

    def fail(self, error: BaseException) -> NoReturn:
        """Say what happened on this rank and end every rank of the job with code 86."""
        where = f"rank {self.rank} ({self.host})"
        if isinstance(error, MlxDistError):
            lines = f"mlx-dist: error: {where}: {error}"
        else:
            lines = f"mlx-dist: {where} ended by {type(error).__name__}: {error}"
            if isinstance(error, Exception):
                lines = "".join(traceback.format_exception(error)) + lines
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
        self.ending.abort(lines + notes)

    def __enter__(self) -> World:
        if self.size > 1:
            # Uncaught, an exception leaves its rank in MPI_Finalize and the others waiting.
            sys.excepthook = lambda _type, error, _traceback: self.fail(error)
            threading.excepthook = lambda args: self.fail(
                args.exc_value or RuntimeError(f"thread {args.thread} died")
            )
        self.ending.watch()
        if self.watch is not None:
            self.watch.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, AgreedError):
            if self.is_leader:
                print(f"mlx-dist: error: {error}", file=sys.stderr, flush=True)
        elif error is not None and self.size > 1:
            self.fail(error)
        if self.size > 1:
            self.control.all_gather(Outcome())
            mx.synchronize(self.streams.send)
        if self.watch is not None:
            self.watch.stop()
        if self.mpi_wire is not None:
            with deadline(_LEAVING_S):
                self.mpi_wire.finalize()
        sys.excepthook = sys.__excepthook__
        threading.excepthook = threading.__excepthook__


def join(
    fabric: Fabric,
    jaccl_devices: Path | None = None,
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
) -> World:
    """Meet the other ranks, over MPI under mpirun and over the fabric under `mlx.launch`.

    A rank that is silent for `heartbeat_timeout_s` from then on ends the job.
    Raises WorldError if they cannot meet and ConfigError if `fabric` does not go with the launcher.
    """
    pulse = Pulse(heartbeat_timeout_s)
    if mpi.world_size() > 1:
        hold_back_sigterm()
        become_batch_job()
        return _join_under_mpirun(fabric, jaccl_devices, pulse)
    if "MLX_RANK" in os.environ:
        become_batch_job()
        return _join_under_mlx_launch(fabric, pulse)
    if fabric not in (Fabric.auto, Fabric.mpi):
        raise ConfigError(
            f"--fabric {fabric} needs more than one rank; start with -n N, mpirun or mlx.launch"
        )
    return alone()


def alone() -> World:
    """A world of one, which needs no launcher and no MPI."""
    host = socket.gethostname()
    pulse = Pulse(HEARTBEAT_TIMEOUT_S)
    control = Control(LoneWire(), 0)
    return World(0, 1, "none", control, None, (host,), Streams(), pulse, Ending(None))


def _join_under_mpirun(fabric: Fabric, jaccl_devices: Path | None, pulse: Pulse) -> World:
    mpi.prepare()
    if fabric in (Fabric.auto, Fabric.mpi):
        # MLX calls MPI_Init without asking whether MPI is up, so it goes first.
        group = _init_fabric("mpi")
        wire = MpiWire(mpi_is_up=True)
        return _meet(wire.rank, "mpi", wire, group, Streams(), pulse)
    with bounded("MPI has not come up", JOIN_S):
        wire = MpiWire(mpi_is_up=False)
    control = Control(wire, wire.rank, pulse)
    addresses = _exchange_addresses(control, wire.rank)
    os.environ["MLX_RANK"] = str(wire.rank)
    if fabric is Fabric.jaccl:
        if jaccl_devices is None or not jaccl_devices.is_file():
            host = addresses[wire.rank].host
            raise WorldError(f"--jaccl-devices {jaccl_devices} does not exist on {host}")
        os.environ["MLX_IBV_DEVICES"] = str(jaccl_devices)
        os.environ["MLX_JACCL_COORDINATOR"] = addresses[0].endpoint
        group = _init_fabric("jaccl")
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
            json.dump([[address.endpoint] for address in addresses], hostfile)
            hostfile.flush()
            os.environ["MLX_HOSTFILE"] = hostfile.name
            group = _init_fabric("ring")
    hosts = tuple(address.host for address in addresses)
    return _watched(wire.rank, fabric, control, group, hosts, Streams(), pulse, wire)


def _join_under_mlx_launch(fabric: Fabric, pulse: Pulse) -> World:
    launched = "jaccl" if "MLX_IBV_DEVICES" in os.environ else "ring"
    if fabric not in (Fabric.auto, launched):
        raise ConfigError(
            f"--fabric {fabric} does not go with mlx.launch --backend {launched}; leave it out"
        )
    group = _init_fabric(launched)
    streams = Streams()
    wire = FabricWire(group, streams.send, streams.receive)
    return _meet(group.rank(), launched, wire, group, streams, pulse)


def _meet(
    rank: int,
    fabric: str,
    wire: Wire,
    group: mx.distributed.Group,
    streams: Streams,
    pulse: Pulse,
) -> World:
    control = Control(wire, rank, pulse)
    met = control.all_gather(Address(socket.gethostname()), MEETING_S)
    hosts = tuple(expect(message, Address).host for message in met)
    mpi_wire = wire if isinstance(wire, MpiWire) else None
    return _watched(rank, fabric, control, group, hosts, streams, pulse, mpi_wire)


def _watched(
    rank: int,
    fabric: str,
    control: Control,
    group: mx.distributed.Group,
    hosts: tuple[str, ...],
    streams: Streams,
    pulse: Pulse,
    wire: MpiWire | None,
) -> World:
    ending = Ending(wire)
    # Beats have a communicator of their own.
    watch = Watch(rank, hosts, pulse, ending, MpiWire(mpi_is_up=True) if wire else None)
    return World(
        rank, len(hosts), fabric, control, group, hosts, streams, pulse, ending, watch, wire
    )


def _init_fabric(backend: str) -> mx.distributed.Group:
    try:
        with bounded(f"the {backend} fabric has not come up", JOIN_S):
            group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise WorldError(f"the {backend} fabric does not come up: {error}") from None
    return kept(group)


def _exchange_addresses(control: Control, rank: int) -> list[Address]:
    """Every rank's host and a free port on the address by which the others reach it."""
    host = socket.gethostname()
    hosts = [expect(m, Address).host for m in control.all_gather(Address(host), MEETING_S)]
    peers = [peer for peer in hosts if peer != host]
    ip = os.environ.get("MLX_DIST_ADDRESS") or (_own_ip(peers[0]) if peers else "127.0.0.1")
    with socket.socket() as probe:
        try:
            probe.bind((ip, 0))
        except OSError as error:
            raise WorldError(
                f"{ip} is no address of {host} ({error}); set MLX_DIST_ADDRESS to one"
            ) from None
        port = probe.getsockname()[1]
        # Held until all have chosen, so that two ranks of a host do not choose the same.
        gathered = control.all_gather(Address(host, f"{ip}:{port}"), MEETING_S)
    return [expect(message, Address) for message in gathered]


def _own_ip(peer: str) -> str:
    """The address of this host's interface towards `peer`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError as error:
            raise WorldError(
                f"this host cannot find {peer} ({error}); set MLX_DIST_ADDRESS to this host's "
                "own address, or add the name to its hosts file"
            ) from None
        return str(probe.getsockname()[0])
