"""A link between hosts is measured as what it is, and its interface is named."""

import pytest

from mlx_dist.cluster.launch import mpirun_command
from tests.launching import PROGRAMS

# Long and slow beside what other work on this machine adds.
DELAY_MS, RATE_MBIT = 20.0, 20


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_a_shaped_link_is_measured(cluster, fabric):
    python = [str(PROGRAMS / "links.py"), fabric]
    cluster.faults(delay_ms=DELAY_MS, rate_mbit=RATE_MBIT)
    try:
        measured = cluster.on("mxh1", *mpirun_command(3, cluster.hostfile, python)).json()
    finally:
        cluster.faults()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        link = measured["fabric"][a][b]
        assert 1 < link["latency_s"] * 1e3 / DELAY_MS < 5
        assert 0.05 < link["bytes_per_s"] * 8 / 1e6 / RATE_MBIT < 2
        assert 1 < measured["control"][a][b]["latency_s"] * 1e3 / DELAY_MS < 5
        for here, there in ((a, b), (b, a)):
            name, _kind, address, _gbit_s = measured["used"][here][there]
            assert (name, address) == ("eth0", f"10.77.0.{here + 1}")
