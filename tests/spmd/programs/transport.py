"""Sends arrays of every kind down the pipe and says, on every rank, whether they came bit-exact.

transport.py FABRIC SHAPE_ERROR: with SHAPE_ERROR 1, rank 0 announces another shape than is due.
"""

import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

import mlx.core as mx

from mlx_dist.cluster.world import join
from mlx_dist.config import Fabric
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import Close, Open, Opening, Row, Sampling, Shutdown, Step, Tokens

DTYPES = (mx.bfloat16, mx.float16, mx.float32)
SHAPES = ((1, 1, 64), (4, 1, 1024), (1, 512, 1024), (2, 3, 5))


def arrays():
    for i, (dtype, shape) in enumerate((d, s) for d in DTYPES for s in SHAPES):
        noise = mx.random.normal(shape, key=mx.random.key(i)).astype(dtype)
        noise[0, 0, 0] = float("inf")
        yield noise


def same(a, b):
    return mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item()


with join(Fabric(sys.argv[1])) as world:
    transport = Transport(world, [[rank] for rank in range(world.size)])
    is_last = world.rank == world.size - 1
    plans = [
        Open(0, [Opening(0, Sampling())]),
        Step(0, [Row(0, 0, list(range(5000)))]),
        Close([0]),
        Shutdown(),
    ]
    if world.is_leader:
        for plan in plans:
            transport.pass_plan(plan)
    else:
        assert list(transport.plans()) == plans
    for array in arrays():
        got = array
        if not world.is_leader:
            got = transport.promise_hidden(array.shape, array.dtype)
            transport.await_hidden(got)
            assert same(got, array)
        if not is_last:
            wrong = sys.argv[2] == "1" and world.is_leader
            transport.send_hidden(got[:, :, :-1] if wrong else got, [])
    for i in range(5):
        if is_last:
            transport.send_tokens(Tokens(0, [i]))
        if world.is_leader:
            assert transport.receive_tokens() == Tokens(0, [i])
    if world.is_leader:
        print("all came")
