"""The hosts that the tests in this folder share."""

from __future__ import annotations

import pytest

from tests.cluster.hosts import hosts_up, lacking


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if reason := lacking():
        pytest.skip(reason)
    # Not pytest's own folder, whose name is too long for a socket.
    with hosts_up(tmp_path_factory.mktemp("c")) as up:
        yield up
