"""Loading a model's tokenizer, with the tokens that end its answers. Knows no ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_dist.errors import ModelError

# What the model takes is checked, and refused, elsewhere; transformers only warns of it.
_MAX_LENGTH = 1 << 60


def load_tokenizer(
    folder: Path, config: dict[str, Any], trust_remote_code: bool
) -> TokenizerWrapper:
    """mlx-lm's wrapper of the tokenizer in `folder`, whose own code runs only if it is trusted.

    Its `eos_token_ids` are those of the tokenizer and of `config`. Raises ModelError if the
    files are missing or damaged.
    """
    settings = {"trust_remote_code": trust_remote_code, "model_max_length": _MAX_LENGTH}
    try:
        tokenizer = load(folder, settings, config.get("eos_token_id"))
        # The first call may change settings of the tokenizer; later ones, from any thread, do not.
        tokenizer.encode("a")
    # The tokenizers library raises plain Exception for a damaged file, and for its own failures
    # what is not even that.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer in {folder} does not load: {reason}; "
            "copy tokenizer.json and tokenizer_config.json again"
        ) from error
    return tokenizer
