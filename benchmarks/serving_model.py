"""The model of the serving benchmarks: random weights, one token a word, and never an early end.

    python -m benchmarks.serving_model FOLDER

The weights are those of benchmarks.random_model. The tokenizer gives every id of the vocabulary a
text of its own, so that a server that streams text streams each token, and a word of
benchmarks.load.WORDS is one token on every server. Ids that are no word get a logit of 0, which is
never the largest of thousands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import mlx.core as mx
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.load import WORDS
from benchmarks.random_model import write_random_model

# What transformers adds to every tokenizer of this family; a further id would have no embedding.
_END = "<|endoftext|>"
_SPACE = "\u0120"  # What byte-level tokenizers write for a space.
_WEIGHTS = "model.safetensors"


def _tokenizer() -> tuple[dict[str, Any], int]:
    """A byte-level BPE tokenizer that knows the words, and how many of its ids are no words."""
    alphabet = sorted(ByteLevel.alphabet())
    stems = [*ascii_lowercase, *(a + b for a in ascii_lowercase for b in ascii_lowercase), *WORDS]
    tokens = [_END, *alphabet, *(_SPACE + stem for stem in stems)]
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": _END, "special": True} | end],
        "normalizer": None,
        "pre_tokenizer": pieces | {"use_regex": True},
        "post_processor": None,
        "decoder": pieces | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [[_SPACE + stem[:-1], stem[-1]] for stem in stems],
        },
    }
    return content, 1 + len(alphabet)


def write_serving_model(folder: Path) -> None:
    """Write the model with its tokenizer, and the index that mlx-lm's pipeline looks for."""
    write_random_model(folder)
    tokenizer, num_no_words = _tokenizer()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "pad_token": _END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = mx.load(str(folder / _WEIGHTS))
    assert isinstance(weights, dict)
    head_VD = weights["lm_head.weight"]
    assert head_VD.shape[0] == len(tokenizer["model"]["vocab"])
    head_VD[:num_no_words] = 0
    mx.eval(weights)
    mx.save_safetensors(str(folder / _WEIGHTS), weights, {"format": "mlx"})
    total_bytes = sum(weight.nbytes for weight in weights.values())
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict.fromkeys(sorted(weights), _WEIGHTS),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_serving_model(parser.parse_args().folder)
