"""`mlx-dist cluster` as a person with three machines uses it, and what it says of a wrong one."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.cluster.hosts import HOSTS, Cluster
from tests.launching import Done, mlx_dist

# What the issue allows for naming a host that is wrong.
_NAMED_WITHIN_S = 30
_SERVE = ("--port", "8123", "--batching", "fixed:1,1,64")
_CHAT = """
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:8123/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "What is a rank?"}]
answer = client.chat.completions.create(
    model="model", messages=messages, temperature=0, max_tokens=48
)
print(answer.choices[0].message.content, end="")
"""

# Says in a file when it is in the middle of the answer.
_STREAM = """
import pathlib, sys, openai
client = openai.OpenAI(base_url="http://127.0.0.1:8123/v1", api_key="none", max_retries=0)
parts = client.completions.create(
    model="model", prompt="Once", stream=True, temperature=0, max_tokens=300,
    logit_bias={"0": -100},
)
for i, part in enumerate(parts):
    print(part.choices[0].text, end="", flush=True)
    if i == 40:
        pathlib.Path(sys.argv[1]).touch()
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a person sits: a folder on the first host."""

    cluster: Cluster
    folder: Path

    def type(self, *words: str | Path, **options: Any) -> Done:
        """Run `mlx-dist WORDS`."""
        command = [sys.executable, "-m", "mlx_dist", *words]
        env = {"XDG_STATE_HOME": str(self.folder / "state")}
        return self.cluster.on("mxh1", *command, env=env, cwd=self.folder, **options)

    def set_up(self) -> None:
        done = self.type("cluster", "init", *HOSTS)
        assert done.code == 0, done.out + done.err

    def status(self) -> Any:
        return json.loads(self.type("cluster", "status", "--json").out)

    def left(self) -> dict[str, list[str]]:
        """The processes of all hosts."""
        return {host: self.cluster.processes(host) for host in HOSTS}

    @contextmanager
    def serving(self, *flags: str | Path):
        """A server is up while this lasts, and is stopped in any case."""
        done = self.type("cluster", "up", *_SERVE, *flags)
        assert done.code == 0, done.out + done.err
        with self.going_down():
            yield

    @contextmanager
    def going_down(self):
        """What is up is stopped after this, on a network that is whole again."""
        try:
            yield
        finally:
            self.cluster.faults()
            self.type("cluster", "down")

    def failing(self, *words: str | Path) -> str:
        """What is said by a command that must fail in time, and leave nothing."""
        start = time.monotonic()
        done = self.type(*words)
        took_s = time.monotonic() - start
        assert done.code == 1, done.out + done.err
        assert took_s < _NAMED_WITHIN_S
        assert self.left() == {host: [] for host in HOSTS}
        return done.out + done.err


@pytest.fixture
def desk(cluster, tmp_path):
    yield Desk(cluster, tmp_path)
    cluster.faults()


@pytest.fixture
def other_mlx(cluster, tmp_path):
    """The second host has another version of MLX, as far as its metadata says."""
    metadata = Path(str(importlib.metadata.distribution("mlx").locate_file("")))
    [metadata] = metadata.glob("mlx-[0-9]*.dist-info/METADATA")
    text = metadata.read_text()
    other = tmp_path / "METADATA"
    other.write_text(text.replace(f"Version: {importlib.metadata.version('mlx')}", "Version: 0.1"))
    with cluster.replaced("mxh2", metadata, other):
        yield


@pytest.fixture
def other_file(cluster, tmp_path):
    """A model of which the third host has a damaged copy: the model's folder."""
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with cluster.replaced("mxh3", model / "model.safetensors", tmp_path / "damaged"):
        yield model


# Eight commands that start three ranks or talk to them, one after the other.
@pytest.mark.timeout(240)
def test_from_nothing_to_an_answer_and_back(desk, cluster):
    cluster.faults(delay_ms=0.5, rate_mbit=1000)
    done = desk.type("cluster", "init", *HOSTS)
    assert done.code == 0, done.out + done.err
    assert "FAIL" not in done.out
    assert (
        (desk.folder / "hostfile.txt")
        .read_text()
        .endswith("mxh1 slots=1\nmxh2 slots=1\nmxh3 slots=1\n")
    )
    done = desk.type("cluster", "init", *HOSTS)
    assert done.code == 1
    assert done.error_lines[0].startswith("mlx-dist: error: mlx-dist.toml and hostfile.txt in ")
    assert desk.type("cluster", "status").code == 3
    plan = desk.type("plan", "--json").json()
    assert [stage["name"] for stage in plan["stages"]] == HOSTS
    done = desk.type("doctor", "--quick")
    assert done.code == 0, done.out + done.err
    alone = mlx_dist(
        "generate", "--prompt", "What is a rank?", "--chat", "--max-tokens", "48", "--json"
    ).json()
    with desk.serving():
        again = desk.type("cluster", "up", *_SERVE)
        assert "a server runs already" in again.error_lines[0]
        answer = cluster.on("mxh1", sys.executable, "-c", _CHAT)
        assert answer.out == alone["text"], answer.err
        status = desk.status()
        assert status["is_ready"]
        assert {rank["host"] for rank in status["cluster"]["ranks"]} == set(HOSTS)
        assert desk.type("cluster", "status").code == 0
        assert "is served at http://127.0.0.1:8123" in desk.type("cluster", "logs").out
        done = desk.type("cluster", "down")
        assert done.code == 0, done.err
        assert desk.left() == {host: [] for host in HOSTS}
        assert "mlx-dist: drained" in desk.type("cluster", "logs", "-f").out
        assert desk.type("cluster", "status").code == 3
        assert desk.type("cluster", "down").code == 0


def test_what_a_killed_mpirun_leaves_is_found(desk, cluster):
    """Only the job's id tells whose the processes are that do not notice."""
    desk.set_up()
    with desk.serving():
        bystander = cluster.on("mxh2", "bash", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!")
        stop = 'kill -STOP $(pgrep -f "[p]rted|mlx_dist [s]erve")'
        assert cluster.on("mxh2", "bash", "-c", stop).code == 0
        cluster.on("mxh1", "kill", "-9", str(desk.status()["pid"]))
        assert desk.type("cluster", "status").code == 3
        done = desk.type("cluster", "down")
        assert done.code == 0, done.err
        assert "mxh2: killed 3 processes that had stayed" in done.err
        assert desk.left() == {"mxh1": [], "mxh2": ["sleep 60"], "mxh3": []}
        cluster.on("mxh2", "kill", bystander.out.strip())


def test_a_host_that_is_gone_at_the_end_is_named(desk, cluster):
    desk.set_up()
    with desk.serving():
        cluster.faults(down=["mxh3"])
        done = desk.type("cluster", "down", "--timeout-s", "1")
        assert done.code == 1
        assert "error: mxh3: ssh does not reach it" in done.err
        left = desk.left()
        assert (left["mxh1"], left["mxh2"]) == ([], [])
        cluster.faults()
        done = desk.type("cluster", "down")
        assert done.code == 0, done.err
        assert desk.left() == {host: [] for host in HOSTS}


@pytest.mark.timeout(240)
def test_a_stream_goes_on_without_the_host_that_is_cut_off(desk, cluster, tmp_path):
    desk.set_up()
    stream = (sys.executable, "-c", _STREAM)
    with desk.serving("--heartbeat-timeout-s", "3"), ThreadPoolExecutor() as pool:
        undisturbed = cluster.on("mxh1", *stream, tmp_path / "before")
        going = pool.submit(cluster.on, "mxh1", *stream, tmp_path / "now", timeout_s=90)
        while not (tmp_path / "now").exists():
            time.sleep(0.01)
        cluster.faults(down=["mxh3"])
        assert going.result().out == undisturbed.out, going.result().err
        logs = desk.type("cluster", "logs").out
        assert "mxh3 does not answer and is left out" in logs
        ranks = desk.status()["cluster"]["ranks"]
        assert [rank["host"] for rank in ranks] == ["mxh1", "mxh2"]
        cluster.faults()
        deadline = time.monotonic() + 60
        while "taking it back" not in desk.type("cluster", "logs").out or not (
            (status := desk.status())["is_ready"] and len(status["cluster"]["ranks"]) == 3
        ):
            assert time.monotonic() < deadline, desk.type("cluster", "logs").out
            time.sleep(0.5)


@pytest.mark.timeout(120)
def test_a_host_that_is_cut_off_while_ranks_join_is_left_out(desk, cluster):
    desk.set_up()
    with ThreadPoolExecutor() as pool, desk.going_down():
        going = pool.submit(desk.type, "cluster", "up", *_SERVE, "--heartbeat-timeout-s", "3")
        while not any("-m mlx_dist serve" in one for one in desk.left()["mxh3"]):
            assert not going.done(), going.result().err
            time.sleep(0.01)
        cluster.faults(down=["mxh3"])
        cut_s = time.monotonic()
        assert going.result().code == 0, going.result().err
        # Without the watchmen it would have taken the minute that ranks may take to meet.
        assert time.monotonic() - cut_s < 40
        logs = desk.type("cluster", "logs").out
        assert "while ranks join, mxh3 is silent for 3 s" in logs
        assert [rank["host"] for rank in desk.status()["cluster"]["ranks"]] == ["mxh1", "mxh2"]
        assert desk.left()["mxh3"] == []


def test_an_unreachable_host_is_named(desk, cluster):
    desk.set_up()
    cluster.faults(down=["mxh3"])
    assert "mxh3: ssh does not reach it" in desk.failing("cluster", "up", *_SERVE)
    (desk.folder / "mlx-dist.toml").unlink()
    (desk.folder / "hostfile.txt").unlink()
    said = desk.failing("cluster", "init", *HOSTS)
    assert "FAIL mxh3, ssh: ssh does not reach it" in said
    assert not (desk.folder / "mlx-dist.toml").exists()


def test_a_host_that_cannot_answer_the_leader_is_named(desk):
    """Its names are wrong: mpirun's daemon on it would call somebody else, for ever."""
    hosts = desk.folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.77.0.9 mxh1\n10.77.0.3 mxh3\n")
    with desk.cluster.replaced("mxh2", Path("/etc/hosts"), hosts):
        said = desk.failing("cluster", "init", *HOSTS)
    assert "FAIL mxh2, way back: it cannot connect to mxh1" in said


def test_another_version_is_named(desk, cluster, other_mlx):
    said = desk.failing("cluster", "init", *HOSTS)
    assert "FAIL mxh2, packages: mlx is 0.1 and on mxh1 " in said
    assert desk.type("cluster", "init", *HOSTS, "--force").code == 0
    assert "mxh2: mlx is 0.1 and on mxh1 " in desk.failing("cluster", "up", *_SERVE)
    assert "0.1 on rank 1 (mxh2)" in desk.failing("generate", "--prompt", "Hello")


def test_another_model_file_is_named(desk, other_file):
    said = desk.failing("cluster", "init", *HOSTS, "--model", other_file)
    assert f"FAIL mxh3, model: {other_file} is " in said
    desk.set_up()
    said = desk.failing("cluster", "up", *_SERVE, "--model", other_file)
    assert "the ranks differ: model is " in said
    assert "on rank 2 (mxh3)" in said
