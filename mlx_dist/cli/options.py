"""Flags that several commands take, and what becomes of them: a configuration, and ranks."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_dist.cli.flags import MayBePath, Origin, flags_of
from mlx_dist.cli.settings import FILE_VARIABLE
from mlx_dist.cluster import launch
from mlx_dist.cluster.blas import preload_blas
from mlx_dist.config import (
    Dtype,
    Fabric,
    Objective,
    RunConfig,
    Weights,
    parse_layers,
    parse_memory,
    parse_parallel,
    parse_slices,
)
from mlx_dist.demo import MODEL_DIR
from mlx_dist.errors import ConfigError

DEMO = str(MODEL_DIR)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# The flags of every command that runs a model, by the fields of RunConfig that they fill. One line
# here, and a row in docs/operations.md, makes another.
_OF_ALL: dict[str, Any] = {
    "model": Annotated[str, typer.Option(help="A model's folder or hub id."), MayBePath],
    "layers": Annotated[
        str, typer.Option(help="auto, even, or the layers of each rank, as in 3,1,2.")
    ],
    "parallel": Annotated[
        str, typer.Option(help="pipeline, tensor, tensor=N for groups of N ranks, or auto.")
    ],
    "slices": Annotated[
        str, typer.Option(help="auto, even, or the size of each rank's slices, as in 2,1,1.")
    ],
    "optimize": Annotated[Objective, typer.Option(help="What auto cuts the layers for.")],
    "leave_out": Annotated[
        bool, typer.Option("--leave-out", help="Let auto leave slow machines without layers.")
    ],
    "memory_gb": Annotated[
        list[str] | None,
        typer.Option(help="Most memory of a rank, in GB, or HOST=GB; may repeat."),
    ],
    "fabric": Annotated[Fabric, typer.Option(help="What moves arrays.")],
    "dtype": Annotated[Dtype, typer.Option(help="Convert the weights to this.")],
    "weights": Annotated[
        Weights, typer.Option(help="leader: ranks without the model are sent their part of it.")
    ],
    "jaccl_devices": Annotated[Path | None, typer.Option(help="Device matrix for --fabric jaccl.")],
    "heartbeat_timeout_s": Annotated[
        float, typer.Option(help="A rank that is silent for longer ends the job.")
    ],
}
# Those of commands that ask for them.
_OF_SOME: dict[str, Any] = {
    "prefill_chunk": Annotated[int, typer.Option(help="Most prompt tokens in one step.")],
    "kv_memory_gb": Annotated[
        float | None, typer.Option(help="Memory for sequences on each rank, in GB.")
    ],
    "batching": Annotated[
        str,
        typer.Option(help="auto, measure, or fixed:M,B,C: microbatches, sequences of each, chunk."),
    ],
    "max_queue": Annotated[int, typer.Option(help="Most requests that wait.")],
    "reuse_prefixes": Annotated[
        bool,
        typer.Option(
            "--reuse-prefixes/--no-reuse-prefixes", help="Keep caches for prompts that begin alike."
        ),
    ],
    "trust_remote_code": Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the tokenizer.")
    ],
}
_PARSERS: dict[str, Callable[[Any], Any]] = {
    "layers": parse_layers,
    "parallel": parse_parallel,
    "slices": parse_slices,
    "memory_gb": lambda texts: parse_memory(texts or ()),
}
_RANKS = {
    "ranks": Annotated[
        int | None, typer.Option("-n", "--ranks", help="Start this many ranks under mpirun.")
    ],
    "hostfile": Annotated[Path | None, typer.Option(help="mpirun's list of hosts, used with -n.")],
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a command that runs a model is given: the configuration, and the way to its ranks."""

    config: RunConfig
    ranks: int | None
    hostfile: Path | None
    context: typer.Context

    def become_ranks(self, **instead: Any) -> str:
        """Start the ranks that are asked for, or be one; answer which BLAS it multiplies with.

        Ranks that are started get the values of `instead` in place of this process's own. Does not
        return where they are: this process becomes mpirun. Raises ConfigError, LaunchError.
        """
        if not launch.under_a_launcher():
            if self.ranks is not None and self.ranks != 1:
                instead |= {"ranks": None, "hostfile": None}
                launch.relaunch(self.ranks, self.hostfile, _arguments(self.context, instead))
            if self.is_given("hostfile"):
                raise ConfigError(
                    "--hostfile goes with -n of 2 or more; say how many ranks to start"
                )
        elif self.is_given("ranks") and self.ranks != launch.launched_size():
            raise ConfigError(
                f"-n {self.ranks} under a launcher that started {launch.launched_size()} ranks; "
                "leave -n out"
            )
        return preload_blas(launch.threads_per_rank())

    def rank_arguments(self, **instead: Any) -> list[str]:
        """The arguments of `mlx-dist` that start one of the ranks that are asked for.

        As `become_ranks`, but for another process to run; secrets are in this one's environment.
        Raises ConfigError under a launcher, where the ranks are there already.
        """
        if launch.under_a_launcher():
            raise ConfigError("--supervise starts the ranks itself; give it -n, without mpirun")
        if self.is_given("hostfile") and self.ranks in (None, 1):
            raise ConfigError("--hostfile goes with -n of 2 or more; say how many ranks to start")
        launch.note_terminal()
        return _arguments(self.context, instead | {"ranks": None, "hostfile": None})

    def is_given(self, name: str) -> bool:
        """Whether this command line says it, and not a file or a variable that others share."""
        return (
            flags_of(self.context.command)[name.replace("_", "-")].origin(self.context)
            is Origin.flag
        )


def _arguments(context: typer.Context, instead: dict[str, Any]) -> list[str]:
    """The command line of ranks that read no file: this one's flags, and what its file said.

    mpirun carries MLX_ variables, so what they set is left to them. A secret becomes one: anybody
    on the host can read a command line.
    """
    os.environ[FILE_VARIABLE] = ""
    arguments = [str(context.info_name)]
    for flag in flags_of(context.command).values():
        value = instead.get(flag.name, context.params[flag.name])
        if flag.name in instead:
            os.environ.pop(flag.variable, None)
        elif flag.origin(context) in (Origin.environment, Origin.default):
            continue
        if flag.is_secret and value is not None:
            os.environ[flag.variable] = value
        else:
            arguments += flag.spelled(value)
    return arguments


Command = Callable[..., None]


def runs_model(*names: str, **defaults: Any) -> Callable[[Command], Command]:
    """Give a command the flags that make a RunConfig, and as its first argument a Run.

    `names` are flags that not every command has; those of `defaults` have another default here.
    """
    flags = _OF_ALL | {name: kind for name, kind in _OF_SOME.items() if name in {*names, *defaults}}
    usual = {field.name: field.default for field in fields(RunConfig)}
    usual |= {"model": DEMO, "memory_gb": None} | defaults

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_run(click_context: typer.Context, **values: Any) -> None:
            settings = {name: values.pop(name) for name in flags}
            settings |= {name: parse(settings[name]) for name, parse in _PARSERS.items()}
            ranks, hostfile = values.pop("ranks"), values.pop("hostfile")
            command(Run(RunConfig(**settings), ranks, hostfile, click_context), **values)

        signature = _signature(command, flags, usual)
        # What typer reads; the code above takes any name.
        with_run.__signature__ = signature  # type: ignore[attr-defined]
        with_run.__annotations__ = {
            name: parameter.annotation for name, parameter in signature.parameters.items()
        }
        return with_run

    return decorate


def _signature(command: Command, flags: dict[str, Any], usual: dict[str, Any]) -> inspect.Signature:
    """The command's signature with `flags` in place of its Run."""

    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=annotation)

    context = parameter("click_context", typer.Context, inspect.Parameter.empty)
    model, *others = [parameter(name, kind, usual[name]) for name, kind in flags.items()]
    ranks = [parameter(name, kind, None) for name, kind in _RANKS.items()]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    required = [each for each in own if each.default is each.empty]
    optional = [each for each in own if each.default is not each.empty]
    return inspect.Signature([context, *required, model, *ranks, *optional, *others])


def new_seed(seed: int | None) -> int:
    return secrets.randbits(63) if seed is None else seed
