"""`mlx-dist doctor` on hosts of their own: what differs between them is named with its host."""

import importlib.metadata
import json
import shutil

from mlx_dist.demo import MODEL_DIR


def checks(done):
    return {check["name"]: check for check in json.loads(done.out)["checks"]}


def test_three_healthy_hosts(cluster):
    done = cluster.mlx_dist("doctor", "--port", "0")
    assert done.code == 0, done.out + done.err
    assert "FAIL" not in done.out
    for here, there in (("mxh1", "mxh2"), ("mxh1", "mxh3"), ("mxh2", "mxh3")):
        [line] = [
            line
            for line in done.out.splitlines()
            if f"({here}) by eth0" in line and f"({there}) by eth0" in line
        ]
        assert "fabric" in line
        assert "control" in line


def test_another_mlx_and_another_model_are_named(cluster, tmp_path):
    metadata = importlib.metadata.distribution("mlx").locate_file(
        f"mlx-{importlib.metadata.version('mlx')}.dist-info/METADATA"
    )
    old = tmp_path / "METADATA"
    version = f"Version: {importlib.metadata.version('mlx')}"
    old.write_text(metadata.read_text().replace(version, "Version: 0.30.0"))
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    other = tmp_path / "model.safetensors"
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 0x80
    other.write_bytes(data)
    with (
        cluster.replaced("mxh3", metadata, old),
        cluster.replaced("mxh2", model / "model.safetensors", other),
    ):
        done = cluster.mlx_dist("doctor", "--port", "0", "--model", model, "--json")
    assert done.code == 1
    found = checks(done)
    assert "mlx is " in found["versions"]["found"]
    assert "0.30.0 on rank 2 (mxh3)" in found["versions"]["found"]
    assert "pip install mlx==" in found["versions"]["remedy"]
    assert found["files"]["found"].startswith("model.safetensors is ")
    assert found["files"]["found"].endswith(" on rank 1 (mxh2)")
    assert found["links"]["level"] == "ok"


def test_a_host_without_the_model_is_named(cluster, tmp_path):
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    empty = tmp_path / "empty"
    empty.mkdir()
    with cluster.replaced("mxh2", model, empty):
        done = cluster.mlx_dist("doctor", "--port", "0", "--model", model, "--json")
    assert done.code == 1
    found = checks(done)
    failed = [name for name, check in found.items() if check["level"] == "FAIL"]
    assert failed == ["model"]
    assert "rank 1 (mxh2): " in found["model"]["found"]
    assert found["links"]["level"] == "ok"
