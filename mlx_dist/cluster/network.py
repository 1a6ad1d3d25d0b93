"""The network interfaces of this host, which of them leads to another, and whether one is faster.

Linux is read from /sys/class/net, macOS from what `ifconfig` and `networksetup` print.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_dist.cluster.commands import output_of
from mlx_dist.messages import Interface

_SYS_CLASS_NET = Path("/sys/class/net")
_IF_INET6 = Path("/proc/net/if_inet6")
_IFF_UP = 0x1
_ARPHRD_LOOPBACK = "772"
_DOWN_STATES = ("down", "lowerlayerdown", "notpresent")
_THUNDERBOLT_DRIVERS = ("thunderbolt-net", "thunderbolt_net")
_SIOCGIFCONF = 0x8912
# struct ifreq on 64 bits: a name of 16 bytes, then 24 of which an address takes the first 16.
_IFREQ = struct.Struct("16s 4x 4s 16x")
_MOST_ADDRESSES = 256

_THUNDERBOLT = re.compile(r"thunderbolt (bridge|\d+)$")
_RATE = re.compile(r"\b(\d+(?:\.\d+)?)(g?)base", re.IGNORECASE)
_WORDS = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi"}
# Kinds that may carry a model's activations, best first.
_KINDS = ("thunderbolt", "ethernet", "wifi")


def interfaces() -> list[Interface]:
    """The interfaces of this host that are up and have an address, one entry an address.

    IPv6 addresses are listed for interfaces that have no other, and link-local ones never.
    """
    if sys.platform == "darwin":
        return parse_macos(
            output_of("ifconfig"), output_of("networksetup", "-listallhardwareports")
        )
    return linux_interfaces(_SYS_CLASS_NET, [*_ipv4_addresses(), *_ipv6_addresses()])


def interface_towards(address: str, interfaces: Sequence[Interface]) -> Interface | None:
    """The one of `interfaces` by which this host reaches `address`, by its routes.

    Nothing is sent. None if there is no route or the interface is not among them.
    """
    try:
        family, _, _, _, peer = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(peer)
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return next((interface for interface in interfaces if interface.address == own), None)


def warning(used: Interface, here: Sequence[Interface], there: Sequence[Interface]) -> str | None:
    """One line if both hosts have an interface of a faster kind than the one in use, or None.

    Whether the faster ones are connected to each other only a person knows.
    """
    if used.kind == "loopback":
        return None
    for kind in _KINDS:
        mine, yours = _fastest(kind, here), _fastest(kind, there)
        if mine is None or yours is None:
            continue
        slower = min(mine, yours, key=_speed)
        if _speed(slower) <= _speed(used):
            continue
        return (
            f"{_described(used)} is in use, and both hosts have {_words(slower)}; if a cable or a "
            f"switch joins them, write {yours.address} ({yours.name}) for that host into the "
            f"hostfile, and {mine.address} ({mine.name}) for this one"
        )
    return None


def linux_interfaces(folder: Path, addresses: Sequence[tuple[str, str]]) -> list[Interface]:
    """Interfaces of a Linux host by its /sys/class/net, for (name, address) pairs."""
    found: list[Interface] = []
    has_ipv4 = {name for name, address in addresses if ":" not in address}
    for name, address in addresses:
        device = folder / name
        if not _is_up(device) or (":" in address and name in has_ipv4):
            continue
        kind, gbit_s = _linux_kind(device)
        found.append(Interface(name, kind, address, gbit_s))
    return found


def parse_macos(ifconfig: str, hardware_ports: str) -> list[Interface]:
    """Interfaces of a Mac by what `ifconfig` and `networksetup -listallhardwareports` print."""
    ports = dict(re.findall(r"Hardware Port: (.+)\nDevice: (\S+)", hardware_ports))
    port_of = {device: port for port, device in ports.items()}
    found: list[Interface] = []
    for block in re.split(r"\n(?=\S)", ifconfig):
        head = re.match(r"(\S+?): flags=[0-9a-f]+<(\S*)>", block)
        if head is None or "UP" not in head[2].split(",") or "status: inactive" in block:
            continue
        name = head[1]
        members = re.findall(r"^\s+member: (\S+)", block, re.MULTILINE)
        kind = _macos_kind(name, port_of, members)
        addresses = re.findall(r"^\s+inet (\S+)", block, re.MULTILINE)
        if not addresses:
            # Addresses that change for privacy are none to write into a hostfile.
            lines = re.findall(r"^\s+inet6 (\S+)(.*)", block, re.MULTILINE)
            addresses = [a for a, rest in lines if "%" not in a and "temporary" not in rest]
        media = re.search(r"^\s+media: (.*)", block, re.MULTILINE)
        gbit_s = _gbit_s(media[1]) if media else None
        found += [Interface(name, kind, address, gbit_s) for address in addresses]
    return found


def _macos_kind(name: str, port_of: dict[str, str], members: Sequence[str]) -> str:
    port = port_of.get(name, "").lower()
    if name.startswith("lo"):
        return "loopback"
    if _THUNDERBOLT.match(port):
        return "thunderbolt"
    if port in ("wi-fi", "airport"):
        return "wifi"
    if "ethernet" in port or re.search(r"\blan\b", port):
        return "ethernet"
    if members:
        kinds = {_macos_kind(member, port_of, ()) for member in members}
        return next((kind for kind in _KINDS if kind in kinds), "virtual")
    # Adapters come with their maker's name for a port; tunnels and the like with none.
    return "other" if port else "virtual"


def _gbit_s(media: str) -> float | None:
    """The rate in a line of media, as in "autoselect (2500Base-T <full-duplex>)"."""
    found = _RATE.search(media)
    if found is None:
        return None
    return float(found[1]) / (1 if found[2] else 1000)


def _is_up(device: Path) -> bool:
    """Whether the interface is up, which is assumed where /sys is another namespace's."""
    flags = int(_read(device / "flags") or "0x1", 16)
    return bool(flags & _IFF_UP) and _read(device / "operstate") not in _DOWN_STATES


def _linux_kind(device: Path) -> tuple[str, float | None]:
    """Kind and rate; those of the fastest below it for a bridge, a bond or a VLAN."""
    if device.name == "lo" or _read(device / "type") == _ARPHRD_LOOPBACK:
        return "loopback", None
    mbit_s = int(_read(device / "speed") or "-1")
    gbit_s = mbit_s / 1000 if mbit_s > 0 else None
    if (device / "wireless").exists() or (device / "phy80211").exists():
        return "wifi", gbit_s
    if (device / "device").exists():
        driver = (device / "device" / "driver").resolve().name
        return ("thunderbolt" if driver in _THUNDERBOLT_DRIVERS else "ethernet"), gbit_s
    lower = [_linux_kind(path.resolve()) for path in sorted(device.glob("lower_*"))]
    physical = [(kind, rate) for kind, rate in lower if kind in _KINDS]
    if physical:
        return min(physical, key=lambda pair: (_KINDS.index(pair[0]), -(pair[1] or 0)))
    return "virtual", gbit_s


def _ipv4_addresses() -> Iterator[tuple[str, str]]:
    """(Name, address) of every IPv4 address, by the system call: `ip` may not be installed."""
    buffer = array("B", bytes(_IFREQ.size * _MOST_ADDRESSES))
    request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFCONF, request)
    except OSError:
        return
    (num_bytes,) = struct.unpack_from("i", answer)
    for name, address in _IFREQ.iter_unpack(buffer.tobytes()[:num_bytes]):
        # A further address may have a label of its own, as in eth0:1.
        yield name.rstrip(b"\0").decode().partition(":")[0], socket.inet_ntoa(address)


def _ipv6_addresses() -> Iterator[tuple[str, str]]:
    for line in (_read(_IF_INET6) or "").splitlines():
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(int(digits, 16))
        if not address.is_link_local:
            yield name, str(address)


def _fastest(kind: str, interfaces: Sequence[Interface]) -> Interface | None:
    return max((i for i in interfaces if i.kind == kind), key=_speed, default=None)


def _speed(interface: Interface) -> tuple[int, float]:
    """What compares interfaces: the kind, then the rate. Tunnels and the like come last."""
    if interface.kind not in _KINDS:
        return -len(_KINDS), 0.0
    # Rates of Wi-Fi and Thunderbolt, where told at all, are not comparable between hosts.
    rate = interface.gbit_s if interface.kind == "ethernet" else None
    return -_KINDS.index(interface.kind), rate or 0.0


def _words(interface: Interface) -> str:
    words = _WORDS.get(interface.kind, interface.kind)
    rate = interface.gbit_s if interface.kind == "ethernet" else None
    return words if rate is None else f"{words} of {rate:g} Gbit/s"


def _described(interface: Interface) -> str:
    return f"{interface.name} ({_words(interface)}, {interface.address})"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
