"""`mlx-dist cluster`: a server on several hosts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.flags import Origin, commands_in, flags_of
from mlx_dist.cli.options import AsJson
from mlx_dist.cli.serve import read_key
from mlx_dist.cli.settings import CLUSTER, FILE, FILE_VARIABLE, Settings
from mlx_dist.cluster.hostfile import read_hosts
from mlx_dist.cluster.state import StateFolder, state_folder
from mlx_dist.errors import ConfigError

_DEFAULT_NAME = "default"
# What [cluster] may say of every server.
_KEYS = ("name", "state-dir")
_HERE = "localhost"

group = typer.Typer(help="Set up, start, show, follow and stop a server on several hosts.")
app.add_typer(group, name=CLUSTER, no_args_is_help=True)

Name = Annotated[
    str | None, typer.Option(help="Which server, where there are several; default if left out.")
]
StateDir = Annotated[
    Path | None, typer.Option(help="Folder of its log and process id; by its name if left out.")
]


@group.command()
def init(
    context: typer.Context,
    hosts: Annotated[
        list[str], typer.Argument(metavar="HOST...", help="The hosts; this machine first.")
    ],
    model: Annotated[str | None, typer.Option(help="A model's folder or hub id.")] = None,
    name: Name = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the files whatever is found, and over others.")
    ] = False,
) -> None:
    """Check hosts for what mlx-dist needs, and write hostfile.txt and mlx-dist.toml."""
    from mlx_dist.deploy.setup import run_init

    state_folder(None, name or _DEFAULT_NAME)  # Refuses what is no name.
    path = context.find_root().obj.path or Path(FILE).absolute()
    if not run_init(hosts, path, model, name, force):
        sys.exit(1)


@group.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    name: Name = None,
    state_dir: StateDir = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Longest wait until it serves.")
    ] = 600.0,
) -> None:
    """Start a server that goes on when this ends. Other flags are those of mlx-dist serve."""
    from mlx_dist.deploy.starting import Order, run_up

    _check_timeout(timeout_s)
    hosts, arguments, variables = _told(context)
    order = Order(hosts, arguments, variables)
    print(run_up(_state(context, name, state_dir), order, timeout_s, _say))


@group.command()
def status(
    context: typer.Context,
    name: Name = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show how the server is. Exit code 0: ready; 3: not running; 4: running and not ready."""
    from mlx_dist.deploy.status import status_of

    state = _state(context, name, state_dir)
    record = state.read()
    key = None
    if record is not None:
        served = _serve_context(context, record.arguments).params
        key = read_key(served["api_key"], served["api_key_file"])
    found = status_of(state, key)
    if as_json:
        from mlx_dist import display

        display.print_json(found.as_object())
    else:
        print("\n".join(found.lines()))
    sys.exit(found.exit_code)


@group.command()
def logs(
    context: typer.Context,
    name: Name = None,
    state_dir: StateDir = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the server ends.")
    ] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Begin this far back.")] = 50,
) -> None:
    """Show the end of the server's log."""
    from mlx_dist.deploy.logs import follow as follow_log

    state = _state(context, name, state_dir)
    record = state.read() if follow else None
    for line in follow_log(state.log, lines, lambda: record is None or not record.is_running):
        print(line, flush=True)


@group.command()
def down(
    context: typer.Context,
    name: Name = None,
    state_dir: StateDir = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Longest wait for answers under way.")
    ] = 30.0,
) -> None:
    """Stop the server, and leave nothing of it on any host. Exit code 1 if that is not sure."""
    from mlx_dist.deploy.stopping import run_down

    _check_timeout(timeout_s)
    if not run_down(_state(context, name, state_dir), timeout_s, _say):
        sys.exit(1)


def _serve_context(context: typer.Context, arguments: list[str]) -> Any:
    """The context of `mlx-dist serve ARGUMENTS`, with what environment and file add to them."""
    program: Any = context.find_root()
    serve = dict(commands_in(program.command))["serve"]
    defaults = program.default_map["serve"]
    return serve.make_context("serve", list(arguments), parent=program, default_map=defaults)


def _told(context: typer.Context) -> tuple[tuple[str, ...], list[str], dict[str, str]]:
    """The hosts that a server would have, leader first, and what it is told, here and only here.

    Its arguments are said anew: a secret becomes a variable and is not remembered, and a path
    holds in any folder.
    """
    served = _serve_context(context, context.args)
    settings: Settings = context.find_root().obj
    variables = {FILE_VARIABLE: str(settings.path)} if settings.path else {}
    arguments = []
    for flag in flags_of(served.command).values():
        if flag.origin(served) is Origin.flag:
            value = served.params[flag.name]
            if flag.is_secret:
                variables[flag.variable] = value
            else:
                arguments += flag.spelled(value.absolute() if isinstance(value, Path) else value)
    ranks, hostfile = served.params["ranks"], served.params["hostfile"]
    is_alone = ranks in (None, 1) or hostfile is None
    return (_HERE,) if is_alone else read_hosts(hostfile), arguments, variables


def _state(context: typer.Context, name: str | None, folder: Path | None) -> StateFolder:
    """The state folder that flags or variables name, or else [cluster] in the file."""
    root: Any = context.find_root()
    settings: Settings = root.obj
    said = settings.table(CLUSTER)
    for key, value in said.items():
        if key not in _KEYS or not isinstance(value, str):
            raise ConfigError(
                f"{settings.path}: {key} in [{CLUSTER}] is not one of {', '.join(_KEYS)} "
                "with a string"
            )
    if name is None and folder is None and "state-dir" in said:
        assert settings.path is not None
        folder = settings.path.parent / Path(said["state-dir"]).expanduser()
    return state_folder(folder, name or said.get("name", _DEFAULT_NAME))


def _check_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s < 1e7:
        raise ConfigError(f"--timeout-s is {timeout_s:g}; use seconds above 0")


def _say(line: str) -> None:
    print(f"mlx-dist: {line}", file=sys.stderr, flush=True)
