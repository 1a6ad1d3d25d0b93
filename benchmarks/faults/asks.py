"""The requests of the load, and what is to be said of their answers. Knows no sockets."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from benchmarks.reference import Question, Reference
from mlx_dist.demo import MODEL_DIR
from mlx_dist.messages import Sampling

_VOCAB = range(5, 700)
_QUESTIONS = (
    "What is a rank?",
    "Could you explain the KV cache to me?",
    "what happens when a rank dies?",
    "What is a stage?",
    "Tell me about the placement.",
    "What is a slot?",
)
_NOT_TAKEN = frozenset({429, 503})
_BEFORE_IT_SERVES = "starting"
_AT_ITS_END = "draining"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, which always has the same answer."""

    path: str
    body: str

    @property
    def is_streamed(self) -> bool:
        return '"stream": true' in self.body


@dataclass(frozen=True, slots=True)
class Told:
    """A complete answer: text and reason of its end, by choice; how often each was told to end."""

    choices: tuple[tuple[str, str | None], ...]
    num_ends: tuple[int, ...]


class Outcome(StrEnum):
    """What became of a request."""

    right = "right"
    tie = "tie"
    """Another than that of an undisturbed run, which one process could as well have given."""
    wrong = "wrong"
    twice = "twice"
    error = "error"
    """It was taken, and answered with an error."""
    lost = "lost"
    """Its connection broke off before it was answered."""
    hung = "hung"
    refused = "refused"
    """It was not taken, and may be asked again: 503 or 429."""
    unreached = "unreached"
    """Nobody listened."""


def asks(num: int, seed: int, is_long: bool = False) -> list[Ask]:
    """`num` requests of all kinds; those that are long have prompts that take several steps."""
    chance = random.Random(seed)
    return [_ask(chance, number, is_long) for number in range(num)]


def _ask(chance: random.Random, number: int, is_long: bool) -> Ask:
    body: dict[str, Any] = {
        "model": MODEL_DIR.name,
        "max_tokens": chance.randrange(30, 90),
        # Its end would come too soon.
        "logit_bias": {"0": -100},
    }
    # Each fifth of one kind: all are there whatever the seed.
    kind = number % 5
    if kind in (1, 2, 4):
        body |= {"temperature": chance.choice([0.7, 1.0]), "seed": chance.randrange(1 << 30)}
    else:
        body["temperature"] = 0
    if kind in (2, 4):
        body["n"] = 2
    body["stream"] = kind in (0, 1, 2)
    if is_long or chance.random() < 0.5:
        length = chance.randrange(300, 500) if is_long else chance.choice([2, 20, 150])
        body["prompt"] = [chance.choice(_VOCAB) for _ in range(length)]
        return Ask("/v1/completions", json.dumps(body))
    body["messages"] = [{"role": "user", "content": chance.choice(_QUESTIONS)}]
    return Ask("/v1/chat/completions", json.dumps(body))


def is_refusal(status: int, body: bytes) -> bool:
    """Whether a request was not taken, rather than taken and not answered."""
    said = body.decode(errors="replace")
    return status == 429 or (
        status in _NOT_TAKEN and (_BEFORE_IT_SERVES in said or _AT_ITS_END in said)
    )


def read_answer(body: bytes) -> Told:
    """An answer in one piece. Raises ValueError, LookupError."""
    found = {choice["index"]: choice for choice in json.loads(body)["choices"]}
    return Told(
        tuple((_text(found[i]), found[i]["finish_reason"]) for i in sorted(found)),
        (1,) * len(found),
    )


def read_stream(body: bytes) -> Told | str:
    """A stream's whole text, or the error that ended it. Raises ValueError if it has no end."""
    texts: dict[int, str] = {}
    ends: dict[int, list[str]] = {}
    *events, rest = body.split(b"\n\n")
    data = [line[6:] for event in events for line in event.split(b"\n") if line[:6] == b"data: "]
    for number, event in enumerate(data):
        if event == b"[DONE]":
            if number + 1 < len(data) or rest:
                raise ValueError("something comes after the end")
            break
        said = json.loads(event)
        if "error" in said:
            return str(said["error"]["message"])
        for choice in said["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + _text(choice)
            if choice.get("finish_reason"):
                ends.setdefault(index, []).append(choice["finish_reason"])
    else:
        raise ValueError("the stream has no end")
    indices = sorted(texts)
    return Told(
        tuple((texts[i], ends.get(i, [None])[0]) for i in indices),
        tuple(len(ends.get(i, ())) for i in indices),
    )


def compare(told: Told, due: Told) -> Outcome:
    """What an answer is beside that of an undisturbed run."""
    if told == due:
        return Outcome.right
    if max(told.num_ends, default=0) > 1 or any(
        len(text) >= 2 * len(again) and again and text.startswith(again * 2)
        for (text, _), (again, _) in zip(told.choices, due.choices, strict=False)
    ):
        return Outcome.twice
    return Outcome.wrong


def could_say(reference: Reference, ask: Ask, told: Told, due: Told) -> bool:
    """Whether one process could have answered so, and not only as it is `due`."""
    ends = [[reason for _, reason in answer.choices] for answer in (told, due)]
    return ends[0] == ends[1] and all(
        reference.could_say(_question(reference, ask, index), text)
        for index, (text, _) in enumerate(told.choices)
    )


def _question(reference: Reference, ask: Ask, index: int) -> Question:
    """What the choice of that number is asked."""
    body = json.loads(ask.body)
    prompt = body.get("prompt") or reference.tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_dict=False
    )
    sampling = Sampling(
        temperature=body["temperature"],
        # Choices have seeds that follow one another.
        seed=body.get("seed", 0) + index,
        logit_bias={int(token): bias for token, bias in body["logit_bias"].items()},
    )
    return Question(prompt, body["max_tokens"], sampling)


def _text(choice: dict[str, Any]) -> str:
    said = choice.get("delta") or choice.get("message")
    return str(choice.get("text") or "") if said is None else str(said.get("content") or "")
