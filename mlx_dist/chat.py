"""`mlx-dist chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.markup import escape

from mlx_dist import display
from mlx_dist.cluster import launch
from mlx_dist.config import RunConfig
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import MlxDistError, RequestError
from mlx_dist.params import Params
from mlx_dist.serve.llm import LLM

_HELP = "/clear forgets the conversation, /exit ends"


def run_chat(config: RunConfig, blas: str, system: str | None, params: Params) -> None:
    """The program of every rank. Raises AgreedError on all of them if any cannot take part."""
    with display.progress_bar("loading", launch.is_first_rank(), in_bytes=True) as progress:
        llm = LLM(config, blas=blas, progress=progress, before_load=_check_template)
    with llm:
        display.console().print(f"{escape(llm.name)} on {len(llm.reports)} ranks; {_HELP}")
        _converse(llm, [{"role": "system", "content": system}] if system else [], params)


def _check_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.has_chat_template:
        raise RequestError("the model has no chat template; use mlx-dist generate --raw")


def _converse(llm: LLM, beginning: list[dict[str, Any]], params: Params) -> None:
    """Read lines and answer them until one says /exit or no more come."""
    messages = list(beginning)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/clear":
            messages = list(beginning)
        elif line:
            question = {"role": "user", "content": line}
            try:
                answer = _answer(llm, [*messages, question], params)
            except MlxDistError as error:
                # A turn that cannot be served is not part of the conversation.
                display.console().print(f"error: {escape(str(error))}")
            else:
                messages += [question, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next line without white space around it, or None at the end of the input."""
    display.write_text("> ")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(llm: LLM, messages: list[dict[str, Any]], params: Params) -> str:
    text = ""
    for chunk in llm.chunks(llm.open(llm.tokenizer.encode_chat(messages), params)):
        if chunk.piece.reasoning:
            display.console().print(escape(chunk.piece.reasoning), end="", style="dim")
        text += chunk.piece.text
        display.write_text(chunk.piece.text)
    display.write_text("\n")
    return text
