"""Three hosts on one machine: network namespaces with names and addresses of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Done, run

HERE = Path(__file__).parent
HOSTS = ["mxh1", "mxh2", "mxh3"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts that are up. `hostfile` is mpirun's, one slot on each."""

    folder: Path

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts.txt"

    def faults(self, **faults: Any) -> None:
        """Set what the switch does to the links from now on."""
        (self.folder / "control.json").write_text(json.dumps(faults))

    def on(self, host: str, *command: str | Path, **options: Any) -> Done:
        """Run `command` on `host`, where mpirun reaches the others."""
        enter = ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c"]
        agent = {"PRTE_MCA_plm_ssh_agent": str(HERE / "ssh_agent.sh")}
        script = f'hostname {host}; exec "$@"'
        return run([*enter, script, "_", *command], env=agent, **options)

    def mlx_dist(self, *arguments: str | Path, **options: Any) -> Done:
        """Run `mlx-dist ARGUMENTS` on three ranks, a host each, from the first."""
        command = [sys.executable, "-m", "mlx_dist", *arguments]
        return self.on("mxh1", *command, "-n", "3", "--hostfile", self.hostfile, **options)


def _lacking() -> str | None:
    if os.geteuid() != 0:
        return "hosts need root"
    if not Path("/dev/net/tun").exists():
        return "hosts need /dev/net/tun"
    if shutil.which("ip") is None:
        return "hosts need iproute2's ip"
    return None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := _lacking():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    up = Cluster(folder)
    up.hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    up.faults()
    switch = None
    try:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "add", host], check=True)
            known = Path("/etc/netns") / host
            known.mkdir(parents=True)
            lines = [f"10.77.0.{i} {name}\n" for i, name in enumerate(HOSTS, 1)]
            (known / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        switch = subprocess.Popen(
            [sys.executable, HERE / "switch.py", folder / "control.json", *HOSTS],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert switch.stdout is not None
        assert switch.stdout.readline() == "ready\n"
        yield up
    finally:
        for host in HOSTS:
            pids = subprocess.run(
                ["ip", "netns", "pids", host], capture_output=True, text=True, check=False
            )
            for pid in pids.stdout.split():
                os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", host], check=False)
            shutil.rmtree(Path("/etc/netns") / host, ignore_errors=True)
        if switch is not None:
            switch.kill()
            switch.communicate()
