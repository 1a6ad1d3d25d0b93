"""Which interface carries what this host sends, by the system's own counters.

A routing table tells where a packet would go; MPI, the ring and RDMA choose for themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from pathlib import Path

from mlx_dist.cluster.commands import output_of

_PROC_NET_DEV = Path("/proc/net/dev")
# In a line of /proc/net/dev, the first of the counters for what is sent.
_LINUX_SENT_FIELD = 8
# From the right of a line of netstat, for a missing address leaves no field: Obytes, Coll.
_DARWIN_SENT_FIELD = -2


def sent_bytes(names: Container[str]) -> dict[str, int]:
    """What each interface of these `names` has sent; empty where the system does not tell.

    Members of a bridge count what the bridge does, and have no name to ask for.
    """
    try:
        if sys.platform == "darwin":
            counted = parse_netstat(output_of("netstat", "-ibn"))
        else:
            counted = parse_proc_net_dev(_PROC_NET_DEV.read_text())
    except OSError:
        return {}
    return {name: count for name, count in counted.items() if name in names}


def carrier(before: Mapping[str, int], after: Mapping[str, int], num_bytes: int) -> str | None:
    """The interface that sent most of the `num_bytes` between two looks, or None.

    None is right, too, for what went through shared memory.
    """
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    most = max(grown, key=lambda name: grown[name], default=None)
    return most if most is not None and grown[most] >= num_bytes / 2 else None


def parse_proc_net_dev(text: str) -> dict[str, int]:
    """Bytes sent by each interface in Linux's /proc/net/dev."""
    counters = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): int(rest.split()[_LINUX_SENT_FIELD]) for name, _, rest in counters}


def parse_netstat(text: str) -> dict[str, int]:
    """Bytes sent by each interface in what macOS's `netstat -ibn` prints."""
    rows = (line.split() for line in text.splitlines())
    # Lines of an interface's addresses repeat its counters.
    return {row[0]: int(row[_DARWIN_SENT_FIELD]) for row in rows if "<Link#" in " ".join(row[:3])}
