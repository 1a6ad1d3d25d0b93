"""The proof that the slices of a tensor group give the logits of the model in one piece.

Its members are threads of this process, which meet for every sum. Knows slices and the model they
are cut from; knows nothing of what a family is.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from benchmarks.batches import check_batches
from benchmarks.proof import ProofError, Rig, steps_of
from mlx_dist.cluster.placement import Slice
from mlx_dist.config import Dtype
from mlx_dist.model import cutting
from mlx_dist.model.cutting import parameters_of
from mlx_dist.model.files import ModelFiles, find_model
from mlx_dist.model.slicing import Range
from mlx_dist.model.stage import Stage
from mlx_dist.model.tensor import Slicing
from mlx_dist.model.weights import build, load_stage

# Of the largest logit. Sums of slices round differently, and in bfloat16 every layer passes that
# on. Quantized weights are multiplied in float32.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
# The tiny one differs by 0.2, and in one piece by 0.4 from what it is in float32.
_WIDER = {("granite", "bfloat16"): 0.25}
SPLITS = ((1, 1), (1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1), (3, 1))
# One of several at which sequences share microbatches.
_SHARED = (2, 1, 1)

S = TypeVar("S")
T = TypeVar("T")
Weights = tuple[int, ...]  # how large the members' slices are to each other


@dataclass(frozen=True, slots=True)
class Findings:
    """What a group did: its largest error, as a part of the largest logit, and who holds what.

    `total_bytes` are those of the model in one piece, and `replicated_bytes` what members hold
    beyond them, all together.
    """

    error: float
    member_bytes: tuple[int, ...]
    total_bytes: int

    @property
    def replicated_bytes(self) -> int:
        return sum(self.member_bytes) - self.total_bytes


class Meeting:
    """Where threads that stand for the ranks of a group exchange arrays.

    One of them works at a time, the one that has the `turn`: when threads of a process evaluate at
    once, MLX may wait for ever for a task that is done.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._brought: list[NDArray[Any]] = [np.empty(0)] * size
        self._barrier = threading.Barrier(size)
        self.turn = threading.Lock()

    def all(self, place: int, array: mx.array) -> list[NDArray[Any]]:
        """What every member brings, in order. In float32, which holds all that bfloat16 does."""
        self._brought[place] = np.array(array.astype(mx.float32))
        self._meet()
        brought = list(self._brought)
        self._meet()
        return brought

    def _meet(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait(60)
        finally:
            self.turn.acquire()

    def leave(self) -> None:
        """Wait for nobody any more, and let nobody wait."""
        self._barrier.abort()


@dataclass(frozen=True, slots=True)
class Member:
    """The group, as one of its members sees it."""

    meeting: Meeting
    place: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def sum(self, array: mx.array) -> mx.array:
        first, *others = self.meeting.all(self.place, array)
        return mx.array(sum(others, first)).astype(array.dtype)

    def gather(self, array: mx.array) -> mx.array:
        brought = self.meeting.all(self.place, array)
        return mx.array(np.concatenate(brought)).astype(array.dtype)


@dataclass(frozen=True, slots=True)
class _Held:
    """What one member works with: its slices of a whole model, and the model in one piece."""

    stage: Stage
    weights_bytes: int
    whole: nn.Module


def check_splits(
    folder: Path, rig: Rig, dtype: str, *, batches: bool, pads: bool
) -> list[Findings]:
    """Prove the model in `folder`, of which `rig` knows the logits, at all of SPLITS.

    With `batches`, sequences share microbatches, too, and with `pads` those of several lengths.
    Raises ProofError, and FamilyError where nobody knows how to slice it.
    """
    if batches:
        SlicedRig(folder, _SHARED).check_batches(pads=pads)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    tolerance = _WIDER.get((family, dtype), TOLERANCE[dtype])
    return [SlicedRig(folder, split).check(rig, tolerance) for split in SPLITS]


class SlicedRig:
    """The members of a group, each with its slices of the model in `folder`."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self._weights = weights
        files = find_model(str(folder), require_proven=False)
        meeting = Meeting(len(weights))

        def load(place: int) -> _Held:
            return _load(files, Slice(place, weights), Member(meeting, place))

        self._meeting = meeting
        # What is being proven may not be on record.
        with patch.object(cutting, "SLICED", _Anything()):
            self._held = self._together(load, range(len(weights)))
        self.member_bytes = tuple(held.weights_bytes for held in self._held)
        self.total_bytes = _check_slices(files, weights, self.member_bytes)

    def check(self, rig: Rig, tolerance: float) -> Findings:
        """Raise ProofError unless all members agree, and are within `tolerance` of one piece."""
        error = 0.0
        of_members = self._together(lambda held: _outputs(held.stage, rig.steps_BL), self._held)
        for step, (first, *others) in enumerate(zip(*of_members, strict=True)):
            for other in others:
                if not all(map(np.array_equal, first, other)):
                    raise ProofError(f"members of {self._weights} differ in step {step}")
            error = max(error, relative_error(first[-1], rig.expected_BLV[step]))
        if not error <= tolerance:
            raise ProofError(f"logits of slices {self._weights} differ by {error:.1e}")
        return Findings(error, self.member_bytes, self.total_bytes)

    def check_batches(self, *, pads: bool) -> float:
        """Raise ProofError unless sequences share microbatches; the largest error."""
        return max(
            self._together(lambda h: check_batches(h.whole, [h.stage], pads=pads), self._held)
        )

    def _together(self, work: Callable[[S], T], of_members: Iterable[S]) -> list[T]:
        """What `work` answers for every member, all of them at the same time."""

        def guarded(own: S) -> T:
            try:
                with self._meeting.turn:
                    return work(own)
            except Exception:
                self._meeting.leave()
                raise

        working = [at.submit(guarded, own) for at, own in zip(_crew, of_members, strict=False)]
        errors = [error for each in working if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [each.result() for each in working]


class _Anything:
    """A set with every family."""

    def __contains__(self, _family: object) -> bool:
        return True


def relative_error(got_BLV: NDArray[np.float32], want_BLV: mx.array) -> float:
    """The largest difference, as a part of the largest logit. Infinities may be equal."""
    want = np.array(want_BLV.astype(mx.float32))
    is_finite = np.isfinite(want)
    if not np.array_equal(got_BLV[~is_finite], want[~is_finite], equal_nan=True):
        return float("inf")
    difference = np.abs(got_BLV - want, where=is_finite, out=np.zeros_like(want))
    return float(np.max(difference) / np.max(np.abs(want[is_finite])))


_ALL: tuple[Range, ...] = ((0, 1),)


class _Worker:
    """A thread that does one thing after another, as long as the process lives.

    A thread that ended with the process would take down its stream while MLX takes down all.
    """

    def __init__(self) -> None:
        self._due: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, work: Callable[[S], T], own: S) -> Future[T]:
        """What `work` will answer to `own`."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(work(own))
            except BaseException as error:
                answer.set_exception(error)

        self._due.put(run)
        return answer

    def _work(self) -> None:
        while True:
            self._due.get()()


# One for each member, for what MLX has not computed yet belongs to the thread that built it.
_crew = [_Worker() for _ in range(max(map(len, SPLITS)))]


def _load(files: ModelFiles, slice_: Slice, member: Member) -> _Held:
    whole, anatomy = build(files, Dtype.auto)
    end = anatomy.num_layers
    loaded = load_stage(files, 0, end, Dtype.auto, lambda _done, _all: None, slice_)
    assert loaded.slicing is not None
    loaded.slicing.join(member)
    stage = Stage(loaded.model, loaded.anatomy, 0, end)
    return _Held(stage, loaded.weights_bytes, whole)


def _outputs(stage: Stage, steps_BL: Sequence[mx.array]) -> list[list[NDArray[np.float32]]]:
    """Of every step, what each layer puts out and the logits."""
    stage.slots.open(0, [0], [None])
    outputs = []
    for step in steps_of(steps_BL):
        logits_BLV, layers_BLD = stage.forward_recorded(step, None)
        recorded = [*layers_BLD, logits_BLV]
        mx.eval(recorded, stage.slots.states(0))
        outputs.append([np.array(array.astype(mx.float32)) for array in recorded])
    stage.slots.close([0])
    return outputs


def _check_slices(files: ModelFiles, weights: Weights, member_bytes: Sequence[int]) -> int:
    """Raise ProofError unless members hold all of the model, and their own slices only.

    The answer is the bytes of the whole.
    """
    model, anatomy = build(files, Dtype.auto)
    slicings = [Slicing(model, anatomy, Slice(place, weights)) for place in range(len(weights))]
    expected_bytes = [0] * len(weights)
    total_bytes = 0
    for name, array in parameters_of(model).items():
        total_bytes += array.nbytes
        held: list[Range] = []
        num_parts = 1
        for place, slicing in enumerate(slicings):
            if name in slicing.dropped:
                continue
            shape, ranges = array.shape, _ALL
            if cut := slicing.cuts.get(name):
                shape, ranges, num_parts = cut.shape(shape), cut.ranges, cut.num_parts
            held += ranges
            expected_bytes[place] += array.itemsize * int(np.prod(shape))
        if not _covers(held, num_parts):
            raise ProofError(f"of {name} members {weights} hold {held} of {num_parts}")
    if expected_bytes != list(member_bytes):
        raise ProofError(f"members hold {member_bytes} bytes and their slices {expected_bytes}")
    return total_bytes


def _covers(ranges: Sequence[Range], num_parts: int) -> bool:
    reached = 0
    for start, end in sorted(ranges):
        if start > reached:
            return False
        reached = max(reached, end)
    return reached == num_parts
