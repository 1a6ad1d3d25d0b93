"""A model as its config.json alone describes it: every shape and dtype, and no weights.

Knows mlx-lm's classes and how it quantizes them; knows no files. Nothing is computed and next to
nothing is allocated, whatever the model's size: MLX is lazy, and nobody reads these weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_dist.config import Dtype
from mlx_dist.errors import ModelError
from mlx_dist.model.families import Anatomy, dissect, family_of
from mlx_dist.model.weights import convert

# What mlx-lm and MLX raise for settings that are missing or make no sense.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Where the families' configs say how many positions they were made for.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# The formats of checkpoints that mlx-lm keeps as they are, by the name in their config.
_KEPT_FORMATS: dict[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}

_Choice = Callable[[str, nn.Module], Any]


def build(
    config: dict[str, Any], *, name: str, bits: int | None, group_size: int, dtype: Dtype
) -> tuple[nn.Module, Anatomy]:
    """The model that `config` describes, its tensors shapes and dtypes only.

    Quantized to `bits`, if given, as `mlx_lm.convert` does it; else as the config says. What is
    not quantized is of `dtype` or, for `auto`, of the config's. Raises FamilyError for a family
    that is not proven, and ModelError if the config, or so many bits, make no model.
    """
    try:
        family_of(config)
        # Some of mlx-lm's classes fill in what they are given.
        config = copy.deepcopy(config)
        dtype = _stated_dtype(config, name) if dtype is Dtype.auto else dtype
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        # Before it is quantized: scales have the dtype of what they were made of.
        convert(model, dtype)
        by_class = getattr(model, "quant_predicate", None) or (lambda _path, _module: True)
        for quantization, choose in _quantizations(config, name, bits, group_size, by_class):
            _quantize(model, quantization, choose)
        # Else the graph of a forward pass shows how each weight was drawn and quantized, and a
        # weight that is shown by mistake, in a debugger's traceback, is drawn.
        blank = [
            (path, mx.broadcast_to(mx.array(0, array.dtype), array.shape))
            for path, array in dict(tree_flatten(model.parameters())).items()
        ]
        model.update(tree_unflatten(blank))
        return model, dissect(model)
    except _UNFIT as error:
        reason = str(error).replace("\n", " ").strip()[:400]
        if isinstance(error, KeyError):
            reason = f"there is no {reason}"
        raise ModelError(
            f"{name}: its config.json makes no model: {reason or type(error).__name__}"
        ) from None


def context_tokens(config: dict[str, Any]) -> int | None:
    """How many positions a model was made for, by its config."""
    text_config = config.get("text_config") or config
    found = (text_config.get(key) for key in _CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _stated_dtype(config: dict[str, Any], name: str) -> Dtype:
    """The dtype of the weights as the config says it; bfloat16 if it says nothing."""
    sources = (config, config.get("text_config") or {})
    stated = [s[key] for s in sources for key in ("torch_dtype", "dtype") if s.get(key)]
    found = str(stated[0]).removeprefix("torch.") if stated else Dtype.bfloat16
    if found == Dtype.auto or found not in list(Dtype):
        raise ModelError(
            f"{name}: its config.json has weights of {found}, in which nothing runs here; choose "
            "float32, float16 or bfloat16 with --dtype"
        )
    return Dtype(found)


def _quantizations(
    config: dict[str, Any], name: str, bits: int | None, group_size: int, by_class: _Choice
) -> list[tuple[dict[str, Any], _Choice]]:
    """What is done to the weights in turn: group size, bits and mode, and which modules.

    `by_class` is the choice of the model's class.
    """
    stated = config.get("quantization")
    if stated is not None and bits is None:
        return [(stated, lambda path, m: stated[path] if path in stated else by_class(path, m))]
    steps: list[tuple[dict[str, Any], _Choice]] = []
    if stated is None and (kept := _kept_format(config, name, bits)) is not None:
        steps.append(kept)
    if bits is not None:
        steps.append(({"group_size": group_size, "bits": bits}, by_class))
    return steps


def _kept_format(
    config: dict[str, Any], name: str, bits: int | None
) -> tuple[dict[str, Any], _Choice] | None:
    """The format that a checkpoint came in and stays in, and for which modules."""
    text_config = config.get("text_config") or {}
    stated = config.get("quantization_config") or text_config.get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method")
    if method == "fp8":
        # Scales that are powers of two, for blocks of 32 by 32, are mxfp8. Of all others mlx-lm
        # makes unquantized weights.
        is_kept = stated.get("scale_fmt") == "ue8m0" and stated.get("weight_block_size") == [32, 32]
        if not is_kept:
            return None
        method = "mxfp8"
    if method not in _KEPT_FORMATS:
        if bits is not None:
            return None
        raise ModelError(
            f"{name}: its config.json alone does not tell which weights are quantized by "
            f"{method!r}; name the whole model, or the bits to quantize it to"
        )
    left_out = stated.get("modules_to_not_convert") or ()

    def is_chosen(path: str, _module: nn.Module) -> bool:
        return not any(fnmatch(path, p) or fnmatch(path, f"{p}.*") for p in left_out)

    return _KEPT_FORMATS[method], is_chosen


def _quantize(model: nn.Module, quantization: dict[str, Any], choose: _Choice) -> None:
    """Quantize what `choose` says, by yes, no or settings of its own, where it can be done.

    The rule of `mlx_lm.utils.quantize_model`.
    """
    group_size = quantization["group_size"]

    def predicate(path: str, module: nn.Module) -> Any:
        can_be = hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
        return can_be and choose(path, module)

    nn.quantize(
        model,
        group_size=group_size,
        bits=quantization["bits"],
        mode=quantization.get("mode", "affine"),
        class_predicate=predicate,
    )
