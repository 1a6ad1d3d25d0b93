"""A flag's value is that of the command line, or else of its variable, the file, its default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_dist.cli import app
from mlx_dist.cli.flags import PREFIX, commands_in, flags_of
from mlx_dist.cli.settings import FILE
from mlx_dist.cluster import launch
from mlx_dist.errors import ConfigError
from tests.launching import mlx_dist, run
from tests.serving import serving

PROGRAM = typer.main.get_command(app)
COMMANDS = dict(commands_in(PROGRAM))
# Variables that mean something else than a flag.
RESERVED = {f"{PREFIX}_{name}" for name in ("ADDRESS", "DEBUG", "TRACE", "TERMINAL_WIDTH")}

# For each kind of value: the command, the key, the default, and what the command line, the variable
# and the file say, each with what that is.
KINDS = {
    "int": ("serve", "port", 8100, (["--port", "1"], 1), ("2", 2), ("3", 3)),
    "float": ("serve", "keep-alive-s", 5, (["--keep-alive-s=1"], 1), ("2.5", 2.5), ("3", 3)),
    "none": ("chat", "kv-memory-gb", None, (["--kv-memory-gb", "1"], 1), ("2", 2), ("3.5", 3.5)),
    "pair": (
        "serve",
        "reuse-prefixes",
        True,
        (["--no-reuse-prefixes"], False),
        ("true", True),
        ("false", False),
    ),
    "on": ("serve", "access-log", False, (["--access-log"], True), ("0", False), ("true", True)),
    "either": ("generate", "chat", None, (["--raw"], False), ("1", True), ("false", False)),
    "text": ("chat", "system", None, (["--system", ""], ""), ("x y", "x y"), ('"z"', "z")),
    "list": (
        "generate",
        "stop",
        [],
        (["--stop", "a b", "--stop=-c"], ["a b", "-c"]),
        ("d e", ["d", "e"]),
        ('["f g", ":"]', ["f g", ":"]),
    ),
    "enum": ("bench", "fabric", "auto", (["--fabric=mpi"], "mpi"), ("ring",) * 2, ('"mpi"', "mpi")),
    "path": ("chat", "hostfile", None, (["--hostfile", "a"], "a"), ("b", "b"), ('"/c"', "/c")),
    "own": ("verify", "prefill-chunk", 16, (["--prefill-chunk=1"], 1), ("2", 2), ("3", 3)),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, and no variables of ours."""
    for name in [name for name in os.environ if name.startswith(f"{PREFIX}_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys, *arguments):
    """What `mlx-dist config ARGUMENTS` says of each flag."""
    PROGRAM(["config", *arguments, "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)["values"]


@contextmanager
def variables(**values):
    with patch.dict(os.environ, values):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_source_wins(kind, capsys, folder):
    command, key, default, by_flag, by_variable, by_file = KINDS[kind]
    variable = f"{PREFIX}_{key.replace('-', '_').upper()}"
    for has_flag, has_variable, has_file in product([True, False], repeat=3):
        (folder / FILE).write_text(f"{key} = {by_file[0]}" if has_file else "")
        with variables(**({variable: by_variable[0]} if has_variable else {})):
            found = shown(capsys, command, *(by_flag[0] if has_flag else []))[key]
        ranking = [
            (has_flag, (by_flag[1], "flag", None)),
            (has_variable, (by_variable[1], "environment", variable)),
            (has_file, (by_file[1], "file", str(folder / FILE))),
            (True, (default, "default", None)),
        ]
        expected = next(answer for is_there, answer in ranking if is_there)
        assert (found["value"], found["origin"], found["source"]) == expected


def test_a_commands_table_wins_over_the_top(capsys, folder):
    (folder / FILE).write_text("max-tokens = 1\nranks = 3\n[generate]\nmax-tokens = 2\n")
    assert shown(capsys, "generate")["max-tokens"]["value"] == 2
    assert shown(capsys, "chat")["max-tokens"]["value"] == 1
    assert {shown(capsys, name)["ranks"]["value"] for name in ("generate", "chat", "serve")} == {3}


def test_one_string_is_a_list_of_one(capsys, folder):
    (folder / FILE).write_text('prompt = "Hello"\nmemory-gb = 8\n')
    assert shown(capsys, "generate")["prompt"]["value"] == "Hello"
    assert shown(capsys, "verify")["prompt"]["value"] == ["Hello"]
    assert shown(capsys, "verify")["memory-gb"]["value"] == ["8"]


def test_paths_start_at_the_files_folder(capsys, folder, monkeypatch):
    there = folder / "there"
    (there / "models" / "mine").mkdir(parents=True)
    (there / "x.toml").write_text(
        'hostfile = "hosts.txt"\napi-key-file = "~/key"\nmodel = "models/mine"\n'
        '[chat]\nmodel = "owner/model"\n[bench]\nmodel = "./owner/model"\n'
    )
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(f"{PREFIX}_CONFIG", "there/x.toml")
    values = shown(capsys)
    assert values["hostfile"]["value"] == str(there / "hosts.txt")
    assert values["api-key-file"]["value"] == "/home/me/key"
    assert values["model"]["value"] == str(there / "models" / "mine")
    assert values["model"]["source"] == str(there / "x.toml")
    assert shown(capsys, "chat")["model"]["value"] == "owner/model"
    assert shown(capsys, "bench")["model"]["value"] == str(there / "owner" / "model")


def test_which_file_is_read(capsys, folder):
    for name, port in ((FILE, 1), ("variable.toml", 2), ("flag.toml", 3)):
        (folder / name).write_text(f"port = {port}")

    def port(*arguments):
        app([*arguments, "config", "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)["values"]["port"]["value"]

    assert port() == 1
    with variables(MLX_DIST_CONFIG="variable.toml"):
        assert port() == 2
        assert port("--config", "flag.toml") == 3
    with variables(MLX_DIST_CONFIG=""):
        assert port() == 8100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv_memory_gb = 3", "no command has a flag --kv_memory_gb; did you mean kv-memory-gb?"),
        ("quux = 3", "no command has a flag --quux"),
        ("[sevre]\nport = 3", r"\[sevre\] is no command; did you mean serve?"),
        ("[serve]\nprot = 3", r"prot in \[serve\]: no such flag; did you mean port?"),
        ("[chat]\nmax-tools = 3", r"max-tools in \[chat\]: .*; it is a flag of serve"),
        ("[serve.port]\nx = 3", r"port in \[serve\] is a table; write a whole number"),
        ('port = "3"', "port is '3'; write a whole number"),
        ("port = 3.5", "port is 3.5; write a whole number"),
        ("port = true", "port is true; write a whole number"),
        ("kv-memory-gb = false", "kv-memory-gb is false; write a number"),
        ("access-log = 1", "access-log is 1; write true or false"),
        ("layers = [3, 3]", "layers is a list; write a string"),
        ("[generate]\nstop = [true]", r"stop in \[generate\] is true; write a string"),
        ("prompt = ['a']", "prompt is a list; write a string"),
        ("hostfile = 2020-01-01", "hostfile is 2020-01-01; write a string"),
        ("fabric = 'rang'", "fabric is 'rang'; write one of auto, mpi, ring, jaccl"),
        ("system = \"a\\u0000\"", "system is a string with a NUL character"),
        ("api-key = true", "api-key is not text; write a string"),
        (f"kv-memory-gb = {10**400}", "kv-memory-gb: "),
        ("model = '~nobody-at-all/x'", "model is '~nobody-at-all/x': Could not determine home"),
        (f"model = '{'x' * 999}'", "model is 'xxx.*: .*name too long"),
        ("port = ", "is no TOML: Invalid value"),
        (f"port = {'9' * 9999}", "is no TOML: "),
        (f"x = {'[' * 9999}", "is no TOML: "),
        ("port = 1\nport = 2", "is no TOML: Cannot overwrite a value"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line(folder, text, said):
    (folder / FILE).write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        app(["config"], standalone_mode=False)
    assert str(error.value).startswith(str(folder / FILE))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(folder):
    (folder / "latin.toml").write_bytes(b'system = "\xe9"')
    for name, said in (("nowhere.toml", "No such file"), ("latin.toml", "is no TOML")):
        with pytest.raises(ConfigError, match=f"{folder / name} .*{said}"):
            app(["--config", name, "config"], standalone_mode=False)


def test_the_clusters_table_is_its_own(capsys, folder):
    (folder / FILE).write_text('[cluster]\nhosts = ["a", "b"]\nanything = 1\n')
    assert "anything" not in shown(capsys)


def test_a_wrong_variable_is_named(folder):
    for command in (["serve"], ["config"]):
        with (
            variables(MLX_DIST_PORT="many"),
            pytest.raises(ConfigError, match="MLX_DIST_PORT in the"),
        ):
            app(command, standalone_mode=False)


def test_an_empty_variable_is_none(capsys, folder):
    with variables(MLX_DIST_PORT=""):
        assert shown(capsys)["port"]["origin"] == "default"


def test_keys_variables_and_flags_have_one_name():
    for command in COMMANDS.values():
        for key, flag in flags_of(command).items():
            assert flag.option.envvar == f"{PREFIX}_{key.replace('-', '_').upper()}"
            assert flag.option.envvar not in RESERVED


def test_the_key_is_never_shown(capsys, folder):
    (folder / FILE).write_text('api-key = "s3cret"')
    assert shown(capsys)["api-key"] | {"source": ""} == {
        "value": "set", "origin": "file", "source": "",
    }  # fmt: skip
    for arguments in (["config"], ["serve", "--help"], ["config", "--api-key", "s3cret"]):
        app(arguments, standalone_mode=False)
        assert "s3cret" not in capsys.readouterr().out


def test_the_table_is_for_people(capsys, folder):
    (folder / FILE).write_text('cors-origin = ["a", "b"]\n[serve]\naccess-log = true')
    with variables(MLX_DIST_PORT="1"):
        app(["config", "serve", "--host", "::1"], standalone_mode=False)
    lines = {
        line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()
    }
    assert lines["--port"].split() == ["1", "environment", "MLX_DIST_PORT"]
    assert lines["--host"].split() == ["::1", "flag"]
    assert lines["--access-log"].split() == ["true", "file", str(folder / FILE)]
    assert lines["--cors-origin"].startswith("a, b ")
    assert lines["--ranks"] == "default"


def test_a_command_that_is_none_is_named():
    with pytest.raises(ConfigError, match="sreve is no command; use one of bench, chat"):
        app(["config", "sreve"], standalone_mode=False)


class Started(Exception):  # noqa: N818 - the end of a launching process
    """mpirun would have been started with this."""

    def __init__(self, num_ranks, hostfile, arguments):
        self.command = num_ranks, hostfile, arguments
        self.variables = dict(os.environ)


def relaunched(*arguments):
    def start(*command):
        raise Started(*command)

    with patch.object(launch, "relaunch", start), variables(), pytest.raises(Started) as started:
        app(list(arguments), standalone_mode=False)
    return started.value


def test_ranks_get_flags_and_file_and_no_file_to_read(folder):
    (folder / FILE).write_text(
        'ranks = 3\nhostfile = "hosts.txt"\ntop-p = 0.5\n'
        '[generate]\nchat = false\nstop = [":", "-x"]\nprompt = "Hello"\n'
    )
    with variables(MLX_DIST_TOP_K="5", MLX_DIST_RANKS="2"):
        started = relaunched("generate", "--max-tokens", "7")
    num_ranks, hostfile, arguments = started.command
    assert (num_ranks, hostfile) == (2, folder / "hosts.txt")
    assert arguments == [
        "generate", "--prompt=Hello", "--raw", "--max-tokens=7", "--top-p=0.5", "--stop=:",
        "--stop=-x",
    ]  # fmt: skip
    assert started.variables["MLX_DIST_CONFIG"] == ""
    assert started.variables["MLX_DIST_TOP_K"] == "5"
    assert "MLX_DIST_RANKS" not in started.variables


@pytest.mark.parametrize("source", ["flag", "environment", "file", "key file"])
def test_the_key_reaches_the_ranks_by_the_environment_alone(folder, source):
    (folder / FILE).write_text('[serve]\napi-key = "s3cret"' if source == "file" else "")
    (folder / "key").write_text("s3cret\n")
    arguments = {"flag": ["--api-key", "s3cret"], "key file": ["--api-key-file", "key"]}
    with variables(**({"MLX_DIST_API_KEY": "s3cret"} if source == "environment" else {})):
        started = relaunched("serve", "-n", "2", *arguments.get(source, []))
    assert started.command[2] == ["serve"]
    assert started.variables["MLX_DIST_API_KEY"] == "s3cret"


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(
    system=TEXT | st.none(),
    memory=st.lists(st.integers(1, 9).map(lambda size: f"mini={size}")),
    temperature=st.floats(0.01, 100) | st.none(),
    leaves_out=st.booleans(),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
def test_what_ranks_are_told_is_what_was_said(capsys, system, memory, temperature, leaves_out):
    said = ["--leave-out"] if leaves_out else []
    said += [] if system is None else ["--system", system]
    said += [] if temperature is None else ["--temperature", repr(temperature)]
    said += [part for limit in memory for part in ("--memory-gb", limit)]
    _, _, told = relaunched("chat", "-n", "2", *said).command
    assert shown(capsys, *told) == shown(capsys, "chat", *said)


def test_every_command_with_ranks_can_be_told_again():
    for command in COMMANDS.values():
        flags = flags_of(command)
        assert "ranks" not in flags or len(flags) == len(command.params)


def test_habits_give_way_to_a_launcher_and_to_one_rank(folder, monkeypatch):
    (folder / FILE).write_text('ranks = 3\nhostfile = "hosts.txt"\nprompt = "Hi"\n')

    def ran(*arguments):
        """Whether the command came as far as running its own rank."""
        with patch("mlx_dist.cli.options.preload_blas", side_effect=Started(0, None, [])):
            app(["generate", *arguments], standalone_mode=False)

    for arguments in (["-n", "1"], ["--ranks=1"]):
        with pytest.raises(Started):
            ran(*arguments)
    with pytest.raises(ConfigError, match="--hostfile goes with -n of 2 or more"):
        ran("-n", "1", "--hostfile", "hosts.txt")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(Started):
        ran()
    with pytest.raises(ConfigError, match="-n 3 under a launcher that started 2 ranks"):
        ran("-n", "3")


def test_the_command_line_loads_neither_mlx_nor_mpi():
    code = "import sys, mlx_dist.cli; print(sorted({'mlx', 'mlx.core', 'mpi4py'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_ranks_get_what_only_the_launching_process_can_read(folder):
    # The ranks start in this folder, too.
    (folder / FILE).write_text("this is no TOML")
    file = 'ranks = 2\nprompt = "What is a rank?"\n[generate]\nmax-tokens = 3\njson = true\n'
    command = [sys.executable, "-m", "mlx_dist", "--config", "/dev/stdin", "generate"]
    answer = run(command, stdin=file, cwd=folder).json()
    assert answer["completion_tokens"] == 3
    assert len(answer["ranks"]) == 2


def test_a_wrong_file_is_said_once_by_real_ranks(folder):
    (folder / FILE).write_text("port = 'x'")
    done = mlx_dist("serve", num_ranks=2, cwd=folder)
    assert done.code == 1
    assert done.error_lines == [
        f"mlx-dist: error: {folder / FILE}: port is 'x'; write a whole number"
    ]


def test_a_servers_key_is_in_no_command_line(folder):
    (folder / FILE).write_text('[serve]\napi-key = "s3cret"\nbatching = "fixed:1,1,64"\n')
    with serving(num_ranks=2, MLX_DIST_CONFIG=str(folder / FILE)) as server:
        assert server.client(api_key="s3cret").models.list().data
        every = subprocess.run(["ps", "-Aww", "-o", "args"], capture_output=True, check=True)
        assert b"serve" in every.stdout
        assert b"s3cret" not in every.stdout
