"""Commands on hosts by a stand-in for ssh: all at once, in time, and what keeps them from it."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from mlx_dist.cluster import jobs, remote, survey
from mlx_dist.cluster.hostfile import hostfile_of, is_this_machine, read_hosts, require_names
from mlx_dist.errors import ConfigError, LaunchError

# As ssh's: options, a host, a command for a shell.
_AGENT = """\
#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift 2; done
case "$1" in
  far.example) echo "ssh: connect to host $1 port 22: Connection timed out" >&2; exit 255 ;;
  slow.example) sleep 60 & wait ;;
  talks.example) echo "Welcome to $1" ;;
  bare.example) exec bash -c "${2//$REAL_PYTHON//nowhere/python}" ;;
esac
shift
exec bash -c "$*"
"""


@pytest.fixture(autouse=True)
def agent(monkeypatch, tmp_path):
    script = tmp_path / "ssh_agent"
    script.write_text(_AGENT)
    script.chmod(0o755)
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", str(script))
    monkeypatch.setenv("REAL_PYTHON", remote.python())


def _answer(host, *command, stdin="", deadline_s=20.0):
    return remote.run_on_all([host], command, {host: stdin}, deadline_s)[host]


def test_words_and_stdin_arrive_as_they_are():
    words = ["a b", "it's", '"$HOME"', "*", ""]
    answer = _answer("any.example", "printf", "%s\\n", *words)
    assert answer.out == "".join(f"{word}\n" for word in words)
    assert answer.fault() is None
    assert _answer("any.example", "cat", stdin="a\nb").out == "a\nb"


def test_this_machine_needs_no_ssh(monkeypatch):
    monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", "/nowhere/ssh")
    assert _answer("localhost", "echo", "here").out == "here\n"
    assert "/nowhere/ssh does not start" in (_answer("any.example", "true").fault() or "")


@pytest.mark.parametrize(
    ("variable", "command"),
    [
        (None, ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]),
        (
            "ssh -p 2222 : rsh",
            ["ssh", "-p", "2222", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"],
        ),
        ("rsh", ["rsh"]),
    ],
)
def test_the_agent_is_mpiruns(monkeypatch, variable, command):
    if variable is None:
        monkeypatch.delenv("PRTE_MCA_plm_ssh_agent")
    else:
        monkeypatch.setenv("PRTE_MCA_plm_ssh_agent", variable)
    assert remote.agent() == command


@pytest.mark.parametrize(
    ("host", "fault", "is_reached"),
    [
        ("far.example", "ssh does not reach it: ssh: connect to host far.example", False),
        ("slow.example", "it did not answer within 0.5 s", False),
        ("bare.example", f"it has no {remote.python()} that runs", True),
    ],
)
def test_what_keeps_it_from_running_is_told(host, fault, is_reached):
    answer = _answer(host, remote.python(), "-c", "pass", deadline_s=0.5 if "slow" in host else 20)
    assert (answer.fault() or "").startswith(fault)
    assert answer.is_reached == is_reached


def test_a_slow_host_holds_no_other_up():
    start = time.monotonic()
    hosts = ["slow.example", "a.example", "b.example"]
    answers = remote.run_on_all(hosts, ["echo", "hi"], {}, 2.0)
    assert time.monotonic() - start < 10
    assert [answers[host].out for host in hosts] == ["", "hi\n", "hi\n"]


def test_all_that_are_not_reached_are_named():
    remote.require_reached(["a.example", "localhost"])
    with pytest.raises(LaunchError, match=r"far\.example: ssh does not reach it: .*timed out"):
        remote.require_reached(["a.example", "far.example"])


def test_a_greeting_does_not_spoil_an_answer():
    calls = {
        host: {"job": "0123456789abcdef", "grace_s": 0.0} for host in ("talks.example", "localhost")
    }
    answers = remote.call_on_all(jobs, "end", calls, 20.0)
    assert answers["talks.example"].out.startswith("Welcome")
    assert all(answer.json() == {"killed": [], "left": []} for answer in answers.values())
    assert _answer("talks.example", "true").json() is None


def test_a_host_tells_what_it_is_like(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = {"names": ["no.such.name.invalid"], "leader": "127.0.0.1", "port": port}
        calls = {"any.example": call | {"model": str(tmp_path)}}
        said = remote.call_on_all(survey, "survey", calls, 30.0)["any.example"].json()
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(said["packages"]) == set(survey.PACKAGES)
    assert said["packages"]["mlx-dist"]
    assert (said["mpi_fault"], said["leader_fault"]) == (None, None)
    assert said["unknown_names"] == ["no.such.name.invalid"]
    assert str(tmp_path) in said["free_bytes"]
    assert abs(said["clock_s"] - time.time()) < 30
    closed = survey.survey([], "127.0.0.1", port, None)
    assert "refused" in closed["leader_fault"]


def test_hosts_are_read_as_mpirun_reads_them(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# all\n\nb.local slots=2  # two\na.local\nb.local slots=1\n")
    assert read_hosts(hostfile) == ("b.local", "a.local")
    hostfile.write_text(hostfile_of(["x", "y.local"]))
    assert read_hosts(hostfile) == ("x", "y.local")
    assert "x slots=1\n" in hostfile.read_text()


@pytest.mark.parametrize("text", [None, "# none\n", b"\xff"])
def test_a_hostfile_without_hosts_is_refused(tmp_path, text):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"--hostfile {hostfile}"):
        read_hosts(hostfile)


@pytest.mark.parametrize("host", ["-oProxyCommand=true", "a\0b", ""])
def test_what_ssh_would_misread_is_no_host(host):
    with pytest.raises(ConfigError, match="is no host"):
        require_names(["mini-1.local", host])


def test_this_machine_is_known_by_its_names_and_addresses():
    for name in ("localhost", socket.gethostname(), "127.0.0.1", "me@localhost"):
        assert is_this_machine(name), name
    # An address for documentation, and a name that cannot be.
    assert not is_this_machine("192.0.2.1")
    assert not is_this_machine("no.such.name.invalid")


def test_this_interpreter_is_named_by_its_path():
    assert Path(remote.python()).is_absolute()
    assert os.access(remote.python(), os.X_OK)
