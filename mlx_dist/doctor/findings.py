"""What a check is made of: every rank's answer to a question, and the line a person reads.

Knows ranks and words; knows nothing that could be wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_dist.cluster.world import World
from mlx_dist.config import RunConfig
from mlx_dist.display import Level
from mlx_dist.errors import MlxDistError
from mlx_dist.messages import Identity, Outcome

Facts = dict[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found and, unless all is well, what to do.

    `details` are lines below it, `data` numbers for those who read JSON.
    """

    level: Level
    name: str
    found: str
    remedy: str = ""
    details: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: the ranks that have met, and what they were asked to run.

    A server would listen on `port` of `address`. With `is_quick` files are not read whole.
    """

    world: World
    config: RunConfig
    blas: str
    address: str
    port: int
    is_quick: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What one rank says: facts, or why it has none."""

    rank: int
    facts: Facts
    error: str | None = None


def ask(world: World, part: Callable[[], Facts]) -> list[Answer]:
    """Have every rank run `part`; all answers, in rank order, on every rank.

    A rank where `part` raises MlxDistError answers with that.
    """
    try:
        message: Identity | Outcome = Identity(world.host, part())
    except MlxDistError as error:
        message = Outcome(str(error))
    answers = []
    for rank, answer in enumerate(world.control.all_gather(message)):
        if isinstance(answer, Identity):
            answers.append(Answer(rank, answer.facts))
        else:
            assert isinstance(answer, Outcome)
            answers.append(Answer(rank, {}, answer.error))
    return answers


def on_each(world: World, own: Finding) -> Finding:
    """The worst of what the ranks find, with every rank that finds as bad; on every rank."""
    facts = {"level": str(own.level), "found": own.found, "remedy": own.remedy}
    answers = ask(world, lambda: facts)
    for level in (Level.fail, Level.warn):
        found = [answer for answer in answers if answer.facts["level"] == level]
        if found:
            told = "; ".join(f"{a.facts['found']} on {place(world, a.rank)}" for a in found)
            remedies = dict.fromkeys(answer.facts["remedy"] for answer in found)
            return Finding(level, own.name, told, "; ".join(remedies))
    return Finding(
        Level.ok, own.name, answers[world.leader_rank].facts["found"] + everywhere(world)
    )


def place(world: World, rank: int) -> str:
    """A rank, by a name that leads a person to it."""
    return f"rank {rank} ({world.hosts[rank]})"


def spread(answers: Iterable[Answer], fact: str) -> dict[str, list[int]]:
    """Which ranks say what of `fact`; one entry if all that know it agree."""
    ranks: dict[str, list[int]] = {}
    for answer in answers:
        if fact in answer.facts:
            ranks.setdefault(answer.facts[fact], []).append(answer.rank)
    return ranks


def everywhere(world: World) -> str:
    """What ends a sentence about all ranks."""
    return " on every rank" if world.size > 1 else ""


def differences(world: World, answers: Sequence[Answer]) -> list[str]:
    """Each fact on which the ranks differ: what it is where. What one lacks is no fact of it."""
    told = []
    for fact in dict.fromkeys(name for answer in answers for name in answer.facts):
        values = spread(answers, fact)
        if len(values) > 1:
            parts = (
                f"{value} on {', '.join(place(world, rank) for rank in ranks)}"
                for value, ranks in values.items()
            )
            told.append(f"{fact} is {', '.join(parts)}")
    return told


def errors(world: World, answers: Iterable[Answer]) -> list[str]:
    """Each rank's error with its place; one without, if all have the same."""
    failed = [answer for answer in answers if answer.error is not None]
    if len(failed) == world.size and len({answer.error for answer in failed}) == 1:
        return [str(failed[0].error)]
    return [f"{place(world, answer.rank)}: {answer.error}" for answer in failed]
