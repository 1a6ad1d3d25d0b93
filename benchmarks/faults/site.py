"""Where a campaign runs: three hosts of the tests' lab, or this machine alone."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx_dist
from benchmarks.faults.clients import Address
from benchmarks.faults.deck import HOSTS
from benchmarks.faults.hook import WRAPPED
from benchmarks.faults.processes import (
    Process,
    first_process_of,
    namespace_of,
    processes_of,
    processes_on,
)
from benchmarks.servers import free_port
from mlx_dist.cluster import jobs
from tests.cluster import hosts as lab

_NUM_RANKS = 3
_PORT = 8123


@dataclass(frozen=True, slots=True)
class Site:
    """The hosts, if there are any: `namespaces` names the processes' ones."""

    folder: Path
    cluster: lab.Cluster | None = None
    namespaces: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_lab(self) -> bool:
        return self.cluster is not None

    def address(self) -> Address:
        """Where a server here will listen, as its clients see it."""
        if self.cluster is None:
            return Address("127.0.0.1", free_port())
        network = Path("/run/netns", lab.namespace_of(HOSTS[0]))
        return Address("127.0.0.1", _PORT, network)

    def serve(self, address: Address, flags: list[str], log: Path) -> Server:
        """Start a supervised server; its words go to `log`."""
        job = secrets.token_hex(8)
        command = [sys.executable, "-m", "mlx_dist", "serve", "--supervise", "-n", str(_NUM_RANKS)]
        command += ["--port", str(address.port), *flags]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | dict.fromkeys(jobs.VARIABLES, job)
        if self.cluster is not None:
            command = [
                *self.cluster.enter(HOSTS[0]),
                *command,
                *("--hostfile", str(self.cluster.hostfile)),
            ]
            env |= self.cluster.reach
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Server(self, process, job, log)

    def cut(self, *hosts: str) -> None:
        """Cut the links of `hosts`, and of no others."""
        self._set(down=list(hosts))

    def slow(self) -> None:
        """Make all links slow."""
        self._set(delay_ms=20, rate_mbit=20)

    def mend(self) -> None:
        """All links are as they should be."""
        if self.cluster is not None:
            self.cluster.faults()

    def left(self, job: str) -> list[Process]:
        """What runs on any host; without hosts, what is of `job`."""
        if self.cluster is None:
            return processes_of(job, {})
        return processes_on(dict(self.namespaces))

    def _set(self, **faults: object) -> None:
        assert self.cluster is not None
        self.cluster.faults(**faults)


@dataclass(frozen=True, slots=True)
class Server:
    """A supervised server, from its start to its end."""

    site: Site
    process: subprocess.Popen[bytes]
    job: str
    log: Path

    def processes(self) -> list[Process]:
        """Its processes on all hosts."""
        found = processes_of(self.job, dict(self.site.namespaces))
        # What enters a host to start and hold it there is none of it.
        return [one for one in found if not self.site.has_lab or one.pid != self.process.pid]

    def find(self, role: str, timeout_s: float = 0.0) -> Process | None:
        """The process with this role; of several daemons, the one on the last host."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = [one for one in self.processes() if one.role == role]
            if found or time.monotonic() >= deadline_s:
                return max(found, key=lambda one: one.host, default=None)
            time.sleep(0.01)


@contextmanager
def site_in(folder: Path, is_lab: bool) -> Iterator[Site]:
    """The hosts, or this machine, until the block is left."""
    if not is_lab:
        yield Site(folder)
        return
    if reason := lab.lacking():
        raise SystemExit(f"{reason}; --here runs on this machine alone")
    # Sockets are in there, whose names must be short.
    with ExitStack() as stack:
        cluster = stack.enter_context(lab.hosts_up(folder))
        namespaces = {}
        for host in HOSTS:
            pid = first_process_of(("host.py", f" {host} ", str(folder)))
            assert pid is not None
            namespaces[namespace_of(pid)] = host
            _mount_wrapped(cluster, host, folder)
        yield Site(folder, cluster, namespaces)


def _mount_wrapped(cluster: lab.Cluster, host: str, folder: Path) -> None:
    """On `host`, and nowhere else, modules of the product that can be made to fail."""
    package = Path(mlx_dist.__file__).parent
    for name, lines in WRAPPED.items():
        module = package / name
        wrapped = folder / f"{module.stem}.py"
        wrapped.write_text(module.read_text() + lines.format(folder=str(folder)))
        done = cluster.on(host, "mount", "--bind", wrapped, module)
        if done.code:
            raise SystemExit(f"{host}: {done.err}")
