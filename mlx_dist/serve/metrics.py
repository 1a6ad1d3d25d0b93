"""What /metrics says: the engine's numbers as they are when asked, and times seen from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from mlx_dist.serve.stats import Stats

F = TypeVar("F", GaugeMetricFamily, CounterMetricFamily)

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_GAP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)

# Metric, field of Stats, help.
_GAUGES = (
    ("requests_waiting", "num_waiting", "Sequences that wait for a slot."),
    ("sequences_active", "num_active", "Sequences that hold a slot."),
    ("slots", "num_slots", "Sequences that may run at a time."),
    ("microbatches", "num_microbatches", "Microbatches that may be in flight."),
    ("prefix_bytes", "prefix_bytes", "Bytes kept for prompts that begin alike."),
    ("prefix_entries", "prefix_entries", "Prompt beginnings kept."),
    ("last_step_age_seconds", "last_step_age_s", "Time since all ranks last finished a step."),
    ("draining", "is_draining", "1 when no new requests are taken."),
)
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens taken."),
    ("completion_tokens", "completion_tokens", "Tokens generated."),
    ("prefix_queries", "prefix_queries", "Prompts looked up among the beginnings kept."),
    ("prefix_hits", "prefix_hits", "Prompts whose beginning was kept."),
    ("prefix_hit_tokens", "prefix_hit_tokens", "Prompt tokens that needed no computing."),
)
_RANK_GAUGES = (
    ("kv_reserved_bytes", "kv_reserved_bytes", "KV bytes reserved for admitted sequences."),
    ("kv_budget_bytes", "kv_budget_bytes", "KV bytes that may be reserved."),
    ("kv_bytes", "rank_kv_bytes", "KV bytes in use, as the rank last said."),
    ("rank_slots", "rank_slots", "Slots in use, as the rank last said."),
)


class StatsCollector(Collector):
    """Asks the engine for its numbers whenever someone asks for the metrics."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, field, text in _GAUGES:
            yield GaugeMetricFamily(f"mlx_dist_{name}", text, float(getattr(stats, field)))
        for name, field, text in _COUNTERS:
            yield CounterMetricFamily(f"mlx_dist_{name}", text, float(getattr(stats, field)))
        for name, field, text in _RANK_GAUGES:
            gauge = GaugeMetricFamily(f"mlx_dist_{name}", text, labels=["rank"])
            yield _by_rank(gauge, getattr(stats, field))
        text = "Time each rank has computed; its rate is the rank's busy share."
        yield _by_rank(
            CounterMetricFamily("mlx_dist_busy_seconds", text, labels=["rank"]), stats.busy_s
        )


class Metrics:
    """A registry of its own, so that several shims can be in one process."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(StatsCollector(stats))
        self._ttft = Histogram(
            "mlx_dist_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._gap = Histogram(
            "mlx_dist_inter_token_seconds",
            "Between tokens of an answer.",
            buckets=_GAP_BUCKETS_S,
            registry=self._registry,
        )
        self._responses = Counter(
            "mlx_dist_http_responses",
            "Responses begun, by status.",
            labelnames=["status"],
            registry=self._registry,
        )

    def count_tokens(self, gap_s: float, num_tokens: int, is_first: bool) -> None:
        """`num_tokens` came together, `gap_s` after what was before them."""
        if is_first:
            self._ttft.observe(gap_s)
            return
        for _ in range(num_tokens):
            self._gap.observe(gap_s / num_tokens)

    def count_response(self, status: int) -> None:
        self._responses.labels(status).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


def _by_rank(family: F, values: Iterable[float]) -> F:
    for rank, value in enumerate(values):
        family.add_metric([str(rank)], value)
    return family
