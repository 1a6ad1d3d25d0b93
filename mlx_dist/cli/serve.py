"""`mlx-dist serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import Run, runs_model
from mlx_dist.config import Objective, Split
from mlx_dist.engine.batching import parse_batching
from mlx_dist.errors import ConfigError
from mlx_dist.serve.settings import HttpConfig

_HTTP = HttpConfig()


@app.command()
@runs_model(
    "batching",
    "max_queue",
    "kv_memory_gb",
    "reuse_prefixes",
    "trust_remote_code",
    optimize=Objective.throughput,
)
def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _HTTP.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.")] = _HTTP.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MLX_DIST_API_KEY",
            hide_input=True,  # Never shown, never in a command line.
            show_default=False,
            help="Key that requests must carry.",
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name that a Host header may have; may repeat.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call; may repeat.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body.")] = _HTTP.max_body_bytes,
    max_header_bytes: Annotated[
        int, typer.Option(help="Largest headers.")
    ] = _HTTP.max_header_bytes,
    max_connections: Annotated[int, typer.Option(help="Most connections.")] = _HTTP.max_connections,
    max_json_depth: Annotated[int, typer.Option(help="Deepest body.")] = _HTTP.max_json_depth,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    max_choices: Annotated[
        int, typer.Option(help="Most answers to a request.")
    ] = _HTTP.max_choices,
    max_stops: Annotated[int, typer.Option(help="Most stop strings.")] = _HTTP.max_stops,
    max_logprobs: Annotated[int, typer.Option(help="Most logprobs.")] = _HTTP.max_logprobs,
    max_tools: Annotated[int, typer.Option(help="Most tools.")] = _HTTP.max_tools,
    request_timeout_s: Annotated[
        float, typer.Option(help="Longest time for an answer.")
    ] = _HTTP.request_timeout_s,
    body_timeout_s: Annotated[
        float, typer.Option(help="Longest time for a request to arrive.")
    ] = _HTTP.body_timeout_s,
    keep_alive_s: Annotated[
        float, typer.Option(help="A silent stream gets a comment this often.")
    ] = _HTTP.keep_alive_s,
    ready_age_s: Annotated[
        float, typer.Option(help="Not ready when no step has ended for this long.")
    ] = _HTTP.ready_age_s,
    stop_timeout_s: Annotated[
        float, typer.Option(help="Longest wait for streams at the end.")
    ] = _HTTP.stop_timeout_s,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log requests.")] = False,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the ranks again when they fail.")
    ] = False,
    drain_s: Annotated[
        float, typer.Option(help="With --supervise, longest wait for answers at the end.")
    ] = 30.0,
    resume_s: Annotated[
        float, typer.Option(help="With --supervise, longest break of an answer.")
    ] = 120.0,
) -> None:
    """Serve the model over HTTP, as OpenAI does."""
    key = read_key(api_key, api_key_file)
    http = HttpConfig(
        host=host,
        port=port,
        api_key=key,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_body_bytes=max_body_bytes,
        max_header_bytes=max_header_bytes,
        max_connections=max_connections,
        max_json_depth=max_json_depth,
        max_prompt_tokens=max_prompt_tokens,
        max_choices=max_choices,
        max_stops=max_stops,
        max_logprobs=max_logprobs,
        max_tools=max_tools,
        request_timeout_s=request_timeout_s,
        body_timeout_s=body_timeout_s,
        keep_alive_s=keep_alive_s,
        ready_age_s=ready_age_s,
        stop_timeout_s=stop_timeout_s,
        access_log=access_log,
    )
    parse_batching(run.config.batching)
    if max_choices > run.config.max_queue:
        raise ConfigError(
            f"--max-choices {max_choices} is more than --max-queue {run.config.max_queue}; "
            "a request of so many could never be taken"
        )
    if supervise:
        _supervise(run, http, drain_s, resume_s)
    # The file need not be on the other hosts.
    blas = run.become_ranks(api_key=key, api_key_file=None)

    from mlx_dist.server import run_server

    run_server(run.config, http, blas)


def _supervise(run: Run, http: HttpConfig, drain_s: float, resume_s: float) -> NoReturn:
    """Serve from here, over ranks that are children of this process. Does not return."""
    from mlx_dist.supervise.lifecycle import Limits
    from mlx_dist.supervise.roster import roster_of
    from mlx_dist.supervise.supervisor import Plan, run_supervisor

    for name, seconds in (("--drain-s", drain_s), ("--resume-s", resume_s)):
        if not 0 < seconds < 1e7:
            raise ConfigError(f"{name} is {seconds:g}; use seconds above 0")
    # The relay logs requests: it knows the clients.
    arguments = run.rank_arguments(
        supervise=False, access_log=False, api_key=http.api_key, api_key_file=None
    )
    plan = Plan(
        arguments=arguments,
        roster=roster_of(run.ranks, run.hostfile),
        hostfile=run.hostfile,
        can_replan=isinstance(run.config.layers, Split),
        http=http,
        limits=Limits(drain_s=drain_s),
        heartbeat_timeout_s=run.config.heartbeat_timeout_s,
        resume_s=resume_s,
    )
    sys.exit(run_supervisor(plan))


def read_key(key: str | None, file: Path | None) -> str | None:
    """The API key that is given one way or the other, or None. Raises ConfigError."""
    if file is None:
        return key
    if key is not None:
        raise ConfigError("--api-key and --api-key-file are both given; use one")
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
