"""A random float32 model of a chosen size on disk, for benchmarks and memory tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2

from mlx_dist.demo import MODEL_DIR

# About 130 M parameters, 520 MB as float32.
BENCHMARK_LAYERS = 12
_HIDDEN = 896
_VOCAB = 8192


def write_random_model(folder: Path, num_layers: int = BENCHMARK_LAYERS) -> Path:
    """Write a Qwen2 model of `num_layers` layers with the embedded model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen2",
        "hidden_size": _HIDDEN,
        "num_hidden_layers": num_layers,
        "intermediate_size": 2816,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        {"format": "mlx"},
    )
    return folder
