"""`mlx-dist serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.options import (
    DEMO,
    Batching,
    DtypeOption,
    FabricOption,
    Hostfile,
    JacclDevices,
    KvMemory,
    Layers,
    Model,
    NumRanks,
    Trust,
    become_ranks,
)
from mlx_dist.config import Dtype, Fabric, RunConfig, parse_layers
from mlx_dist.engine.batching import parse_batching
from mlx_dist.errors import ConfigError
from mlx_dist.serve.settings import HttpConfig

_HTTP = HttpConfig()


@app.command()
def serve(
    model: Model = DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _HTTP.host,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.")] = _HTTP.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MLX_DIST_API_KEY", help="Key that requests must carry.", show_envvar=True
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name that a Host header may have; may repeat.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call; may repeat.")
    ] = None,
    batching: Batching = "auto",
    max_queue: Annotated[int, typer.Option(help="Most requests that wait.")] = 1024,
    kv_memory_gb: KvMemory = None,
    reuse_prefixes: Annotated[
        bool,
        typer.Option(
            "--reuse-prefixes/--no-reuse-prefixes", help="Keep caches for prompts that begin alike."
        ),
    ] = True,
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
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    jaccl_devices: JacclDevices = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve the model over HTTP, as OpenAI does."""
    config = RunConfig(
        model,
        parse_layers(layers),
        fabric,
        dtype,
        jaccl_devices=jaccl_devices,
        kv_memory_gb=kv_memory_gb,
        batching=batching,
        max_queue=max_queue,
        reuse_prefixes=reuse_prefixes,
        trust_remote_code=trust_remote_code,
    )
    http = HttpConfig(
        host=host,
        port=port,
        api_key=_read_key(api_key, api_key_file),
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
    parse_batching(batching)
    if max_choices > max_queue:
        raise ConfigError(
            f"--max-choices {max_choices} is more than --max-queue {max_queue}; a request of so "
            "many could never be taken"
        )
    blas = become_ranks(num_ranks, hostfile)

    from mlx_dist.server import run_server

    run_server(config, http, blas)


def _read_key(key: str | None, file: Path | None) -> str | None:
    """The API key that is given one way or the other, or None. Raises ConfigError."""
    if file is None:
        return key
    if key is not None:
        raise ConfigError("--api-key and --api-key-file are both given; use one")
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
