"""Interfaces: recorded Macs, Linux's /sys/class/net as a tree of files, and this machine."""

import socket
import sys
from pathlib import Path

import pytest

from mlx_dist.cluster import network
from mlx_dist.cluster.network import (
    interface_towards,
    interfaces,
    linux_interfaces,
    parse_macos,
    warning,
)
from mlx_dist.messages import Interface

RECORDED = Path(__file__).parent / "recorded"


def mac(name):
    folder = RECORDED / name
    return parse_macos((folder / "ifconfig").read_text(), (folder / "networksetup").read_text())


def test_a_mini_with_ethernet_wifi_and_a_thunderbolt_bridge():
    assert mac("m4_mini") == [
        Interface("lo0", "loopback", "127.0.0.1"),
        Interface("en0", "ethernet", "192.168.1.21", 1.0),
        Interface("bridge0", "thunderbolt", "10.0.5.1"),
        Interface("en1", "wifi", "192.168.1.34"),
    ]


def test_a_studio_with_a_thunderbolt_port_of_its_own_and_a_tunnel():
    assert mac("m3_ultra_studio") == [
        Interface("lo0", "loopback", "127.0.0.1"),
        Interface("en0", "ethernet", "10.1.0.11", 10.0),
        Interface("en2", "thunderbolt", "10.0.5.2"),
        Interface("utun4", "virtual", "100.64.0.7"),
    ]


def test_a_macbook_with_an_adapter_that_has_ipv6_only_and_a_phone():
    assert mac("m1_pro_macbook") == [
        Interface("lo0", "loopback", "127.0.0.1"),
        Interface("en0", "wifi", "192.168.1.40"),
        Interface("bridge0", "thunderbolt", "169.254.105.12"),
        Interface("en7", "ethernet", "2001:db8:2::7", 2.5),
        Interface("en8", "other", "172.20.10.2", 0.1),
    ]


def test_a_bridge_is_what_its_members_are_even_where_networksetup_is_missing():
    ifconfig = (RECORDED / "m4_mini" / "ifconfig").read_text()
    assert {i.name: i.kind for i in parse_macos(ifconfig, "")}["en0"] == "virtual"
    ports = "Hardware Port: Thunderbolt 1\nDevice: en2\n"
    assert {i.name: i.kind for i in parse_macos(ifconfig, ports)}["bridge0"] == "thunderbolt"


@pytest.mark.parametrize("text", ["", "\n", "no such command", "en0:\n\tinet 1.2.3.4"])
def test_what_is_no_list_of_interfaces_is_none(text):
    assert parse_macos(text, text) == []


def sysfs(folder, name, *, device=None, flags="0x1003", **files):
    """An interface as /sys/class/net shows it; `device` is its driver's name."""
    path = folder / name
    path.mkdir(parents=True)
    files = {"flags": flags, "operstate": "up", "type": "1"} | files
    for file, content in files.items():
        (path / file).write_text(f"{content}\n")
    if device is not None:
        driver = folder / "drivers" / device
        driver.mkdir(parents=True, exist_ok=True)
        (path / "device").mkdir()
        (path / "device" / "driver").symlink_to(driver)
    return path


def test_linux(tmp_path):
    sysfs(tmp_path, "lo", type="772", flags="0x9", operstate="unknown")
    sysfs(tmp_path, "eth0", device="igc", speed="2500")
    sysfs(tmp_path, "eth1", device="virtio_net", speed="-1")
    (sysfs(tmp_path, "wlan0", device="iwlwifi") / "phy80211").mkdir()
    sysfs(tmp_path, "thunderbolt0", device="thunderbolt-net")
    sysfs(tmp_path, "docker0", operstate="down")
    sysfs(tmp_path, "veth1", speed="10000")
    sysfs(tmp_path, "eth9", device="igc", flags="0x1002")
    (sysfs(tmp_path, "br0") / "lower_eth0").symlink_to(tmp_path / "eth0")
    (tmp_path / "br0" / "lower_veth1").symlink_to(tmp_path / "veth1")
    addresses = [
        ("lo", "127.0.0.1"),
        ("eth0", "10.0.0.1"),
        ("eth0", "10.0.0.2"),
        ("eth0", "2001:db8::1"),
        ("eth1", "2001:db8::2"),
        ("wlan0", "10.1.0.1"),
        ("thunderbolt0", "10.2.0.1"),
        ("docker0", "172.17.0.1"),
        ("veth1", "10.3.0.1"),
        ("eth9", "10.4.0.1"),
        ("br0", "10.5.0.1"),
        ("tap7", "10.6.0.1"),
    ]
    assert linux_interfaces(tmp_path, addresses) == [
        Interface("lo", "loopback", "127.0.0.1"),
        Interface("eth0", "ethernet", "10.0.0.1", 2.5),
        Interface("eth0", "ethernet", "10.0.0.2", 2.5),
        Interface("eth1", "ethernet", "2001:db8::2"),
        Interface("wlan0", "wifi", "10.1.0.1"),
        Interface("thunderbolt0", "thunderbolt", "10.2.0.1"),
        Interface("veth1", "virtual", "10.3.0.1", 10.0),
        Interface("br0", "ethernet", "10.5.0.1", 2.5),
        Interface("tap7", "virtual", "10.6.0.1"),
    ]


def test_this_machine_has_a_loopback():
    found = interfaces()
    loopback = interface_towards("127.0.0.1", found)
    assert loopback is not None and loopback.kind == "loopback"
    assert all(i.kind != "loopback" or i.address.startswith(("127.", "::1")) for i in found)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's routes")
def test_the_interface_towards_an_own_address_is_the_loopback_or_its_own():
    found = interfaces()
    for interface in found:
        towards = interface_towards(interface.address, found)
        assert towards is not None and towards.address == interface.address


def test_nowhere_leads_nowhere(monkeypatch):
    assert interface_towards("name.invalid", interfaces()) is None
    assert interface_towards("127.0.0.1", []) is None
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: [(2, 2, 0, "", ("::bad", 9))])
    assert interface_towards("127.0.0.1", interfaces()) is None


def test_a_mac_without_its_programs_has_no_interfaces(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(network, "output_of", lambda *_: "")
    assert interfaces() == []


WIFI = Interface("en0", "wifi", "192.168.1.40")
LOOPBACK = Interface("lo0", "loopback", "127.0.0.1")
TUNNEL = Interface("utun4", "virtual", "100.64.0.7")
THUNDERBOLT = Interface("bridge0", "thunderbolt", "169.254.1.2")
OTHER_THUNDERBOLT = Interface("en2", "thunderbolt", "169.254.3.4")
GIGABIT = Interface("en5", "ethernet", "10.0.0.1", 1.0)
TEN_GIGABIT = Interface("en6", "ethernet", "10.1.0.1", 10.0)
SOME_ETHERNET = Interface("eth0", "ethernet", "10.2.0.1")


def test_wifi_where_both_have_thunderbolt_is_told_with_the_remedy():
    told = warning(WIFI, [LOOPBACK, WIFI, GIGABIT, THUNDERBOLT], [WIFI, OTHER_THUNDERBOLT])
    assert told == (
        "en0 (Wi-Fi, 192.168.1.40) is in use, and both hosts have Thunderbolt; if a cable or a "
        "switch joins them, write 169.254.3.4 (en2) for that host into the hostfile, and "
        "169.254.1.2 (bridge0) for this one"
    )


@pytest.mark.parametrize(
    ("used", "here", "there", "words"),
    [
        (WIFI, [WIFI, GIGABIT], [TEN_GIGABIT], "Ethernet of 1 Gbit/s"),
        (WIFI, [WIFI, SOME_ETHERNET], [TEN_GIGABIT], "Ethernet;"),
        (GIGABIT, [GIGABIT, TEN_GIGABIT], [GIGABIT, TEN_GIGABIT], "Ethernet of 10 Gbit/s"),
        (TEN_GIGABIT, [TEN_GIGABIT, THUNDERBOLT], [OTHER_THUNDERBOLT], "Thunderbolt"),
        (TUNNEL, [TUNNEL, WIFI], [WIFI], "Wi-Fi"),
    ],
)
def test_a_faster_kind_that_both_have_is_told(used, here, there, words):
    told = warning(used, here, there)
    assert told is not None and f"both hosts have {words}" in told
    assert told.startswith(f"{used.name} (") and "\n" not in told


@pytest.mark.parametrize(
    ("used", "here", "there"),
    [
        (WIFI, [WIFI, THUNDERBOLT], [WIFI]),
        (WIFI, [WIFI, THUNDERBOLT], [WIFI, GIGABIT]),
        (WIFI, [WIFI], [WIFI]),
        (THUNDERBOLT, [THUNDERBOLT, TEN_GIGABIT], [OTHER_THUNDERBOLT, TEN_GIGABIT]),
        (GIGABIT, [GIGABIT, TEN_GIGABIT], [GIGABIT]),
        (GIGABIT, [GIGABIT, SOME_ETHERNET], [SOME_ETHERNET]),
        (LOOPBACK, [LOOPBACK, THUNDERBOLT], [LOOPBACK, THUNDERBOLT]),
        (TUNNEL, [TUNNEL], [TUNNEL]),
    ],
)
def test_nothing_is_told_where_nothing_faster_joins_them(used, here, there):
    assert warning(used, here, there) is None
