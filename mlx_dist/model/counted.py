"""A model's costs and those of its slices, each kind of slice counted once. Reads no weights."""

from __future__ import annotations

from functools import cached_property

import mlx.nn as nn

from mlx_dist.cluster.costs import ModelCosts
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.config import Dtype
from mlx_dist.model import blueprint
from mlx_dist.model.costing import costs_of_config, costs_of_files
from mlx_dist.model.cutting import parameters_of, slicing_of
from mlx_dist.model.families import Anatomy
from mlx_dist.model.files import ModelFiles
from mlx_dist.model.weights import build

_GROUP_SIZE = 64


class Counted:
    """The costs of a model as it is or, with `bits`, as if it were quantized to these.

    `fused` is as for `costs_of_config`.
    """

    def __init__(
        self, files: ModelFiles, dtype: Dtype, *, fused: bool, bits: int | None = None
    ) -> None:
        self._files = files
        self._dtype = dtype
        self._fused = fused
        self._bits = bits
        self._known: dict[Slice, ModelCosts] = {}
        self._alike: dict[frozenset[object], ModelCosts] = {}

    def of(self, slice_: Slice = WHOLE) -> ModelCosts:
        """What is held of the model with this slice.

        Raises ModelError if it does not load, and FamilyError where nobody knows how to slice it.
        """
        if slice_ not in self._known:
            # Most slices of a group are alike, and counting takes a second or two.
            kind = self._kind(slice_) if slice_.size > 1 else frozenset[object]()
            if kind not in self._alike:
                self._alike[kind] = self._count(slice_)
            self._known[slice_] = self._alike[kind]
        return self._known[slice_]

    def _count(self, slice_: Slice) -> ModelCosts:
        files, fused = self._files, self._fused
        if self._has_files:
            return costs_of_files(files, self._dtype, fused=fused, slice_=slice_)
        return costs_of_config(
            files.config,
            name=files.name,
            bits=self._bits,
            group_size=_GROUP_SIZE,
            dtype=self._dtype,
            fused=fused,
            slice_=slice_,
        )

    def _kind(self, slice_: Slice) -> frozenset[object]:
        """What tells slices apart that cost different things: shapes, and whether it is idle.

        An idle part is another rank's, the first.
        """
        model, anatomy = self._whole
        shapes = {name: array.shape for name, array in parameters_of(model).items()}
        slicing = slicing_of(self._files.name, model, anatomy, slice_)
        cut = {
            (name, cut.shape(shapes[name]), cut.ranges[0][0] == 0)
            for name, cut in slicing.cuts.items()
        }
        return frozenset({slice_.size, *cut, *slicing.dropped})

    @cached_property
    def _whole(self) -> tuple[nn.Module, Anatomy]:
        if self._has_files:
            return build(self._files, self._dtype)
        return blueprint.build(
            self._files.config,
            name=self._files.name,
            bits=self._bits,
            group_size=_GROUP_SIZE,
            dtype=self._dtype,
        )

    @property
    def _has_files(self) -> bool:
        return self._bits is None and bool(self._files.weights)
