"""A rank's memory is its shard: never the whole model, not even while it loads."""

import subprocess
import sys

import pytest

from benchmarks.memory import measure

MAKE = (
    "import sys, pathlib; from mlx_dist.cluster.blas import preload_blas; preload_blas(1); "
    "from benchmarks.random_model import write_random_model; "
    "write_random_model(pathlib.Path(sys.argv[1]))"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    subprocess.run([sys.executable, "-c", MAKE, str(folder)], check=True, timeout=100)
    assert (folder / "model.safetensors").stat().st_size > 300e6
    return folder


def test_peak_memory_is_the_shard_and_one_tensor(model):
    """On the first rank, which embeds, on the last, which has the head, and between them."""
    for use in measure(model, 3):
        assert use.over_idle_bytes <= use.allowed_bytes, use
