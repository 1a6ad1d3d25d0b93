"""Every way to start the ranks gives the same answer: mpirun, -n, and mlx.launch."""

import os
import sys
from pathlib import Path

import pytest

from mlx_dist.cluster import mpi
from mlx_dist.cluster.launch import mpirun_command
from mlx_dist.cluster.world import join
from mlx_dist.config import Fabric
from mlx_dist.errors import ConfigError
from tests.launching import mlx_dist, run

BIN = Path(sys.executable).parent
TOP = Path(__file__).parents[2]
ARGUMENTS = ("generate", "--prompt", "What is a rank?", "--json")
# Root must say so to mpirun; mlx.launch does not.
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ENVIRONMENT = {"PATH": f"{BIN}:{os.environ['PATH']}"} | (ROOT if os.geteuid() == 0 else {})


@pytest.fixture(scope="module")
def text():
    return mlx_dist(*ARGUMENTS).json()["text"]


def test_plain_mpirun_with_the_hostfile(text):
    mpirun, _ = mpi.installation()
    command = [mpirun, "-np", "3", "--hostfile", TOP / "hostfile.txt", BIN / "mlx-dist"]
    answer = run([*command, *ARGUMENTS], env=ENVIRONMENT).json()
    assert answer["text"] == text
    assert len(answer["ranks"]) == 3


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_n_with_the_hostfile(text, fabric):
    words = ("--hostfile", TOP / "hostfile.txt", "--fabric", fabric)
    answer = mlx_dist(*ARGUMENTS, *words, num_ranks=2).json()
    assert answer["text"] == text
    assert len(answer["ranks"]) == 2


@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_mlx_launch(text, backend):
    launch = [BIN / "mlx.launch", "--backend", backend, "-n", "2", "--python", sys.executable]
    done = run([*launch, "--", BIN / "mlx-dist", *ARGUMENTS], env=ENVIRONMENT)
    assert done.json()["text"] == text
    assert len(done.json()["ranks"]) == 2


def test_mlx_launch_with_an_error_ends_for_all():
    launch = [BIN / "mlx.launch", "--backend", "ring", "-n", "2", "--python", sys.executable]
    arguments = [*ARGUMENTS, "--layers", "9,9"]
    done = run([*launch, "--", BIN / "mlx-dist", *arguments], env=ENVIRONMENT)
    assert "adds up to 18" in done.err
    assert "Traceback" not in done.err


def test_one_rank_has_no_fabric():
    done = mlx_dist(*ARGUMENTS, "--fabric", "ring")
    assert done.code == 1
    assert "--fabric ring needs more than one rank" in done.error_lines[0]
    with pytest.raises(ConfigError, match="--fabric jaccl needs more than one rank"):
        join(Fabric.jaccl, Path("devices.json"))


def test_stdin_is_refused_where_it_never_ends():
    mpirun, _ = mpi.installation()
    command = [mpirun, "-np", "2", "--hostfile", TOP / "hostfile.txt", BIN / "mlx-dist"]
    done = run([*command, "generate", "--prompt", "-"], env=ENVIRONMENT)
    assert done.code == 1
    assert "never tell a rank that stdin is over" in done.error_lines[0]


def test_an_error_that_all_ranks_see_is_said_once():
    python = ["-m", "mlx_dist", "generate", "--prompt", "Hello", "--top-p", "7"]
    done = run(mpirun_command(3, None, python))
    assert done.code == 1
    assert len(done.error_lines) == 1


def test_an_address_of_another_host_is_named(monkeypatch):
    monkeypatch.setenv("MLX_DIST_ADDRESS", "192.0.2.1")
    command = mpirun_command(2, None, ["-m", "mlx_dist", *ARGUMENTS, "--fabric", "ring"])
    # Each host has its own, so mpirun carries it to no other.
    assert "MLX_DIST_ADDRESS" not in command
    done = run(command)
    assert done.code == 1
    assert "192.0.2.1 is no address of" in done.error_lines[0]
    assert "Traceback" not in done.err
