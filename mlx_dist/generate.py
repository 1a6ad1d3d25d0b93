"""`mlx-dist generate`: one prompt, its text, and how fast it came."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import chain

from mlx_dist import display
from mlx_dist.cluster import launch
from mlx_dist.config import RunConfig
from mlx_dist.engine.text import Tokenizer
from mlx_dist.messages import Report
from mlx_dist.params import Params
from mlx_dist.serve.llm import LLM

_RANK_FIELDS = ("rank", "host", "layers", "weights_bytes", "peak_rss_bytes", "load_s")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a prompt, and when. Rates count what the clock saw, in tokens a second."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    ttft_s: float
    prompt_tokens_per_s: float
    tokens_per_s: float


def run_generate(
    config: RunConfig, blas: str, prompt: str, chat: bool | None, params: Params, as_json: bool
) -> None:
    """The program of every rank. Raises AgreedError on all of them if any cannot take part.

    `chat` None is a chat where the model has a template.
    """
    # One prompt needs no choice of a batching, and no copy of what it leaves.
    config = replace(config, batching=f"fixed:1,1,{config.prefill_chunk}", reuse_prefixes=False)
    prompts: list[tuple[int, ...]] = []

    def encode(tokenizer: Tokenizer) -> None:
        # Reasoning and calls are text like the rest.
        prompts.append(tokenizer.encode_prompt(prompt, chat))

    with display.progress_bar("loading", launch.is_first_rank(), in_bytes=True) as progress:
        llm = LLM(config, blas=blas, progress=progress, before_load=encode)
    with llm:
        answer = _answer(llm, prompts[0], params, is_streamed=not as_json)
    _show(answer, llm.reports, as_json)


def _answer(llm: LLM, prompt: tuple[int, ...], params: Params, is_streamed: bool) -> Answer:
    pieces: list[str] = []
    start = first = last = time.perf_counter()
    with display.progress_bar("prompt", is_shown=True) as progress:
        generation = llm.open(
            prompt, params, on_news=lambda: progress(generation.num_prefilled, len(prompt))
        )
        chunks = llm.chunks(generation)
        opening = next(chunks)
        first = last = time.perf_counter()
    for chunk in chain([opening], chunks):
        last = time.perf_counter()
        pieces.append(chunk.piece.text)
        if is_streamed and chunk.piece.text:
            display.write_text(chunk.piece.text)
    if is_streamed:
        display.write_text("\n")
    num_tokens = chunk.usage.completion_tokens
    return Answer(
        text="".join(pieces),
        prompt_tokens=len(prompt),
        completion_tokens=num_tokens,
        finish_reason=str(chunk.finish_reason),
        ttft_s=first - start,
        prompt_tokens_per_s=len(prompt) / (first - start),
        tokens_per_s=(num_tokens - 1) / (last - first) if num_tokens > 1 else 0.0,
    )


def _show(answer: Answer, reports: list[Report], as_json: bool) -> None:
    if as_json:
        fields = {name: getattr(answer, name) for name in answer.__slots__}
        display.print_json(fields | {"ranks": display.rank_objects(reports, _RANK_FIELDS)})
        return
    display.rank_table(
        reports,
        f"{answer.prompt_tokens} prompt tokens at {answer.prompt_tokens_per_s:.1f}/s, "
        f"first token after {answer.ttft_s:.2f} s, {answer.completion_tokens} tokens at "
        f"{answer.tokens_per_s:.1f}/s, ended by {answer.finish_reason}",
    )
