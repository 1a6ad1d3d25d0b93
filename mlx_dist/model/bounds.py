"""What files of a model may ask for, looked at before anything is built of them.

Knows JSON and numbers; knows no arrays. A config.json is a few lines that say how much to make:
mlx-lm's classes make a layer, or a list's item, as often as it says. A folder may hold anything.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_dist.errors import ModelError

# What mlx-lm and transformers read as a whole.
_READ_WHOLE = re.compile(
    r"(.*config|tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|.*\.jinja|vocab\.txt|merges\.txt|tokenizer\.model|.*\.tiktoken"
)
# The largest tokenizer.json known has 33 MB.
_MOST_SMALL_BYTES = 256 << 20
_MOST_CONFIG_BYTES = 16 << 20
# MLX's arrays have fewer in each dimension.
_MOST_SIZE = (1 << 31) - 1
# What models are made of by loops: the largest known have 160 layers, 1,024 experts, 256 heads.
_MOST_COUNTED = {"layer": 4096, "block": 4096, "depth": 4096, "expert": 1 << 14, "head": 1 << 14}
_MOST_OTHERS = 1 << 17
_COUNT = re.compile(r"(^|_)(num|n|nb)_|_num$")
# Numbers that nothing is made of.
_NO_SIZE = re.compile(
    r"theta|base|position|length|window|ctx|context|token|seed|total|param|freq|scal|time|limit"
)
# Counts of what is a row of an array.
_TABLE = re.compile(r"vocab|embd|embed|words|label|class")
_LAYERS_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
# Parts of a config that describe what is no language model.
_NO_TEXT = re.compile(r"vision|audio|image|video|speech|talker|quantization")


def check_small_files(folder: Path) -> None:
    """Raise ModelError for what is read as a whole and is no file, or too large to be small."""
    for path in sorted(folder.iterdir()):
        if _READ_WHOLE.fullmatch(path.name):
            is_config = path.name.endswith("config.json")
            check_file(path, _MOST_CONFIG_BYTES if is_config else _MOST_SMALL_BYTES)


def check_file(path: Path, most_bytes: int | None = None) -> None:
    """Raise ModelError if `path` is no plain file, as a pipe would be waited for, or too large."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path} is no file; copy the model again")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ModelError(
            f"{path} has {found.st_size >> 20} MiB and may have {most_bytes >> 20}; "
            "move what is none of the model's out of its folder"
        )


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError, naming the setting, if `config` asks for more than any model has."""
    for key, value in _numbers(config):
        if isinstance(value, float):
            if math.isnan(value):
                raise ModelError(f"{path} has {key} = NaN; copy the model again")
            continue
        if (most := _most(key)) is not None and value > most:
            raise ModelError(
                f"{path} asks for {key} = {_shown(value)}, and no model has more than {most}"
            )
    stop = config.get("eos_token_id")
    listed = stop if isinstance(stop, list) else [stop]
    if any(not isinstance(token, int | None) for token in listed):
        raise ModelError(f"{path} has no token for eos_token_id: {str(stop)[:100]}")


def check_layers(config: Mapping[str, Any], num_tensors: int, name: str) -> None:
    """Raise ModelError if `config` asks for more layers than there are tensors."""
    for part in (config, config.get("text_config") or {}):
        for key in _LAYERS_KEYS:
            value = part.get(key)
            if isinstance(value, int) and value > num_tensors:
                raise ModelError(
                    f"{name}: its config.json asks for {key} = {_shown(value)}, and its files "
                    f"have {num_tensors} tensors; copy the whole model"
                )


def check_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError for a tensor in a header with a dimension that MLX would cut off."""
    for name, tensor in tensors.items():
        if any(size > _MOST_SIZE for size in tensor["shape"]):
            raise ModelError(
                f"{path} has a tensor {name[:100]!r} of shape {str(tensor['shape'])[:100]}, "
                f"and no dimension may be more than {_MOST_SIZE}"
            )


def _numbers(part: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in `part` with the key that it, or the list that it is in, stands under."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if not _NO_TEXT.search(key):
                yield from _numbers(value, key)
    elif isinstance(part, list):
        for value in part:
            yield from _numbers(value, name)
    elif isinstance(part, int | float):
        yield name, part


def _most(key: str) -> int | None:
    """The most that a number called `key` may be, or None for any."""
    key = key.lower()
    if _NO_SIZE.search(key):
        return None
    is_count = _COUNT.search(key) or key.endswith(("layers", "blocks", "depth", "experts", "heads"))
    if is_count and not _TABLE.search(key):
        return next((most for word, most in _MOST_COUNTED.items() if word in key), _MOST_OTHERS)
    return _MOST_SIZE


def _shown(value: int) -> str:
    return str(value) if value < 10**12 else f"{value:.0e}" if value < 10**300 else "1e300"
