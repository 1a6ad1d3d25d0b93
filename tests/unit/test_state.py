"""A server's state folder, its log, and the processes of a job, whatever became of them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.cluster import jobs
from mlx_dist.cluster.state import ServerRecord, StateFolder, state_folder, url_in
from mlx_dist.deploy.logs import errors_in, follow, tail
from mlx_dist.errors import ConfigError, LaunchError

_SLEEPS = "import time; print('up', flush=True); time.sleep(60)"
_SERVED = "mlx-dist: model is served at http://127.0.0.1:8100"


@pytest.fixture
def state(tmp_path):
    return StateFolder(tmp_path / "state")


@pytest.fixture
def start():
    """A function that starts a Python process with further options and variables."""
    started: list[subprocess.Popen[str]] = []

    def run(*options, **variables):
        process = subprocess.Popen(
            [sys.executable, *options, "-c", _SLEEPS],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def _record(**values):
    defaults = {"pid": 1, "started_at": 0.0, "hosts": ["a"], "arguments": ["--port=0"]}
    return ServerRecord(secrets.token_hex(8), **(defaults | values))


def test_the_usual_place_is_the_systems(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert state_folder(None, "a").path == tmp_path / ".local/state/mlx_dist/a"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_folder(None, "a").path == tmp_path / "xdg/mlx_dist/a"
    monkeypatch.setattr(sys, "platform", "darwin")
    mac = tmp_path / "Library/Application Support/mlx_dist/a"
    assert state_folder(None, "a").path == mac
    assert state_folder(tmp_path / "mine", "a").path == tmp_path / "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="is no file name"):
        state_folder(None, name)


def test_what_is_written_is_read(state):
    assert state.read() is None
    record = _record(url="http://127.0.0.1:8100")
    with state.lock():
        state.write(record)
        assert state.read() == record
        state.forget()
        state.forget()
    assert state.read() is None
    assert state.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [b"", b"123", b'{"job": 1}', b"\xff\x00", b'{"job": "a"'])
def test_a_damaged_state_is_named(state, content):
    with state.lock():
        state.record_path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{state.record_path} is damaged"):
        state.read()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    state = StateFolder(tmp_path / "file" / "state")
    with pytest.raises(ConfigError, match=r"cannot be used.*--state-dir"), state.lock():
        pass


def test_two_commands_at_a_time_are_refused(state):
    with (
        state.lock(),
        pytest.raises(LaunchError, match="another `mlx-dist cluster up` or `down`"),
        state.lock(),
    ):
        pass
    with state.lock():
        pass


def test_the_last_log_is_kept(state):
    with state.lock():
        for text in ("first", "second"):
            state.rotate_log()
            state.log.write_text(text)
    assert (state.previous_log.read_text(), state.log.read_text()) == ("first", "second")


def test_the_log_tells_where_it_is_served(state):
    assert url_in(_SERVED + "\0") == "http://127.0.0.1:8100"
    assert url_in("mlx-dist: loading") is None
    assert state.served_url() is None
    with state.lock():
        state.log.write_bytes(f"one\n{_SERVED}\ntwo".encode())
    assert state.served_url() == "http://127.0.0.1:8100"


def test_a_job_is_found_by_its_id_and_no_other(start):
    job, other = secrets.token_hex(8), secrets.token_hex(8)
    by_option = start("-X", f"{jobs.OPTION}={job}")
    by_variable = start(**{jobs.VARIABLES[0]: job})
    bystander = start(**{jobs.VARIABLES[0]: other})
    assert set(jobs.processes(job)) == {by_option.pid, by_variable.pid}
    assert _record(pid=by_option.pid).is_running is False  # Its number, but not its job.
    assert jobs.runs(by_option.pid, job)
    ended = jobs.end(job, 0.0)
    assert (len(ended["killed"]), ended["left"]) == (2, [])
    assert by_option.wait() == by_variable.wait() == -9
    assert bystander.poll() is None
    assert jobs.end(job, 0.0) == {"killed": [], "left": []}


def test_one_that_ends_by_itself_is_not_killed(start):
    job = secrets.token_hex(8)
    process = start("-X", f"{jobs.OPTION}={job}")
    threading.Timer(0.2, process.terminate).start()
    assert jobs.end(job, 30.0) == {"killed": [], "left": []}
    assert process.wait() == -15


@pytest.mark.parametrize("pid", [None, 5_000_000])
def test_a_server_that_is_gone_does_not_run(pid):
    assert not _record(pid=pid).is_running


@given(
    st.lists(st.text("ab", max_size=5), max_size=30),
    st.integers(0, 40),
    st.booleans(),
    st.integers(1, 9),
)
def test_the_tail_is_the_last_lines(tmp_path_factory, lines, num_lines, has_end, block_bytes):
    log = tmp_path_factory.mktemp("log") / "log"
    text = "\n".join(lines) + ("\n" if has_end and lines else "")
    log.write_text(text)
    whole = text.splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_dist.deploy.logs._BLOCK_BYTES", block_bytes)
        assert tail(log, num_lines) == (whole[-num_lines:] if num_lines else [])


def test_following_shows_all_that_is_written_until_the_end(tmp_path):
    log = tmp_path / "log"
    log.write_text("old\nlast\npart")
    pieces = iter([b"ial\n", b"\0mpirun\n", "tä".encode()[:2], "ä".encode()[1:] + b"il"])

    def is_over():
        with log.open("ab") as file:
            piece = next(pieces, None)
            file.write(piece or b"")
        return piece is None

    seen = list(follow(log, 2, is_over))
    assert seen == ["last", "partial", "mpirun", "täil"]


def test_a_log_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"there is no log: {tmp_path / 'log'}"):
        tail(tmp_path / "log", 3)


def test_the_errors_of_a_log_are_mlx_dists(tmp_path):
    log = tmp_path / "log"
    log.write_text("mlx-dist: error: one\nmpirun: words\nmlx-dist: error: two\n")
    assert errors_in(log) == ["one", "two"]


def test_the_examples_are_complete():
    """The files of docs/examples are read as they are, each with a host for each rank."""
    import typer

    from mlx_dist.cli import app
    from mlx_dist.cli.settings import Settings
    from mlx_dist.cluster.hostfile import read_hosts

    examples = sorted((Path(__file__).parents[2] / "docs/examples").glob("*.toml"))
    assert len(examples) == 3
    for path in examples:
        settings = Settings.read(path)
        served = settings.defaults(typer.main.get_command(app))["serve"]
        if served["ranks"] > 1:
            assert len(read_hosts(Path(served["hostfile"]))) == served["ranks"]
        assert set(settings.table("cluster")) <= {"name", "state-dir"}
