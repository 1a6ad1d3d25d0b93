"""What goes down the pipe arrives as it was, on every fabric."""

import pytest

from tests.launching import program


@pytest.mark.parametrize(("fabric", "debug"), [("mpi", "0"), ("ring", "1")])
def test_arrays_of_every_kind_arrive_bit_exact(spmd_ranks, fabric, debug):
    """Debugging adds a checksum to what is announced, and the fabric carries the same."""
    if fabric == "ring" and spmd_ranks == 1:
        pytest.skip("a ring needs two ranks")
    done = program("transport", fabric, "0", num_ranks=spmd_ranks, env={"MLX_DIST_DEBUG": debug})
    assert (done.code, done.out) == (0, "all came\n"), done.err


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_another_shape_than_is_due_ends_the_job(fabric):
    done = program("transport", fabric, "1", num_ranks=2)
    assert done.code == 86
    [line] = done.error_lines
    assert "rank 1 (" in line
    assert "activations (1, 1, 63) bfloat16 were announced where (1, 1, 64) bfloat16" in line


def test_trace_shows_every_frame():
    env = {"MLX_DIST_TRACE": "1", "MLX_DIST_DEBUG": "1"}
    done = program("transport", "mpi", "0", num_ranks=2, env=env)
    assert (done.code, done.out) == (0, "all came\n"), done.err
    assert "r0 frame 0 -> r1 Open" in done.err
    assert "r1 frame 0 <- r0 Open" in done.err
