"""Counters of what interfaces have sent, from recorded output of both systems."""

from mlx_dist.cluster.traffic import carrier, parse_netstat, parse_proc_net_dev, sent_bytes

LINUX = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo \
colls carrier compressed
    lo:    7000      70    0    0    0     0          0         0     7000      70    0    0    0 \
    0       0          0
  eth0:99000000    8000    0    0    0     0          0         0  1200000    4000    0    0    0 \
    0       0          0
"""
# lo0 and utun0 have no address in their first line, so a field less.
DARWIN = """\
Name       Mtu   Network       Address            Ipkts Ierrs     Ibytes    Opkts Oerrs     Obytes\
  Coll
lo0        16384 <Link#1>                         48191     0    4664531    48191     0    4664531\
     0
lo0        16384 127           127.0.0.1          48191     -    4664531    48191     -    4664531\
     -
en0        1500  <Link#6>    aa:bb:cc:00:00:02  4052540     0 4721211452  1365020     0  152897098\
     0
en0        1500  192.168.1     192.168.1.10     4052540     - 4721211452  1365020     -  152897098\
     -
bridge0    1500  <Link#13>   aa:bb:cc:00:00:03        0     0          0        0     0          0\
     0
utun0      1380  <Link#14>                            0     0          0        5     0        400\
     0
"""


def test_linux():
    assert parse_proc_net_dev(LINUX) == {"lo": 7000, "eth0": 1_200_000}


def test_macos():
    assert parse_netstat(DARWIN) == {
        "lo0": 4_664_531,
        "en0": 152_897_098,
        "bridge0": 0,
        "utun0": 400,
    }


def test_this_machine_has_counters():
    assert set(sent_bytes({"lo", "lo0", "nothing"})) <= {"lo", "lo0"}
    assert sent_bytes({"lo", "lo0"})


def test_the_carrier_is_what_sent_most():
    before = {"en0": 100, "en5": 100}
    assert carrier(before, {"en0": 2_000, "en5": 9_000_100, "new": 5}, 9_000_000) == "en5"
    assert carrier(before, {"en0": 2_000, "en5": 100}, 9_000_000) is None
    assert carrier({}, {}, 9_000_000) is None
