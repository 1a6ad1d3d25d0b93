"""What the server is doing, in numbers: for /metrics, /ready and /cluster."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mlx_dist.engine.leader import Leader
from mlx_dist.messages import Report


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A rank's place: its host, its layers [start, end) and what their weights take."""

    rank: int
    host: str
    layers: tuple[int, int]
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment's numbers. Tuples have one entry a rank; totals count from the start.

    `num_slots` bounds the sequences that run at a time; `prefix_bytes` is what kept prefixes take
    on the fullest rank. `rank_slots`, `rank_kv_bytes` and `rank_digests` are what the ranks said
    with the last answer, kept prefixes included; `last_step_age_s` is the time since that answer.
    """

    num_waiting: int
    num_active: int
    num_slots: int
    num_microbatches: int
    kv_reserved_bytes: tuple[int, ...]
    kv_budget_bytes: tuple[int, ...]
    prefix_bytes: int
    prefix_entries: int
    prefix_queries: int
    prefix_hits: int
    prefix_hit_tokens: int
    prompt_tokens: int
    completion_tokens: int
    busy_s: tuple[float, ...]
    rank_slots: tuple[int, ...]
    rank_kv_bytes: tuple[int, ...]
    rank_digests: tuple[int, ...]
    last_step_age_s: float
    is_draining: bool
    ranks: tuple[RankInfo, ...]


def stats_of(leader: Leader, reports: list[Report]) -> Stats:
    """The numbers of now; call it where the leader's state holds still."""
    scheduler, vitals = leader.scheduler, leader.vitals
    batching = scheduler.batching
    admission = scheduler.admission
    counts = admission.reuse_counts
    return Stats(
        num_waiting=len(admission.waiting),
        num_active=scheduler.num_active,
        num_slots=batching.num_microbatches * batching.max_sequences,
        num_microbatches=batching.num_microbatches,
        kv_reserved_bytes=scheduler.reserved_bytes,
        kv_budget_bytes=scheduler.ledger.budget_bytes,
        prefix_bytes=max(admission.prefix.bytes_by_rank),
        prefix_entries=admission.prefix.num_entries,
        prefix_queries=counts.queries,
        prefix_hits=counts.hits,
        prefix_hit_tokens=counts.hit_tokens,
        prompt_tokens=scheduler.num_prompt_tokens,
        completion_tokens=scheduler.num_completion_tokens,
        busy_s=tuple(leader.busy_s),
        rank_slots=tuple(v.num_slots for v in vitals),
        rank_kv_bytes=tuple(v.kv_bytes for v in vitals),
        rank_digests=tuple(v.digest for v in vitals),
        last_step_age_s=time.monotonic() - leader.answered_at,
        is_draining=admission.is_draining,
        ranks=tuple(RankInfo(r.rank, r.host, r.layers, r.weights_bytes) for r in reports),
    )
