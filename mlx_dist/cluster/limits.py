"""What a round of decoding takes, and what bounds it, in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dist.cluster.steps import Seconds

# Machines or links that take this much of what the slowest takes are named with it.
_ALIKE = 0.9
_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class Turn:
    """A round in which every one of `num_sequences` gets a token.

    `busy` is what all microbatches together take of each stage, `links_s` of each link, the last
    one back to the first stage. `stages` and `hops_s` are those of the largest microbatch alone.
    """

    num_sequences: int
    num_microbatches: int
    busy: Sequence[Seconds]
    links_s: Sequence[float]
    stages: Sequence[Seconds]
    hops_s: Sequence[float]

    @property
    def way_s(self) -> float:
        """Seconds of the largest microbatch's way through all stages and back."""
        return sum(stage.total_s for stage in self.stages) + sum(self.hops_s)

    @property
    def seconds(self) -> float:
        busiest_s = max(stage.total_s for stage in self.busy)
        return max(busiest_s, max(self.links_s), self.way_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_sequences / self.seconds


def limit_of(turn: Turn, names: Sequence[str]) -> str:
    """What bounds `turn`: memory, products, small operations or collectives of machines, or a link.

    `names` are the stages' machines, or groups of them. Where the whole way is what counts, it is
    what takes most of it; else what takes most of the busiest stage, or the busiest link.
    """
    links = [f"{a} to {b}" for a, b in zip(names, [*names[1:], names[0]], strict=True)]
    stages = list(turn.stages)
    if turn.seconds > turn.way_s:
        if max(turn.links_s) >= turn.seconds:
            return _named("link", links, turn.links_s)
        # Only the busiest stages count.
        slowest_s = max(stage.total_s for stage in turn.busy)
        stages = [s if s.total_s >= _ALIKE * slowest_s else Seconds() for s in turn.busy]
        kinds = _kinds(stages)
    else:
        kinds = {**_kinds(stages), "link": list(turn.hops_s)}
    kind = max(kinds, key=lambda name: sum(kinds[name]))
    return _named(kind, links if kind == "link" else list(names), kinds[kind])


def _kinds(stages: Sequence[Seconds]) -> dict[str, list[float]]:
    return {
        "memory bandwidth of": [stage.memory_s for stage in stages],
        "products of": [stage.products_s for stage in stages],
        "small operations of": [stage.operations_s for stage in stages],
        "collectives of": [stage.collectives_s for stage in stages],
    }


def _named(kind: str, names: list[str], seconds: Sequence[float]) -> str:
    most_s = max(seconds)
    slow = [name for name, s in zip(names, seconds, strict=True) if s >= _ALIKE * most_s]
    if len(slow) > 1 and len(slow) == len(names):
        return f"{kind} all machines" if kind != "link" else "links"
    if len(slow) > _MOST_NAMES:
        return f"{kind} {len(slow)} of {len(names)} machines" if kind != "link" else "links"
    return f"{kind} {' and '.join(slow)}"
