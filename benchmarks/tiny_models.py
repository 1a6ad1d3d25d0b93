"""Tiny random models of every mlx-lm family, as folders that mlx-lm loads.

Owns how a small config is found for a family; knows nothing of stages. Most of a config follows
from the names of the family's own settings; `_FAMILIES` holds what does not.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import quantize_model

NUM_LAYERS = 8
WINDOW = 8
VOCAB_SIZE = 160
_GROUP_SIZE = 32

_SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + [
    "sliding_attention",
    "full_attention",
]
_CONV_AND_FULL = ["conv", "conv", "full_attention", "conv"] * 2
_LINEAR_AND_FULL = ["linear_attention", "linear_attention", "full_attention"] * 2 + [
    "linear_attention",
    "full_attention",
]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_KIND = {"sliding_attention": _ROPE, "full_attention": _ROPE}

# What a setting means is in its name, nearly always.
_BY_NAME: dict[str, Any] = {
    value_name: value
    for names, value in (
        ("hidden_size d_model n_embd model_dim hidden_dim", 64),
        ("num_hidden_layers n_layers n_layer num_layers num_transformer_layers", NUM_LAYERS),
        ("vocab_size num_vocab vocab_size_per_layer_input", VOCAB_SIZE),
        ("num_attention_heads n_heads n_head num_heads", 4),
        ("num_key_value_heads n_kv_heads n_kv_head num_kv_heads num_attention_groups", 2),
        ("head_dim kv_channels hidden_size_per_head v_head_dim qk_nope_head_dim", 16),
        ("intermediate_size ffn_hidden_size n_inner ff_intermediate_size intermediate_size_mlp", 128),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 64),
        ("moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim", 64),
        ("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts", 2),
        ("sliding_window window_size attention_window_size sliding_window_size", WINDOW),
        ("max_position_embeddings n_positions n_ctx block_size model_max_length", 256),
        ("original_max_position_embeddings", 256),
        ("first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts", 1),
        ("num_shared_expert n_group topk_group moe_layer_freq decoder_sparse_step", 1),
        ("kv_lora_rank q_lora_rank", 32),
        ("qk_rope_head_dim", 8),
        ("rope_theta swa_rope_theta rope_embedding_base rotary_emb_base", 10000.0),
        ("partial_rotary_factor rotary_pct", 0.5),
        ("rotary_dim", 8),
        ("rms_norm_eps norm_eps norm_epsilon layer_norm_eps layer_norm_epsilon", 1e-5),
        ("layernorm_epsilon", 1e-5),
        ("conv_kernel conv_L_cache linear_conv_kernel_dim mamba_d_conv conv1d_width", 4),
        ("linear_num_value_heads", 4),
        ("linear_num_key_heads", 2),
        ("linear_key_head_dim linear_value_head_dim", 16),
        ("state_size ssm_state_size mamba_d_state", 16),
        ("mamba_num_heads mamba_n_heads", 4),
        ("mamba_head_dim mamba_d_head", 16),
        ("n_groups mamba_n_groups", 1),
        ("mamba_expand", 2),
        ("index_head_dim", 16),
        ("index_n_heads", 2),
        ("index_topk", WINDOW),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
    )
    for value_name in names.split()
}
_BY_TYPE: dict[Any, Any] = {int: 4, float: 1.0, bool: False, list: []}

# Wrappers: the family of the model inside, whose config is the wrapper's `text_config`.
_TEXT_FAMILIES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "llama",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_next",
    "qwen3_5_moe": "qwen3_next",
}

_MAMBA2 = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 8, "time_step_rank": 4}
_FAMILIES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 4},
    "afmoe": {"layer_types": _SLIDING_AND_FULL},
    "baichuan_m1": {"sliding_window_layers": [1, 3, 5], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 4, "group_norm_size": 4},
    "bailing_moe_linear": {"layer_group_size": 4, "group_norm_size": 4},
    "cohere": {"num_key_value_heads": 4},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "exaone4": {"sliding_window_pattern": "LLLG", "rope_scaling": None},
    "exaone_moe": {
        "layer_types": _SLIDING_AND_FULL,
        "is_moe_layer": [False] + [True] * (NUM_LAYERS - 1),
    },
    "gear": {"layer_types": _SLIDING_AND_FULL},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0] * 2},
    "lfm2": {"layer_types": _CONV_AND_FULL, "block_dim": 64, "block_ff_dim": 128},
    "lfm2_moe": {"layer_types": _CONV_AND_FULL},
    "mamba2": _MAMBA2,
    "mellum": {"layer_types": _SLIDING_AND_FULL, "rope_parameters": _ROPE_BY_KIND},
    "olmo3": {"layer_types": _SLIDING_AND_FULL},
    "olmo_hybrid": {"layer_types": _LINEAR_AND_FULL},
    "phi3small": {"vocab_size": 100352},  # It masks tokens by their number.
    "qwen3_next": {"full_attention_interval": 3},
}


# Further kinds of model within a family.
_MORE_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"sliding": {"layer_types": _SLIDING_AND_FULL}},
    "ministral3": {"sliding": {"layer_types": _SLIDING_AND_FULL}},
    "smollm3": {"sliding": {"layer_types": _SLIDING_AND_FULL}},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of model in a family: what to change in the config, and how weights are kept."""

    name: str
    dtype: str = "float32"
    quantize_bits: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def families() -> list[str]:
    """The names of mlx-lm's modules that hold a language model, sorted."""
    names = (module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return sorted(name for name in names if _holds_model(name))


def _holds_model(name: str) -> bool:
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except (ImportError, SystemExit):
        return True  # It names a family, which then cannot be built here.
    return hasattr(module, "Model") and hasattr(module, "ModelArgs")


def tiny_config(family: str) -> dict[str, Any]:
    """A config.json of a small model of `family`, with every kind of layer it has."""
    own = {"model_type": family}
    if family in _TEXT_FAMILIES:
        text = tiny_config(_TEXT_FAMILIES[family])
        own |= {"text_config": text, "vocab_size": VOCAB_SIZE}
        return own | _FAMILIES.get(family, {})
    settings = importlib.import_module(f"mlx_lm.models.{family}").ModelArgs
    return own | _settings(settings, _FAMILIES.get(family, {}))


def _settings(args_class: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    config = dict(overrides)
    for setting in dataclasses.fields(args_class):
        name, kind = setting.name, setting.type
        if name in config or name == "model_type":
            continue
        if name in _BY_NAME:
            config[name] = _BY_NAME[name]
        elif name == "tie_word_embeddings":
            config[name] = setting.default is True
        elif setting.default is setting.default_factory is dataclasses.MISSING:
            config[name] = _BY_TYPE.get(get_origin(kind) or kind)
    return config


def variants(family: str) -> list[Variant]:
    """The kinds of model to try: plain, tied or not, what the family adds, bf16, quantized."""
    config = tiny_config(family)
    tie = "tie_word_embeddings"
    found = [Variant("plain")]
    if tie in config:
        found.append(Variant("untied" if config[tie] else "tied", changes={tie: not config[tie]}))
    found += [Variant(name, changes=c) for name, c in _MORE_KINDS.get(family, {}).items()]
    found.append(Variant("bfloat16", dtype="bfloat16"))
    found.append(Variant("4-bit", quantize_bits=4))
    if family in ("llama", "qwen3"):
        found.append(Variant("8-bit", quantize_bits=8))
    return found


def write_tiny_model(
    family: str, folder: Path, variant: Variant = Variant("plain"), *, seed: int = 0
) -> None:
    """Write a random model of `family`, one for every `seed`."""
    config = tiny_config(family) | variant.changes
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    mx.random.seed(seed)
    _randomize(model, getattr(mx, variant.dtype))
    if variant.quantize_bits is not None:
        model, config = quantize_model(model, config, _GROUP_SIZE, variant.quantize_bits)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def _randomize(model: nn.Module, dtype: mx.Dtype) -> None:
    """Give random weights such that a missing layer, or two swapped, shows in the logits.

    Vectors (norms, biases, decays) stay near what the model's code starts them from.
    """
    may_cast = getattr(model, "cast_predicate", lambda _name: True)
    weights = []
    for name, start in tree_flatten(model.parameters()):
        if not mx.issubdtype(start.dtype, mx.floating):
            weights.append((name, mx.random.randint(0, 255, start.shape).astype(start.dtype)))
            continue
        noise = 0.1 * mx.random.normal(start.shape)
        is_near_start = start.ndim == 1 or name.endswith("A_log")
        array = start + noise if is_near_start else 1.5 * noise
        weights.append((name, array.astype(dtype if may_cast(name) else start.dtype)))
    model.update(tree_unflatten(weights))
