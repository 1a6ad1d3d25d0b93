"""Three hosts on one machine: each with a name, address, processes and mounts of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launching import Done, run

HERE = Path(__file__).parent
HOSTS = ["mxh1", "mxh2", "mxh3"]
_KNOWN = Path("/etc/netns")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts that are up. `hostfile` is mpirun's, one slot on each."""

    folder: Path

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts.txt"

    def faults(self, **faults: Any) -> None:
        """Set what the switch does to the links from now on; `down` are hosts without one."""
        faults["down"] = [namespace_of(host) for host in faults.get("down", ())]
        (self.folder / "control.json").write_text(json.dumps(faults))

    def on(
        self, host: str, *command: str | Path, env: dict[str, str] | None = None, **options: Any
    ) -> Done:
        """Run `command` on `host`, where mpirun reaches the others."""
        return run([*self.enter(host), *command], env=self.reach | (env or {}), **options)

    @property
    def reach(self) -> dict[str, str]:
        """The variables with which a command on one host reaches the others."""
        return {
            "PRTE_MCA_plm_ssh_agent": str(HERE / "ssh_agent.sh"),
            "TEST_PYTHON": sys.executable,
        }

    def enter(self, host: str) -> list[str]:
        """What to put before a command that is to run on `host`."""
        return [sys.executable, "-IS", str(HERE / "host.py"), "on", host, str(self.folder)]

    def mlx_dist(self, *arguments: str | Path, **options: Any) -> Done:
        """Run `mlx-dist ARGUMENTS` on three ranks, a host each, from the first."""
        command = [sys.executable, "-m", "mlx_dist", *arguments]
        return self.on("mxh1", *command, "-n", "3", "--hostfile", self.hostfile, **options)

    @contextmanager
    def replaced(self, host: str, path: Path, by: Path) -> Iterator[None]:
        """While this lasts, the file or folder `path` is on `host` what `by` is elsewhere."""
        done = self.on(host, "mount", "--bind", by, path)
        assert done.code == 0, done.err
        try:
            yield
        finally:
            self.on(host, "umount", path)

    def processes(self, host: str) -> list[str]:
        """The command lines of all processes of `host` but its first."""
        listed = self.on(host, "ps", "-eww", "-o", "pid=,args=").out.splitlines()
        lines = [line.split(maxsplit=1) for line in listed]
        return [args for pid, args in lines if pid != "1" and not args.startswith("ps -eww")]


def lacking() -> str | None:
    """Why there can be no hosts here, if so."""
    if os.geteuid() != 0:
        return "hosts need root"
    if not Path("/dev/net/tun").exists():
        return "hosts need /dev/net/tun"
    if shutil.which("ip") is None:
        return "hosts need iproute2's ip"
    return None


@contextmanager
def hosts_up(folder: Path) -> Iterator[Cluster]:
    """The hosts, until the block is left. The name of `folder` is short, for sockets are in it."""
    up = Cluster(folder)
    up.hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    up.faults()
    with ExitStack() as stack:
        _forget_the_dead()
        for host in HOSTS:
            stack.enter_context(_host(host, folder))
        command = [sys.executable, str(HERE / "switch.py"), str(folder / "control.json")]
        stack.enter_context(_until_the_end([*command, *map(namespace_of, HOSTS)]))
        yield up


def namespace_of(host: str) -> str:
    """The network namespace of `host`: another run of the tests has hosts of the same names."""
    return f"{host}-{os.getpid()}"


@contextmanager
def _host(name: str, folder: Path) -> Iterator[None]:
    namespace = namespace_of(name)
    (_KNOWN / namespace).mkdir(parents=True)
    lines = [f"10.77.0.{i} {host}\n" for i, host in enumerate(HOSTS, 1)]
    (_KNOWN / namespace / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    enter = ["ip", "netns", "exec", namespace, "unshare", "--uts", "--ipc", "--mount", "--pid"]
    enter += ["--fork", "--kill-child", "--mount-proc"]
    try:
        with _until_the_end([*enter, sys.executable, "-IS", HERE / "host.py", "up", name, folder]):
            yield
    finally:
        _forget(namespace)


def _forget(namespace: str) -> None:
    if Path("/run/netns", namespace).exists():
        subprocess.run(["ip", "netns", "del", namespace], check=True)
    shutil.rmtree(_KNOWN / namespace, ignore_errors=True)


def _forget_the_dead() -> None:
    """Take away the hosts of runs that were killed."""
    for host in HOSTS:
        for known in _KNOWN.glob(f"{host}-*"):
            if not Path("/proc", known.name.removeprefix(f"{host}-")).exists():
                _forget(known.name)


@contextmanager
def _until_the_end(command: Sequence[str | Path]) -> Iterator[None]:
    """Run `command`, which says when it is ready, until the block is left."""
    # If the tests are killed, it goes with them.
    bound = ["setpriv", "--pdeathsig", "KILL", *command]
    with subprocess.Popen(
        bound, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() in ("up\n", "ready\n"), f"{command} is not up"
            yield
        finally:
            process.kill()
