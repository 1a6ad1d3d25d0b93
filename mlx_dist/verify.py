"""`mlx-dist verify`: the placement's answers beside those of one process, layer by layer.

Both run the same program on the same plans; the leader runs the one process after the placement,
so it needs memory for the whole model. A pipeline's are equal to the last bit. A tensor group adds
up in another order, so there equal is what differs by no more than rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from mlx_dist import display
from mlx_dist.cluster.placement import Share
from mlx_dist.cluster.world import alone
from mlx_dist.config import RunConfig
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.program import Rank, Spare
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.engine.session import Session, open_session
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import AgreedError, ModelError, RequestError
from mlx_dist.messages import Outcome, Recording, Sampling, expect

# A word, a sentence, and enough text for several chunks of prompt.
DEFAULT_PROMPTS = (
    "Hello",
    "Which rank holds the last layers of the model?",
    "A pipeline passes hidden states from rank to rank. " * 8,
)

_MOST_PROMPT_TOKENS = 512

# By how much of the largest among them logits may differ by rounding in a tensor group. On the
# embedded model they differ by 4e-6, 4e-3 and 0.1, most where its text makes no sense: so in 16
# bits only coarse faults are told from rounding, and float32 is the sharp test.
ROUNDING = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 0.2}

Arrays = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs on one prompt. Differences are the largest absolute ones, 0 for bit-equal.

    `layers` holds only layers that differ, by more than rounding. `first_token` is the index of
    the first token that differs, with the placement's and the one process's id, or None; if it
    `is_near_tie` the logits of the two are as near to each other as rounding can bring them.
    `relative` is `logits` by the largest logit, which may be up to `rounding`.
    """

    prompt: str
    num_tokens: int
    logits: float
    layers: dict[int, float]
    first_token: tuple[int, int, int] | None
    relative: float = 0.0
    rounding: float = 0.0
    is_near_tie: bool = False

    @property
    def is_equal(self) -> bool:
        if not self.rounding:
            return self.logits == 0 and not self.layers and self.first_token is None
        is_same = self.first_token is None or self.is_near_tie
        return is_same and self.relative <= self.rounding


def run_verify(
    config: RunConfig, blas: str, prompts: list[str] | None, max_tokens: int, as_json: bool
) -> bool:
    """The program of every rank; whether all is equal, on every rank."""
    texts = prompts or list(DEFAULT_PROMPTS)
    with open_session(config, blas) as session:
        world = session.world
        requests: list[Request] = []
        with world.agreement():
            if session.tokenizer is not None:
                requests = [_request(session.tokenizer, text, max_tokens) for text in texts]
        rank = session.load()
        with world.agreement():
            single, single_rank = one_process(session) if world.is_leader else (session, rank)
        comparisons = []
        rounding, costs = _rounding(session), session.layout.costs
        vocab_size = 0 if costs is None else costs.vocab_size
        for i, text in enumerate(texts):
            request = requests[i] if world.is_leader else None
            tokens, recording = _run(session, rank, request)
            if world.is_leader:
                single_tokens, single_recording = _run(single, single_rank, request)
                comparisons.append(
                    _compare(
                        text,
                        tokens,
                        single_tokens,
                        recording,
                        single_recording,
                        rounding,
                        vocab_size,
                    )
                )
        equal = Outcome(None if all(c.is_equal for c in comparisons) else "different")
        is_equal = world.control.all_gather(equal)[world.leader_rank] == Outcome()
    if world.is_leader:
        _show(comparisons, as_json)
    return is_equal


def _rounding(session: Session) -> float:
    """What logits may differ by, as a part of the largest; 0 unless there are tensor groups."""
    costs = session.layout.costs
    if costs is None or len(session.layout.stages) == len(session.layout.ranks):
        return 0.0
    return ROUNDING[costs.dtype]


def _request(tokenizer: Tokenizer, text: str, max_tokens: int) -> Request:
    tokens = tokenizer.encode_prompt(text, chat=False)
    if len(tokens) > _MOST_PROMPT_TOKENS:
        raise RequestError(
            f"a prompt has {len(tokens)} tokens; every layer's output is compared, so use at most "
            f"{_MOST_PROMPT_TOKENS}"
        )
    return Request(tokens, tokenizer.limit(tokens, max_tokens), Sampling(), record=True)


def one_process(session: Session) -> tuple[Session, Rank]:
    """The same model and program in a world of one. Raises ModelError if it cannot be."""
    num_layers = session.layout.shares[-1].end
    layout = replace(session.layout, shares=(Share(0, 0, num_layers),))
    single = replace(session, world=alone(), layout=layout)
    try:
        rank = single.load()
        assert isinstance(rank, Rank)
        return single, rank
    except AgreedError as error:
        # Agreed on in the world of one only.
        raise ModelError(f"one process cannot load the whole model: {error}") from None


def answer(session: Session, rank: Rank | Spare, request: Request | None) -> list[Event]:
    """Have all ranks answer the leader's `request`; its events. Others give None and get none.

    Raises RequestError, on the leader, for what cannot be served; the others are told of the end.
    """
    reports = session.reports(rank)
    if isinstance(rank, Spare) or request is None:
        rank.follow()
        return []
    leader = session.leader(rank, reports, Batching(prefill_chunk=session.config.prefill_chunk))
    try:
        return list(leader.stream(request))
    finally:
        if not leader.is_broken:
            leader.shutdown()


def _run(
    session: Session, rank: Rank | Spare, request: Request | None
) -> tuple[list[int], list[Arrays]]:
    """The tokens, on the leader, and for each step what all layers put out and the logits."""
    tokens = [e.token for e in answer(session, rank, request) if e.token is not None]
    own = Recording([[array.tobytes() for array in step] for step in rank.recordings])
    rank.recordings.clear()
    recordings = session.world.control.all_gather(own)
    gathered = [expect(recordings[number], Recording).steps for number in session.layout.pipe]
    return tokens, [
        [np.frombuffer(data, np.float32) for part in step for data in part]
        for step in zip(*gathered, strict=True)
    ]


def _compare(
    text: str,
    tokens: list[int],
    single_tokens: list[int],
    recording: list[Arrays],
    single_recording: list[Arrays],
    rounding: float = 0.0,
    vocab_size: int = 0,
) -> Comparison:
    pairs = list(zip(tokens, single_tokens, strict=True))
    first = next((i for i, (got, want) in enumerate(pairs) if got != want), None)
    # What follows a differing token has another input.
    num_steps = len(recording) - (0 if first is None else len(tokens) - 1 - first)
    steps = list(zip(recording, single_recording, strict=True))[:num_steps]
    differences = [[_difference(a, b) for a, b in zip(*step, strict=True)] for step in steps]
    *layers, logits = (max(column) for column in zip(*differences, strict=True))
    largest = [[_largest(array) for array in single] for _, single in steps]
    *layers_scale, logits_scale = (max(column) for column in zip(*largest, strict=True))
    return Comparison(
        prompt=text,
        num_tokens=len(tokens),
        logits=logits,
        layers={
            i: difference
            for i, (difference, scale) in enumerate(zip(layers, layers_scale, strict=True))
            if difference > rounding * scale
        },
        first_token=None if first is None else (first, *pairs[first]),
        relative=logits / logits_scale if logits else 0.0,
        rounding=rounding,
        is_near_tie=first is not None
        and rounding > 0
        # Of a step with several tokens, the last one is sampled from.
        and _is_near_tie(steps[-1][1][-1][-vocab_size:], *pairs[first], rounding),
    )


def _is_near_tie(
    logits: NDArray[np.float32], token: int, single_token: int, rounding: float
) -> bool:
    """Whether rounding can exchange two tokens, by one process's logits of a step.

    It may raise one of them and lower the other.
    """
    apart = abs(float(logits[single_token]) - float(logits[token]))
    return apart <= 2 * rounding * _largest(logits)


def _largest(array: NDArray[np.float32]) -> float:
    """The largest absolute value; 1 where there is none."""
    with np.errstate(invalid="ignore"):
        return float(np.max(np.abs(array))) or 1.0


def _difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The largest absolute difference: 0 for bit-equal, infinite where one is not a number."""
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = float(np.max(np.abs(a - b)))
    return difference if difference > 0 else math.inf


def _show(comparisons: list[Comparison], as_json: bool) -> None:
    if as_json:
        display.print_json({"prompts": [_as_object(c) for c in comparisons]})
        return
    table = Table("prompt", "tokens", "largest logit difference", "first differing token", "layers")
    for c in comparisons:
        first = "none" if c.first_token is None else "{}: {} for {}".format(*c.first_token)
        first += " (a near tie)" if c.is_near_tie else ""
        within = f"all within {c.rounding:.0e}" if c.rounding else "all equal"
        layers = ", ".join(f"{i}: {d:.2g}" for i, d in c.layers.items()) or within
        text = c.prompt if len(c.prompt) <= 40 else c.prompt[:37] + "..."
        logits = f"{c.logits:.3g}" + (f" ({c.relative:.1g} of the largest)" if c.rounding else "")
        table.add_row(escape(text), str(c.num_tokens), logits, first, layers)
    display.console().print(table)
    is_equal = all(c.is_equal for c in comparisons)
    rounding = max((c.rounding for c in comparisons), default=0.0)
    equal = f"equal within rounding, {rounding:.0e} of the largest logit" if rounding else "equal"
    print(equal if is_equal else "DIFFERENT", flush=True)


def _as_object(comparison: Comparison) -> dict[str, Any]:
    fields = {name: getattr(comparison, name) for name in comparison.__slots__}
    built: dict[str, Any] = msgspec.to_builtins(fields | {"is_equal": comparison.is_equal})
    return built
