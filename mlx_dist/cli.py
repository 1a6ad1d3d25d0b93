"""The command line: what each command takes, and how its result is shown.

Importing this module imports neither MLX nor MPI, so that `-n 3` can become mpirun at once and a
rank can open its BLAS first.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

import mlx_dist
from mlx_dist.cluster import launch
from mlx_dist.cluster.blas import preload_blas
from mlx_dist.config import Dtype, Fabric, RunConfig, parse_layers
from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.batching import parse_batching
from mlx_dist.errors import ConfigError, RequestError
from mlx_dist.messages import Sampling
from mlx_dist.params import Params
from mlx_dist.serve.settings import HttpConfig

app = typer.Typer(
    help="One language model on 2 to 8 machines: an MPI program for Apple's MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="A model's folder or hub id.")]
NumRanks = Annotated[
    int | None, typer.Option("-n", "--ranks", help="Start this many ranks under mpirun.")
]
Hostfile = Annotated[Path | None, typer.Option(help="mpirun's list of hosts, used with -n.")]
Layers = Annotated[str | None, typer.Option(help="Layers of each rank, as in 3,1,2. Even if left.")]
FabricOption = Annotated[Fabric, typer.Option("--fabric", help="What moves arrays.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Convert the weights to this.")]
PrefillChunk = Annotated[int, typer.Option(help="Most prompt tokens in one step.")]
JacclDevices = Annotated[Path | None, typer.Option(help="Device matrix for --fabric jaccl.")]
KvMemory = Annotated[float | None, typer.Option(help="Memory for sequences on each rank, in GB.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the tokenizer.")
]
Batching = Annotated[
    str,
    typer.Option(help="auto, measure, or fixed:M,B,C: microbatches, sequences of each, chunk."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_DEMO = str(MODEL_DIR)
_HTTP = HttpConfig()
# Ranks get it as an argument, and Linux takes no argument of 128 KiB.
_MOST_STDIN_BYTES = 120_000


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The text to answer, or - to read it from stdin.")],
    model: Model = _DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="As a chat, or as it is. Chat if there is a template."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability, of the likeliest's.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide logits of the last 20 tokens; 1 is off.")
    ] = 1,
    presence_penalty: Annotated[
        float, typer.Option(help="Take from logits of the last 20 tokens.")
    ] = 0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time seen.")] = 0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(help="TOKEN_ID:BIAS, added to a logit; may repeat.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text before this string; may repeat.")
    ] = None,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 512,
    jaccl_devices: JacclDevices = None,
    as_json: AsJson = False,
) -> None:
    """Generate text from one prompt."""
    config = RunConfig(model, parse_layers(layers), fabric, dtype, prefill_chunk, jaccl_devices)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_parse_logit_bias(logit_bias or []),
        seed=_seed(seed),
    )
    params = Params(max_tokens, sampling, tuple(stop or ()))
    params.check(_flag)
    if prompt == "-":
        prompt = _read_stdin()
        # For the ranks: of an option that is given twice, the last counts.
        sys.argv += ["--prompt", prompt]
    blas = _become_ranks(num_ranks, hostfile)

    from mlx_dist.generate import run_generate

    run_generate(config, blas, prompt, chat, params, as_json)


@app.command()
def verify(
    model: Model = _DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to compare on; may repeat.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode after each prompt.")] = 8,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 16,
    jaccl_devices: JacclDevices = None,
    as_json: AsJson = False,
) -> None:
    """Compare the placement with one process, layer by layer. Exit code 1 if they differ."""
    config = RunConfig(model, parse_layers(layers), fabric, dtype, prefill_chunk, jaccl_devices)
    Params(max_tokens).check(_flag)
    blas = _become_ranks(num_ranks, hostfile)

    from mlx_dist.verify import run_verify

    if not run_verify(config, blas, prompt, max_tokens, as_json):
        sys.exit(1)


@app.command()
def bench(
    model: Model = _DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    prompt_tokens: Annotated[int, typer.Option("-p", help="Length of the random prompt.")] = 128,
    generation_tokens: Annotated[int, typer.Option("-g", help="Tokens to generate.")] = 64,
    num_trials: Annotated[int, typer.Option("-r", help="Measured repetitions.")] = 3,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 512,
    jaccl_devices: JacclDevices = None,
    as_json: AsJson = False,
) -> None:
    """Measure prompt and generation speed on random tokens."""
    config = RunConfig(model, parse_layers(layers), fabric, dtype, prefill_chunk, jaccl_devices)
    least = {"-p": (prompt_tokens, 1), "-g": (generation_tokens, 2), "-r": (num_trials, 1)}
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise ConfigError(f"{flag} is {value}; use {minimum} or more")
    blas = _become_ranks(num_ranks, hostfile)

    from mlx_dist.bench import run_bench

    run_bench(config, blas, prompt_tokens, generation_tokens, num_trials, as_json)


@app.command()
def serve(
    model: Model = _DEMO,
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
    blas = _become_ranks(num_ranks, hostfile)

    from mlx_dist.server import run_server

    run_server(config, http, blas)


@app.command()
def chat(
    model: Model = _DEMO,
    num_ranks: NumRanks = None,
    hostfile: Hostfile = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    kv_memory_gb: KvMemory = None,
    layers: Layers = None,
    fabric: FabricOption = Fabric.auto,
    dtype: DtypeOption = Dtype.auto,
    prefill_chunk: PrefillChunk = 512,
    jaccl_devices: JacclDevices = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the model in the terminal."""
    config = RunConfig(
        model,
        parse_layers(layers),
        fabric,
        dtype,
        prefill_chunk,
        jaccl_devices,
        kv_memory_gb,
        batching=f"fixed:1,1,{prefill_chunk}",
        trust_remote_code=trust_remote_code,
    )
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=_seed(seed))
    params = Params(max_tokens, sampling)
    params.check(_flag)
    blas = _become_ranks(num_ranks, hostfile)

    from mlx_dist.chat import run_chat

    run_chat(config, blas, system, params)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(mlx_dist.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _become_ranks(num_ranks: int | None, hostfile: Path | None) -> str:
    """Start the ranks that are asked for, or be one; answer which BLAS it multiplies with."""
    if not launch.under_a_launcher():
        if num_ranks is not None and num_ranks != 1:
            launch.relaunch(num_ranks, hostfile, sys.argv[1:])
        if hostfile is not None:
            raise ConfigError("--hostfile goes with -n of 2 or more; say how many ranks to start")
    elif num_ranks is not None and num_ranks != launch.launched_size():
        raise ConfigError(
            f"-n {num_ranks} under a launcher that started {launch.launched_size()} ranks; "
            "leave -n out"
        )
    return preload_blas(launch.threads_per_rank())


def _read_stdin() -> str:
    """The text on stdin. Raises RequestError if it cannot become a prompt."""
    if launch.launched_size() > 1:
        raise RequestError(
            "--prompt - does not work under mpirun or mlx.launch, which never tell a rank that "
            "stdin is over; use `mlx-dist generate -n N --prompt -`"
        )
    data = sys.stdin.buffer.read(_MOST_STDIN_BYTES + 1)
    if len(data) > _MOST_STDIN_BYTES:
        raise RequestError(f"stdin has more than {_MOST_STDIN_BYTES} bytes; shorten the prompt")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise RequestError("stdin has a NUL character; a prompt is text")
    return text


def _parse_logit_bias(pairs: list[str]) -> dict[int, float]:
    bias = {}
    for pair in pairs:
        token, _, value = pair.partition(":")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise RequestError(
                f"--logit-bias {pair!r} is not TOKEN_ID:BIAS, as in 42:-100"
            ) from None
    return bias


def _seed(seed: int | None) -> int:
    return secrets.randbits(63) if seed is None else seed


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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
