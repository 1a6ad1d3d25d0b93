"""Which rank holds which layers. Pure: knows counts; knows no arrays and no network."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_dist.errors import PlacementError


def even_counts(num_layers: int, num_ranks: int) -> tuple[int, ...]:
    """Layers of each rank, as even as can be; the first ranks take what does not divide.

    Raises PlacementError with more ranks than layers.
    """
    if num_ranks > num_layers:
        raise PlacementError(
            f"the model has {num_layers} layers and there are {num_ranks} ranks; "
            f"start at most {num_layers}"
        )
    share, rest = divmod(num_layers, num_ranks)
    return tuple(share + (rank < rest) for rank in range(num_ranks))


def cut(num_layers: int, num_ranks: int, counts: Sequence[int] | None) -> list[tuple[int, int]]:
    """Every rank's layers [start, end): `counts` of them each, or an even split for None.

    Raises PlacementError unless every layer is held exactly once and every rank holds one.
    """
    if counts is None:
        counts = even_counts(num_layers, num_ranks)
    written = ",".join(map(str, counts))
    if len(counts) != num_ranks:
        raise PlacementError(
            f"--layers {written} cuts for {len(counts)} ranks and there are {num_ranks}; "
            "write one count per rank"
        )
    if sum(counts) != num_layers:
        raise PlacementError(
            f"--layers {written} adds up to {sum(counts)} and the model has {num_layers} layers"
        )
    if min(counts) < 1:
        raise PlacementError(
            f"--layers {written} leaves a rank without layers; give it one or start fewer"
        )
    stages, start = [], 0
    for count in counts:
        stages.append((start, start + count))
        start += count
    return stages
