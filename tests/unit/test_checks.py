"""What `mlx-dist cluster init` makes of what hosts say, and the files it writes."""

from __future__ import annotations

import json
import time
import tomllib

import pytest
import typer

from mlx_dist.cli import app
from mlx_dist.cli.settings import Settings
from mlx_dist.cluster.hostfile import read_hosts
from mlx_dist.cluster.remote import Answer
from mlx_dist.cluster.survey import survey
from mlx_dist.deploy import checks
from mlx_dist.deploy.checks import NAMES, examine, require_hosts
from mlx_dist.deploy.setup import run_init
from mlx_dist.display import Level
from mlx_dist.errors import ConfigError, LaunchError

HOSTS = ("localhost", "b")


@pytest.fixture
def says(monkeypatch):
    """What the second host says; None if ssh does not reach it."""
    said = survey([], "localhost", 0, None)

    def answers(_module, _function, arguments, deadline_s):
        assert list(arguments) == list(HOSTS)
        own = {name: value for name, value in said.items() if value is not None}
        texts = {"localhost": survey([], "localhost", 0, None), "b": said}
        if not own:
            b = Answer("b", 255, "", "Warning: x\nPermission denied", deadline_s, time.time())
        else:
            b = Answer("b", 0, json.dumps(texts["b"]), "", deadline_s, time.time())
        here = json.dumps(texts["localhost"])
        return {"localhost": Answer("localhost", 0, here, "", deadline_s, time.time()), "b": b}

    monkeypatch.setattr(checks, "call_on_all", answers)
    return said


def _faults():
    return [finding for finding in examine(HOSTS) if finding.level is not Level.ok]


def test_every_check_is_there_when_all_is_well(says):
    findings = examine(HOSTS)
    assert [f.name for f in findings if f.host == "b"] == list(NAMES[:-1])
    # How full this machine's disk is, is no matter of the test.
    assert [f for f in _faults() if f.name != "disk"] == []


@pytest.mark.parametrize(
    ("change", "name", "level", "found", "remedy"),
    [
        ({"python": "3.9.1"}, "Python", "FAIL", "its Python is 3.9.1", "3.11 or newer"),
        ({"python": "3.99.1"}, "Python", "warn", "its Python is 3.99.1, and", "this may work"),
        ({"mpi_fault": "OSError: x"}, "MPI", "FAIL", "MPI does not load: OSError", "pip install"),
        ({"unknown_names": ["c"]}, "names", "FAIL", "it does not know c", "/etc/hosts"),
        ({"leader_fault": "refused"}, "way back", "FAIL", "it cannot connect to", "firewall"),
        ({"clock_s": 0.0}, "clock", "warn", "s behind", "from the network"),
        ({"clock_s": 9e9}, "clock", "warn", "s ahead", "from the network"),
        ({"free_bytes": {"/x": 1_000_000}}, "disk", "warn", "0.0 GB free in /x", "make room"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(says, change, name, level, found, remedy):
    says |= {"free_bytes": {"/": 10**12}} | change
    [fault] = [f for f in _faults() if f.host == "b"]
    assert (fault.name, fault.level) == (name, level)
    assert found in fault.found
    assert remedy in fault.remedy


@pytest.mark.parametrize(
    ("package", "version", "found", "remedy"),
    [
        ("mlx", "0.1", "mlx is 0.1 and on localhost ", "-m pip install mlx=="),
        ("mpi4py", None, "mpi4py is absent and on localhost ", "-m pip install mpi4py=="),
        ("mlx-dist", "9", "mlx-dist is 9 and on localhost ", "install on it what localhost has"),
        ("mlx-dist", None, "it has no mlx_dist", "in the same folder"),
    ],
)
def test_a_package_that_differs_is_named(says, package, version, found, remedy):
    says["packages"] = says["packages"] | {package: version}
    [fault] = [f for f in _faults() if f.name == "packages"]
    assert found in fault.found
    assert remedy in fault.remedy


def test_a_host_that_is_not_reached_is_named_and_asked_nothing_else(says):
    says |= dict.fromkeys(says)
    [fault] = [f for f in _faults() if f.host == "b"]
    assert (fault.name, fault.found) == ("ssh", "ssh does not reach it: Permission denied")
    with pytest.raises(LaunchError, match=r"b: ssh does not reach it: .*`ssh b true`"):
        require_hosts(HOSTS)


@pytest.mark.parametrize("hosts", [("localhost",), HOSTS])
@pytest.mark.parametrize("model", [None, 'own"er/modell', "folder"])
def test_the_files_say_what_was_asked_for(tmp_path, monkeypatch, hosts, model):
    monkeypatch.setattr("mlx_dist.deploy.setup.examine", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    file = tmp_path / "mlx-dist.toml"
    assert run_init(hosts, file, model, "mine", is_forced=False)
    document = tomllib.loads(file.read_text())
    assert document["cluster"] == {"name": "mine"}
    served = Settings.read(file).defaults(typer.main.get_command(app))["serve"]
    assert served["ranks"] == len(hosts)
    assert served.get("model") == (str(tmp_path / "folder") if model == "folder" else model)
    if len(hosts) > 1:
        assert read_hosts(tmp_path / "hostfile.txt") == hosts
    else:
        assert "hostfile" not in served


def test_nothing_is_overwritten_unless_forced(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_dist.deploy.setup.examine", lambda *_: [])
    file = tmp_path / "mlx-dist.toml"
    (tmp_path / "hostfile.txt").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"hostfile\.txt in .* would be overwritten.*--force"):
        run_init(HOSTS, file, None, None, is_forced=False)
    assert not file.exists()
    assert run_init(HOSTS, file, None, None, is_forced=True)
    assert read_hosts(tmp_path / "hostfile.txt") == HOSTS


def test_hosts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="named twice"):
        run_init(("localhost", "b", "b"), tmp_path / "a.toml", None, None, is_forced=False)
    with pytest.raises(
        ConfigError, match=r"the first host, no\.such\.name\.invalid, is the leader"
    ):
        run_init(("no.such.name.invalid",), tmp_path / "a.toml", None, None, is_forced=False)
