"""One stage: layers [start, end) of a model. Knows arrays; knows no ranks and no network.

A stage runs the model's own forward pass, in which every layer that is elsewhere hands its input
on. So masks, scales, position ids, norm and head are mlx-lm's own code, at every cut the same.
MLX is lazy: what belongs to other stages, embedding or head, is never computed and its weights
are never read.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dist.messages import KvCost, Row, Step
from mlx_dist.model.cache import SlotCaches
from mlx_dist.model.families import Anatomy, StandIn, hidden_argument, hidden_output
from mlx_dist.model.rotation import share_angles


class _Elsewhere(StandIn):
    """Stands for a layer that another stage runs: hands its input on."""

    def __init__(self, layer: Any, num_extras: int) -> None:
        super().__init__(layer)
        self._extras = (None,) * num_extras

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._put_out(hidden_argument(args, kwargs))

    def _put_out(self, hidden_BLD: mx.array) -> Any:
        return (hidden_BLD, *self._extras) if self._extras else hidden_BLD


class _Entrance(_Elsewhere):
    """Stands for the last layer before the stage: puts out what the previous rank sent."""

    def __init__(self, layer: Any, num_extras: int) -> None:
        super().__init__(layer, num_extras)
        self.hidden_BLD: mx.array

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._put_out(self.hidden_BLD)


class _Recorded(StandIn):
    """Stands for a local layer: runs it and keeps what it puts out."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.hidden_BLD: mx.array

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._layer(*args, **kwargs)
        self.hidden_BLD = hidden_output(output)
        return output


class _Started(StandIn):
    """Stands for the first layer: sets off its computation while the others are being built."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.is_held_back = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._layer(*args, **kwargs)
        if not self.is_held_back:
            mx.async_eval(hidden_output(output))  # type: ignore[no-untyped-call]
        return output


class Stage:
    """Layers [start, end) of `model`, with the embedding if first, norm and head if last.

    Changes `model` so that it runs only this stage. The slots' caches are `slots`, which takes
    `batches` and `pads`.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        start: int,
        end: int,
        *,
        batches: bool = True,
        pads: bool = True,
    ) -> None:
        assert 0 <= start < end <= anatomy.num_layers
        self.start, self.end = start, end
        self.is_first, self.is_last = start == 0, end == anatomy.num_layers
        self.slots = SlotCaches(model, anatomy, start, end, batches=batches, pads=pads)
        self._model = model
        self._layers = anatomy.layers
        self._angles = share_angles(self._layers[start:end])
        self._hidden_tail = anatomy.hidden_tail
        self.hidden_dtype_in = anatomy.hidden_dtypes[start]
        self.vocab_size = anatomy.vocab_size
        for i in (*range(start), *range(end, anatomy.num_layers)):
            self._layers[i] = _Elsewhere(self._layers[i], anatomy.num_extras)
        if self.is_first:
            self._layers[0] = self._started = _Started(self._layers[0])
        else:
            self._entrance = _Entrance(self._layers[start - 1], anatomy.num_extras)
            self._layers[start - 1] = self._entrance
        if not self.is_last:
            self._exit = self._layers[end - 1] = _Recorded(self._layers[end - 1])

    def hidden_shape(self, num_sequences: int, num_tokens: int) -> tuple[int, ...]:
        """The shape of what enters a stage other than the first: (B, L, D)."""
        return (num_sequences, num_tokens, *self._hidden_tail)

    def forward(self, step: Step, hidden_BLD: mx.array | None) -> mx.array:
        """The hidden state (B, L, D) for the next stage or, from the last stage, logits (B, L, V).

        `hidden_BLD` comes from the previous stage; the first stage takes None. Rows shorter than
        L are padded on the right, and what comes out there means nothing. Nothing is computed
        yet; when it is, the caches have grown by the tokens of `step`.
        """
        if not self.is_first:
            assert hidden_BLD is not None
            self._entrance.hidden_BLD = hidden_BLD
        for angles in self._angles:
            angles.forget()
        lengths = [len(row.tokens) for row in step.rows]
        caches = self.slots.of(step.microbatch, [row.slot for row in step.rows])
        self.slots.pad(step.microbatch, lengths)
        tokens_BL = mx.array(
            [row.tokens + [0] * (max(lengths) - len(row.tokens)) for row in step.rows], mx.int32
        )
        logits_BLV: mx.array = self._model(tokens_BL, cache=caches)
        self.slots.advance(step.microbatch, lengths)
        return logits_BLV if self.is_last else self._exit.hidden_BLD

    def forward_recorded(
        self, step: Step, hidden_BLD: mx.array | None
    ) -> tuple[mx.array, list[mx.array]]:
        """As `forward`, and what each layer of this stage puts out (B, L, D)."""
        local = self._layers[self.start : self.end]
        recorded = [_Recorded(layer) for layer in local]
        self._layers[self.start : self.end] = recorded
        try:
            output = self.forward(step, hidden_BLD)
        finally:
            self._layers[self.start : self.end] = local
        return output, [layer.hidden_BLD for layer in recorded]

    def kv_cost(self) -> KvCost:
        """What a sequence's caches cost here. Builds a forward pass and computes nothing."""
        step = Step(0, [Row(0, 0, [0, 0])])
        self.slots.open(0, [0], [None])
        hidden_BLD = None
        if not self.is_first:
            hidden_BLD = mx.zeros(self.hidden_shape(*step.shape), self.hidden_dtype_in)
        else:
            # The sums of a tensor group would mix with what ranks say to each other meanwhile.
            self._started.is_held_back = True
        self.forward(step, hidden_BLD)
        if self.is_first:
            self._started.is_held_back = False
        cost = self.slots.cost(0)
        self.slots.close([0])
        return cost
