"""The mpirun command is complete, and impossible requests are refused before it runs."""

import os
import sys
from pathlib import Path

import pytest

from mlx_dist.cluster import launch
from mlx_dist.errors import ConfigError


def test_the_command_names_this_python_by_its_path():
    command = launch.mpirun_command(3, None, ["-m", "mlx_dist", "bench"])
    assert command[-4:] == [str(Path(sys.executable).absolute()), "-m", "mlx_dist", "bench"]
    assert command[1:3] == ["-np", "3"]
    assert Path(command[0]).is_absolute()


def test_waiting_ranks_yield():
    command = launch.mpirun_command(2, None, [])
    assert command[command.index("mpi_yield_when_idle") + 1] == "1"


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed_only_to_root(monkeypatch, user, allowed):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-run-as-root" in launch.mpirun_command(2, None, [])) == allowed


def test_relevant_variables_travel_and_local_ones_stay(monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    monkeypatch.setenv("MLX_HOSTFILE", "/somewhere")
    command = launch.mpirun_command(2, None, [])
    assert "MLX_DISABLE_COMPILE" in command
    assert "MLX_HOSTFILE" not in command


@pytest.mark.parametrize("count", [0, -1, 1000])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(ConfigError, match=f"-n {count}"):
        launch.mpirun_command(count, None, [])


def test_a_missing_hostfile_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.txt is no file"):
        launch.mpirun_command(2, tmp_path / "nowhere.txt", [])


def test_ranks_that_share_a_host_share_its_cores(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    alone = launch.threads_per_rank()
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1000")
    assert launch.threads_per_rank() == 1 <= alone


def test_a_ring_hostfile_tells_who_shares_a_host(monkeypatch, tmp_path):
    hostfile = tmp_path / "ring.json"
    hostfile.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hostfile))
    monkeypatch.setenv("MLX_RANK", "2")
    assert launch.ranks_on_this_host() == 2
