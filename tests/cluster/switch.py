"""An Ethernet switch between network namespaces, in one process, with link faults.

switch.py CONTROL.json HOST... gives each namespace HOST a tap `eth0` with 10.77.0.i/24. It says
"ready" once frames flow. The control file is read again when it changes; it may set `delay_ms`,
`rate_mbit` and `down`, a list of hosts whose link is cut.
"""

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 2, 0x1000
_MTU_BYTES = 9000
_LOOK_EVERY_S = 0.05
_LIBC = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def _open_tap(host: str, number: int) -> int:
    """A non-blocking file of the frames that `host` sends and gets."""
    namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
    _enter(namespace)
    os.close(namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH14x", b"eth0", _IFF_TAP | _IFF_NO_PI))
    for command in (
        "link set lo up",
        f"link set eth0 mtu {_MTU_BYTES}",
        f"addr add 10.77.0.{number}/24 dev eth0",
        "link set eth0 up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return tap


class Switch:
    """Learns which address is behind which tap, and carries frames between them."""

    def __init__(self, control: Path, hosts: list[str]) -> None:
        self._control = control
        self._hosts = hosts
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._taps = [_open_tap(host, i) for i, host in enumerate(hosts, 1)]
        _enter(home)
        self._port_of: dict[bytes, int] = {}
        self._on_the_wire: list[tuple[float, int, int, bytes]] = []
        self._num_frames = 0
        self._free_at = [0.0] * len(hosts)
        self._faults: dict = {}
        self._faults_from = 0

    def run(self) -> None:
        next_look = 0.0
        while True:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _LOOK_EVERY_S
                self._read_faults()
            due = self._on_the_wire[0][0] if self._on_the_wire else next_look
            wait_s = max(0.0, min(next_look, due) - now)
            for tap in select.select(self._taps, [], [], wait_s)[0]:
                self._take_frames(self._taps.index(tap))
            self._deliver()

    def _read_faults(self) -> None:
        try:
            changed = self._control.stat().st_mtime_ns
            if changed != self._faults_from:
                self._faults = json.loads(self._control.read_text())
                self._faults_from = changed
        except (OSError, ValueError):
            pass  # It is being written; the next look finds it.

    def _take_frames(self, source: int) -> None:
        for _ in range(64):
            try:
                frame = os.read(self._taps[source], 65536)
            except BlockingIOError:
                return
            self._port_of[frame[6:12]] = source
            is_multicast = frame[0] & 1
            known = None if is_multicast else self._port_of.get(frame[:6])
            others = [port for port in range(len(self._taps)) if port != source]
            for port in others if known is None else [known]:
                self._send(source, port, frame)

    def _send(self, source: int, port: int, frame: bytes) -> None:
        down = self._faults.get("down", ())
        if self._hosts[source] in down or self._hosts[port] in down:
            return
        sent = time.monotonic()
        if rate_mbit := self._faults.get("rate_mbit"):
            sent = max(sent, self._free_at[source]) + len(frame) * 8 / (rate_mbit * 1e6)
            self._free_at[source] = sent
        arrives = sent + self._faults.get("delay_ms", 0) / 1e3
        self._num_frames += 1
        heapq.heappush(self._on_the_wire, (arrives, self._num_frames, port, frame))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._on_the_wire and self._on_the_wire[0][0] <= now:
            _, _, port, frame = heapq.heappop(self._on_the_wire)
            with contextlib.suppress(OSError):  # The host may be gone.
                os.write(self._taps[port], frame)


if __name__ == "__main__":
    switch = Switch(Path(sys.argv[1]), sys.argv[2:])
    print("ready", flush=True)
    switch.run()
