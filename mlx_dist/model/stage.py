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

from mlx_dist.model.cache import SlotCaches
from mlx_dist.model.families import Anatomy, hidden_argument


class _Elsewhere:
    """Stands for a layer that another stage runs: hands its input on, shows its attributes."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return hidden_argument(args, kwargs)


class _Entrance(_Elsewhere):
    """Stands for the last layer before the stage: puts out what the previous rank sent."""

    hidden_BLD: mx.array

    def __call__(self, *_args: Any, **_kwargs: Any) -> mx.array:
        return self.hidden_BLD


class _Recorded(_Elsewhere):
    """Stands for a local layer: runs it and keeps what it puts out."""

    hidden_BLD: mx.array

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        self.hidden_BLD = self._layer(*args, **kwargs)
        return self.hidden_BLD


class Stage:
    """Layers [start, end) of `model`, with the embedding if first, norm and head if last.

    Changes `model` so that it runs only this stage. The slots' caches are `slots`.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, start: int, end: int) -> None:
        assert 0 <= start < end <= anatomy.num_layers
        self.start, self.end = start, end
        self.is_first, self.is_last = start == 0, end == anatomy.num_layers
        self.slots = SlotCaches(model, anatomy, start, end)
        self._model = model
        self._layers = anatomy.layers
        self._hidden_tail = anatomy.hidden_tail
        self.hidden_dtype_in = anatomy.hidden_dtypes[start]
        self.vocab_size = anatomy.vocab_size
        for i in (*range(start), *range(end, anatomy.num_layers)):
            self._layers[i] = _Elsewhere(self._layers[i])
        if not self.is_first:
            self._entrance = self._layers[start - 1] = _Entrance(self._layers[start - 1]._layer)
        if not self.is_last:
            self._exit = self._layers[end - 1] = _Recorded(self._layers[end - 1])

    def hidden_shape(self, num_sequences: int, num_tokens: int) -> tuple[int, ...]:
        """The shape of what enters a stage other than the first: (B, L, D)."""
        return (num_sequences, num_tokens, *self._hidden_tail)

    def forward(self, slot: int, tokens_BL: mx.array, hidden_BLD: mx.array | None) -> mx.array:
        """The hidden state (B, L, D) for the next stage or, from the last stage, logits (B, L, V).

        `hidden_BLD` comes from the previous stage; the first stage takes None. Nothing is
        computed yet; the caches of `slot` have grown by L tokens when it is.
        """
        if not self.is_first:
            assert hidden_BLD is not None
            self._entrance.hidden_BLD = hidden_BLD
        logits_BLV: mx.array = self._model(tokens_BL, cache=self.slots.of(slot))
        self.slots.advance(slot, tokens_BL.shape[1])
        return logits_BLV if self.is_last else self._exit.hidden_BLD

    def forward_recorded(
        self, slot: int, tokens_BL: mx.array, hidden_BLD: mx.array | None
    ) -> tuple[mx.array, list[mx.array]]:
        """As `forward`, and what each layer of this stage puts out (B, L, D)."""
        local = self._layers[self.start : self.end]
        recorded = [_Recorded(layer) for layer in local]
        self._layers[self.start : self.end] = recorded
        try:
            output = self.forward(slot, tokens_BL, hidden_BLD)
        finally:
            self._layers[self.start : self.end] = local
        return output, [layer.hidden_BLD for layer in recorded]
