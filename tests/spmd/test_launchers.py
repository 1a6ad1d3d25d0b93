"""Every way to start the ranks gives the same answer: mpirun, -n, and mlx.launch."""

import os
import sys
from pathlib import Path

import pytest

from mlx_dist.cluster import mpi
from mlx_dist.cluster.launch import mpirun_command
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


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_plain_mpirun_with_the_hostfile(text, fabric):
    mpirun, _ = mpi.installation()
    command = [mpirun, "-np", "3", "--hostfile", TOP / "hostfile.txt", BIN / "mlx-dist"]
    answer = run([*command, *ARGUMENTS, "--fabric", fabric], env=ENVIRONMENT).json()
    assert answer["text"] == text
    assert len(answer["ranks"]) == 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_n_with_the_hostfile(text, ranks):
    answer = mlx_dist(*ARGUMENTS, "--hostfile", TOP / "hostfile.txt", num_ranks=ranks).json()
    assert answer["text"] == text
    assert len(answer["ranks"]) == ranks


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


@pytest.mark.parametrize("fabric", ["ring", "jaccl"])
def test_one_rank_has_no_fabric(fabric):
    extra = ("--jaccl-devices", "devices.json") if fabric == "jaccl" else ()
    done = mlx_dist(*ARGUMENTS, "--fabric", fabric, *extra)
    assert done.code == 1
    assert f"--fabric {fabric} needs more than one rank" in done.error_lines[0]


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
