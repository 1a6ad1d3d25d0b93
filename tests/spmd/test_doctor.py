"""`mlx-dist doctor` finds a healthy world healthy, names what is not, and looks at the rest."""

import json
import shutil
import socket
import struct
import sys
from pathlib import Path

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.launching import mlx_dist, program, run

BIN = Path(sys.executable).parent

NAMES = [
    "MPI",
    "fabric",
    "links",
    "port",
    "versions",
    "settings",
    "BLAS",
    "clocks",
    "folders",
    "shared memory",
    "open files",
    "model",
    "files",
    "memory",
    "short prompt",
    "long prompt",
]
# What a machine of its own may be warned of.
MAY_WARN = {"BLAS", "shared memory", "open files"}


def checks(done):
    """The checks of a run with --json, by name, and the names of those that failed."""
    found = json.loads(done.out)
    by_name = {check["name"]: check for check in found["checks"]}
    failed = [name for name, check in by_name.items() if check["level"] == "FAIL"]
    assert found["is_fine"] == (not failed) == (done.code == 0), done.err
    return by_name, failed


def test_a_healthy_world_is_found_healthy(spmd_ranks):
    done = mlx_dist("doctor", "--port", "0", num_ranks=spmd_ranks)
    assert done.code == 0, done.out + done.err
    lines = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert [line[6:21].strip() for line in lines] == NAMES
    for line in lines:
        assert line.startswith("ok ") or line[6:21].strip() in MAY_WARN
    if spmd_ranks > 1:
        assert "16 answered: as one process does" in lines[-1]
        assert "tokens in 4 chunks" in lines[-1]


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_numbers_for_programs(fabric):
    done = mlx_dist("doctor", "--port", "0", "--fabric", fabric, "--quick", "--json", num_ranks=3)
    by_name, failed = checks(done)
    assert list(by_name) == NAMES
    assert not failed
    links = by_name["links"]["data"]["links"]
    assert [(link["from"], link["to"]) for link in links] == [(0, 1), (0, 2), (1, 2)]
    assert all(link["fabric"]["bytes_per_s"] > 0 for link in links)
    assert fabric in by_name["fabric"]["found"]


def test_a_group_is_looked_at():
    command = ("doctor", "--port", "0", "--parallel", "tensor", "--quick", "--json")
    by_name, failed = checks(mlx_dist(*command, num_ranks=2))
    assert not failed
    assert set(by_name) - set(NAMES) == {"tensor group"}
    assert "1 of 2 ranks add up right" in by_name["tensor group"]["found"]
    assert all(seconds > 0 for seconds in by_name["tensor group"]["data"]["sum_s"].values())
    assert "as one process does" in by_name["long prompt"]["found"]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = mlx_dist("doctor", "--port", port, "--json", num_ranks=2)
    by_name, failed = checks(done)
    assert failed == ["port"]
    assert f"127.0.0.1 port {port} cannot be listened on" in by_name["port"]["found"]
    assert "--port" in by_name["port"]["remedy"]
    assert by_name["long prompt"]["level"] == "ok"


def test_a_model_that_is_missing_on_a_host_is_named(tmp_path):
    nowhere = tmp_path / "nowhere"
    done = program("own_model", MODEL_DIR, nowhere, "--", "doctor", "--port", "0", num_ranks=2)
    assert done.code == 1
    failed = [line for line in done.out.splitlines() if line.startswith("FAIL")]
    [line] = failed
    assert line.startswith("FAIL  model")
    assert "rank 1 (" in line
    assert f"--model {nowhere} is neither a folder here nor a hub id" in line
    for name in ("port", "links", "folders"):
        assert f"ok    {name}" in done.out
    for name in ("files", "memory", "short prompt", "long prompt"):
        assert f"warn  {name:<15}not looked at" in done.out


def test_a_file_that_is_cut_off_is_named(tmp_path):
    other = shutil.copytree(MODEL_DIR, tmp_path / "other")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    done = program("own_model", MODEL_DIR, other, "--", "doctor", "--json", num_ranks=2)
    by_name, failed = checks(done)
    assert "model" in failed
    assert f"{path} is damaged or was cut off" in by_name["model"]["found"]


def test_a_damaged_file_is_found_by_its_hash_or_by_its_answers(tmp_path):
    """Rank 1 has other bytes where no quick comparison of files looks."""
    other = shutil.copytree(MODEL_DIR, tmp_path / "other")
    damage(other / "model.safetensors", "model.layers.4.mlp.down_proj.weight")
    common = ("own_model", MODEL_DIR, other, "--", "doctor", "--port", "0", "--json")
    by_name, failed = checks(program(*common, num_ranks=2))
    assert failed == ["files"]
    assert by_name["files"]["found"].startswith("model.safetensors is ")
    assert "on rank 0 (" in by_name["files"]["found"]
    assert "on rank 1 (" in by_name["files"]["found"]
    assert by_name["memory"]["level"] == "ok"
    assert by_name["short prompt"]["found"] == "not looked at"
    by_name, failed = checks(program(*common, "--quick", num_ranks=2))
    assert "long prompt" in failed
    assert "mlx-dist verify" in by_name["long prompt"]["remedy"]


def test_what_does_not_fit_is_said_of_the_rank():
    done = mlx_dist("doctor", "--port", "0", "--memory-gb", "0.0001", "--json", num_ranks=2)
    by_name, failed = checks(done)
    assert failed == ["memory"]
    assert by_name["files"]["level"] == "ok"
    assert by_name["long prompt"]["found"] == "not looked at"


def test_without_room_for_one_process_the_hidden_number_is_looked_for():
    by_name, failed = checks(program("no_room", num_ranks=2))
    assert not failed
    assert by_name["short prompt"]["level"] == "ok"
    assert "not compared: one process would need" in by_name["short prompt"]["found"]
    # The embedded model is too small to find it.
    assert by_name["long prompt"]["level"] == "warn"
    assert "lacks the number hidden in the prompt" in by_name["long prompt"]["found"]


def test_a_port_that_is_none_is_refused():
    done = mlx_dist("doctor", "--port", "70000")
    assert done.code == 1
    assert done.error_lines == ["mlx-dist: error: --port is 70000; use 0 to 65535"]


def test_under_mlx_launch():
    launch = [BIN / "mlx.launch", "--backend", "ring", "-n", "2", "--python", sys.executable]
    done = run([*launch, "--", BIN / "mlx-dist", "doctor", "--port", "0", "--json"])
    by_name, failed = checks(done)
    assert not failed
    assert "not used by mlx.launch" in by_name["MPI"]["found"]
    assert "as one process does" in by_name["long prompt"]["found"]


def damage(path, tensor):
    """Turn the sign of every number of `tensor` in the file."""
    data = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    start, end = (offset + 8 + header_bytes for offset in header[tensor]["data_offsets"])
    assert header[tensor]["dtype"] == "F32"
    assert not start - 4096 < len(data) // 2 < end
    for at in range(start + 3, end, 4):
        data[at] ^= 0x80
    path.write_bytes(data)
