"""`mlx-dist generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlx_dist.cli.app import app
from mlx_dist.cli.flags import flag_of
from mlx_dist.cli.options import AsJson, Run, new_seed, runs_model
from mlx_dist.cluster import launch
from mlx_dist.errors import RequestError
from mlx_dist.messages import Sampling
from mlx_dist.params import Params

# Ranks get it as an argument, and Linux takes no argument of 128 KiB.
_MOST_STDIN_BYTES = 120_000


@app.command()
@runs_model("prefill_chunk")
def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="The text to answer, or - to read it from stdin.")],
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
    as_json: AsJson = False,
) -> None:
    """Generate text from one prompt."""
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_parse_logit_bias(logit_bias or []),
        seed=new_seed(seed),
    )
    params = Params(max_tokens, sampling, tuple(stop or ()))
    params.check(flag_of)
    if prompt == "-":
        prompt = _read_stdin()
    blas = run.become_ranks(prompt=prompt)

    from mlx_dist.generate import run_generate

    run_generate(run.config, blas, prompt, chat, params, as_json)


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
