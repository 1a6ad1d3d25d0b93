"""Measures all links and prints, as JSON, what each rank says they are.

links.py FABRIC
"""

import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

import msgspec

from mlx_dist.cluster import links
from mlx_dist.cluster.world import join
from mlx_dist.config import Fabric
from mlx_dist.messages import Identity, expect

with join(Fabric(sys.argv[1])) as world:
    said = msgspec.json.encode(links.measure(world)).decode()
    gathered = world.control.all_gather(Identity(world.host, {"links": said}))
    # The streams still keep the order of frames and arrays.
    assert len(world.control.all_gather(Identity(world.host, {}))) == world.size
    if world.is_leader:
        everyone = {expect(message, Identity).facts["links"] for message in gathered}
        assert len(everyone) == 1
        print(said)
