"""Ranks that lack files get their tensors from the leader, over the fabric and into place.

Knows who sends what to whom, and when. All ranks know all that is sent, and in which order, so
none waits for another that waits for it: the leader sends a tensor to each rank in turn, right
behind a frame with its checksum, and reads its own stage meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest

from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.cluster.world import World
from mlx_dist.config import Dtype
from mlx_dist.messages import Want, Wanted, expect
from mlx_dist.model.cutting import parts_of_files
from mlx_dist.model.delivery import (
    Delivery,
    Inbox,
    Needs,
    Outbox,
    RawTensor,
    Shelf,
    announced,
    catalog_of,
)
from mlx_dist.model.files import ModelFiles, fetch
from mlx_dist.model.slicing import Cut
from mlx_dist.model.weights import LoadedModel, OpenStage, open_stage, raw_tensors_of

Cuts = Mapping[str, Cut]
Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def load_stages(
    world: World,
    files: ModelFiles,
    share: tuple[int, int] | None,
    dtype: Dtype,
    progress: Progress,
    say: Say,
    slice_: Slice = WHOLE,
) -> LoadedModel | None:
    """Load the slice of the stage `share` of this rank, as all ranks do; None on one without.

    `progress` hears of (bytes here, bytes in all), on the leader of those it sends, too. `say`,
    on the leader, hears how fast each rank was fed. Raises AgreedError, the same on every rank,
    if any cannot begin. An error while tensors are on their way is one rank's, and ends the job.
    """
    catalog = catalog_of(files)
    with world.agreement():
        needs: Needs = {}
        cuts: Cuts = {}
        if share is not None and not world.is_leader:
            needs, cuts = _needs(files, catalog, *share, dtype, slice_)
    inbox = Inbox(world, catalog, needs, cuts, parts_of_files(files))
    wanted = Wanted([tensor.want for tensor in inbox.tensors])
    orders = [expect(message, Wanted).tensors for message in world.control.all_gather(wanted)]
    schedule = _schedule(orders, list(catalog.values()))
    with world.agreement():
        if world.is_leader:
            files = fetch(files, frozenset(each.tensor.file.name for each in schedule))
        stage = None
        if share is not None:
            stage = open_stage(files, *share, dtype, inbox.promise, slice_, inbox.part_of)
    reading = iter(()) if stage is None else stage.read()
    own_bytes = 0 if stage is None else stage.num_bytes
    if world.is_leader:
        meter = _Meter(progress, own_bytes + sum(each.tensor.num_bytes for each in schedule))
        _give(world, Shelf(files), schedule, reading, meter, say)
    else:
        meter = _Meter(progress, inbox.num_bytes or own_bytes)
        _take(world, schedule, inbox, stage, meter)
    with world.agreement():
        for num_bytes in reading:
            meter.add(0 if inbox.tensors else num_bytes)
    return None if stage is None else stage.loaded()


def _needs(
    files: ModelFiles,
    catalog: Mapping[str, RawTensor],
    start: int,
    end: int,
    dtype: Dtype,
    slice_: Slice,
) -> tuple[Needs, Cuts]:
    if all(file.path is not None for file in files.weights):
        return {}, {}
    made_of, cuts = raw_tensors_of(files, start, end, dtype, slice_)
    needs = {
        name: [raw for raw in raws if catalog[raw].file.path is None and catalog[raw].num_bytes]
        for name, raws in made_of.items()
    }
    return needs, cuts


def _schedule(orders: list[list[Want]], tensors: Sequence[RawTensor]) -> list[Delivery]:
    """What is sent, in order: one tensor to each rank, and again, until each has what it wants."""
    return [
        Delivery(rank, _wanted(want, tensors))
        for wants in zip_longest(*orders)
        for rank, want in enumerate(wants)
        if want is not None
    ]


def _wanted(want: Want, tensors: Sequence[RawTensor]) -> RawTensor:
    cut = Cut(want.axis, tuple(want.ranges), want.num_parts) if want.ranges else None
    return tensors[want.place].part(cut)


def _give(
    world: World,
    shelf: Shelf,
    schedule: list[Delivery],
    reading: Iterator[int],
    meter: _Meter,
    say: Say,
) -> None:
    """The leader's part: send all of `schedule`, and read a tensor of its own after each."""
    outbox = Outbox(world, lambda delivery: meter.add(delivery.tensor.num_bytes))
    for each in schedule:
        outbox.send(each, shelf.take(each.tensor))
        meter.add(next(reading, 0))
    outbox.drain()
    for rank, took_s in sorted(outbox.done_s.items()):
        sizes = [each.tensor.num_bytes for each in schedule if each.rank == rank]
        say(
            f"fed rank {rank} ({world.hosts[rank]}): {_words(sum(sizes))} in {took_s:.1f} s, "
            f"{_words(sum(sizes) / took_s)}/s, {len(sizes)} tensors"
        )


def _take(
    world: World,
    schedule: list[Delivery],
    inbox: Inbox,
    stage: OpenStage | None,
    meter: _Meter,
) -> None:
    """Another rank's part: take what is its own, and pass on what is for ranks behind it."""
    outbox = Outbox(world)
    for each in schedule:
        if not each.comes_by(world):
            continue
        ahead = announced(world, each)
        if each.rank != world.rank:
            outbox.pass_on(each, ahead)
        elif stage is not None:
            meter.add(inbox.begin(each.tensor, ahead, stage))
    if stage is not None:
        meter.add(inbox.finish(stage))
    outbox.drain()


class _Meter:
    """Counts bytes towards a number known in advance."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0

    def add(self, num_bytes: int) -> None:
        if num_bytes:
            self._done_bytes += num_bytes
            self._progress(self._done_bytes, self._total_bytes)


def _words(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
