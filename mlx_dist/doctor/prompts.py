"""A short and a long prompt, answered by the placement and by one process beside it.

The long one goes down the pipe in several chunks, and has a number hidden in it that it asks for:
where one process has no room for the model, finding it is what shows that the chunks were put
together well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_dist import display
from mlx_dist.cluster.memory import available_bytes
from mlx_dist.display import Level
from mlx_dist.doctor.findings import Facts, Finding, ask
from mlx_dist.engine.program import Rank, Spare
from mlx_dist.engine.sequence import Event, Request
from mlx_dist.engine.session import Session
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import AgreedError, MlxDistError
from mlx_dist.messages import Sampling
from mlx_dist.verify import answer, one_process

NAMES = ("short prompt", "long prompt")

_SHORT = "Name a colour."
_NUMBER = "48371"
_FILLER = "Each rank computes its layers and sends what comes out of them to the next one. "
_HIDDEN = f"The number to remember is {_NUMBER}. "
_QUESTION = "What is the number to remember? Answer with the number only."
_LONG_TOKENS = 1024
_ANSWER_TOKENS = 16
# Of its size, what a model needs beside its weights to answer one prompt.
_ROOM = 1.1
# Rounding does not make logarithms of probabilities differ by more.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class _Alone:
    """One process with the whole model, or why there is none. The leader's."""

    session: Session | None = None
    rank: Rank | None = None
    reason: str = ""


def check(session: Session) -> Iterator[Finding]:
    """Load the placement, and have it answer both prompts."""
    world = session.world
    requests: list[Request] = []

    def build() -> Facts:
        if session.tokenizer is not None:
            requests.extend(_requests(session.tokenizer))
        return {}

    if error := ask(world, build)[world.leader_rank].error:
        yield from (Finding(Level.fail, name, error) for name in NAMES)
        return
    try:
        with display.progress_bar("loading", world.is_leader, in_bytes=True) as progress:
            rank = session.load(progress)
    except AgreedError as loading:
        yield from (Finding(Level.fail, name, str(loading)) for name in NAMES)
        return
    alone = _alone(session) if world.is_leader else _Alone()
    for i, name in enumerate(NAMES):
        if world.is_leader:
            assert isinstance(rank, Rank)
            yield _judged(session, rank, alone, name, requests[i])
        else:
            answer(session, rank, None)
            yield Finding(Level.ok, name, "")


def _requests(tokenizer: Tokenizer) -> Iterator[Request]:
    most_tokens = _LONG_TOKENS
    if tokenizer.context_tokens is not None:
        most_tokens = min(most_tokens, tokenizer.context_tokens // 2)
    for tokens in (tokenizer.encode_prompt(_SHORT, chat=None), _long(tokenizer, most_tokens)):
        max_tokens = tokenizer.limit(tokens, _ANSWER_TOKENS)
        yield Request(tokens, max_tokens, Sampling(num_logprobs=0), tokenizer.stop_tokens)


def _long(tokenizer: Tokenizer, most_tokens: int) -> tuple[int, ...]:
    """A prompt of nearly `most_tokens`, with what it asks for in the middle."""

    def tokens(num_fillers: int) -> tuple[int, ...]:
        half = num_fillers // 2
        text = _FILLER * half + _HIDDEN + _FILLER * (num_fillers - half) + _QUESTION
        return tokenizer.encode_prompt(text, chat=None)

    least = len(tokens(0))
    per_filler = (len(tokens(10)) - least) / 10
    return tokens(max(0, int((most_tokens - least) / per_filler)))


def _alone(session: Session) -> _Alone:
    costs = session.layout.costs
    assert costs is not None
    if session.world.size == 1:
        return _Alone(reason="this is one process itself")
    need_bytes, free_bytes = _ROOM * costs.weights_bytes(0, costs.num_layers), available_bytes()
    if need_bytes > free_bytes:
        return _Alone(
            reason=f"one process would need {need_bytes / 1e9:.1f} GB and the leader's host has "
            f"{free_bytes / 1e9:.1f} GB left"
        )
    try:
        return _Alone(*one_process(session))
    except MlxDistError as error:
        return _Alone(reason=str(error))


def _judged(session: Session, rank: Rank, alone: _Alone, name: str, request: Request) -> Finding:
    try:
        events = _answered(session, rank, request)
        num_chunks = math.ceil(len(request.prompt) / session.config.prefill_chunk)
        chunks = f" in {num_chunks} chunks" if num_chunks > 1 else ""
        done = f"{len(request.prompt)} tokens{chunks}, {len(events)} answered"
        if alone.session is None or alone.rank is None:
            return _judged_alone(session, name, done, alone.reason, events)
        own = _answered(alone.session, alone.rank, request)
    except MlxDistError as error:
        return Finding(Level.fail, name, str(error))
    return compare(name, done, events, own, _are_alike(session), _adds_up(session))


def _answered(session: Session, rank: Rank | Spare, request: Request) -> list[Event]:
    return [event for event in answer(session, rank, request) if event.token is not None]


def compare(
    name: str,
    done: str,
    events: list[Event],
    own: list[Event],
    are_alike: bool,
    adds_up: bool = False,
) -> Finding:
    """What the placement's answer is worth beside `own`, that of one process.

    Where chips are not alike, they round differently, and a near tie may go the other way. A
    tensor group always does, for it `adds_up` in another order.
    """
    remedy = "mlx-dist verify tells in which layer; see whether versions and chips are the same"
    tokens, own_tokens = [e.token for e in events], [e.token for e in own]
    if tokens != own_tokens:
        pairs = enumerate(zip(tokens, own_tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(own_tokens)))
        apart = max(map(_apart, events[: at + 1], own[: at + 1]), default=math.inf)
        if adds_up and apart <= _ROUNDING:
            found = f"{done}; as one process does up to a near tie at the {at + 1}. token"
            return Finding(Level.ok, name, found)
        found = f"{done}; one process answers otherwise from the {at + 1}. token"
        return Finding(Level.fail if are_alike else Level.warn, name, found, remedy)
    apart = max(map(_apart, events, own), default=0.0)
    if apart > _ROUNDING:
        found = f"{done}, as one process does, but its log probabilities differ by {apart:.2g}"
        return Finding(Level.fail, name, found, remedy)
    rounding = f", within {apart:.1g} of its log probabilities" if apart else ""
    return Finding(Level.ok, name, f"{done}: as one process does{rounding}")


def _apart(event: Event, own: Event) -> float:
    """How far the log probabilities of a token are apart; infinitely if one is not a number."""
    assert event.logprobs is not None
    assert own.logprobs is not None
    apart = abs(event.logprobs.logprob - own.logprobs.logprob)
    return math.inf if math.isnan(apart) else apart


def _judged_alone(
    session: Session, name: str, done: str, reason: str, events: list[Event]
) -> Finding:
    """With nothing to compare with, that the hidden number was found shows the most."""
    found = f"{done}; not compared: {reason}"
    if name == NAMES[0] or session.world.size == 1:
        return Finding(Level.ok, name, found)
    assert session.tokenizer is not None
    text = b"".join(map(session.tokenizer.token_bytes, (e.token for e in events if e.token)))
    if _NUMBER.encode() in text:
        return Finding(Level.ok, name, f"{found}; the answer has the number hidden in it")
    remedy = (
        "a small model may not find it; compare a smaller model of this family, which fits one "
        "host, with mlx-dist verify"
    )
    return Finding(Level.warn, name, f"{found}; it lacks the number hidden in the prompt", remedy)


def _are_alike(session: Session) -> bool:
    chips = {session.layout.machines[number].chip for number in session.layout.ranks}
    return len(chips) == 1 or mx.default_device().type.name == "cpu"


def _adds_up(session: Session) -> bool:
    return len(session.layout.ranks) > len(session.layout.stages)
