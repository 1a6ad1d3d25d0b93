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
        ("swa_head_dim swa_v_head_dim", 16),
        (
            "intermediate_size ffn_hidden_size n_inner ff_intermediate_size intermediate_size_mlp",
            128,
        ),
        ("dense_intermediate_size", 128),
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
        ("mlp_only_layers", []),
        ("topk_method", "noaux_tc"),
    )
    for value_name in names.split()
}
_BY_TYPE: dict[Any, Any] = {int: 4, float: 1.0, bool: False, list: []}

# Wrappers without settings of their own: the families that may be inside.
_INSIDE: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "kimi_k25": ("deepseek_v3",),
    "lfm2-vl": ("lfm2",),
    "mistral3": ("llama", "ministral3", "mistral4"),
    "pixtral": ("llama",),
    "qwen2_vl": ("qwen2",),
    "qwen3_vl": ("qwen3",),
    "qwen3_vl_moe": ("qwen3_moe",),
}

_KINDS = {"layer_types": _SLIDING_AND_FULL}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "mscale_all_dim": 1.0}
_YARN |= {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1, "mscale": 1.0}
_KDA: dict[str, Any] = {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
_KDA |= {"kda_layers": [1, 2, 4, 5, 6, 8], "full_attn_layers": [3, 7]}
_NAS_BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
    {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
]

# What the name of a setting does not tell; for a wrapper, of the model inside.
_FAMILIES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 4},
    "afmoe": _KINDS,
    "baichuan_m1": {"sliding_window_layers": [1, 3, 5], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 4, "group_norm_size": 4},
    "bailing_moe_linear": {"layer_group_size": 4, "group_norm_size": 4},
    "cohere": {"num_key_value_heads": 4},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"sliding_window_pattern": "LLLG", "rope_scaling": None},
    "exaone_moe": _KINDS | {"is_moe_layer": [False] + [True] * (NUM_LAYERS - 1)},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gear": _KINDS,
    "gemma3n": _KINDS
    | {
        "num_kv_shared_layers": 3,
        "activation_sparsity_pattern": [0.0] * NUM_LAYERS,
        "hidden_size_per_layer_input": 16,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4_text": _KINDS
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 32},
    "glm_moe_dsa": {"rope_parameters": _ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_k3": {"linear_attn_config": _KDA, "activation_situ_beta": 1.0, "attn_res_block_size": 2},
    "kimi_linear": {"linear_attn_config": _KDA},
    "laguna": _KINDS | {"rope_parameters": _ROPE_BY_KIND},
    "lfm2": {"layer_types": _CONV_AND_FULL, "block_dim": 64, "block_ff_dim": 128},
    "lfm2_moe": {"layer_types": _CONV_AND_FULL},
    "llama4": {
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0] * 2},
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
    },
    "longcat_flash_ngram": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"time_step_limit": [0.0, 100.0]},
    "mellum": _KINDS | {"rope_parameters": _ROPE_BY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0] * 2,
        "moe_layer_freq": [0] + [1] * (NUM_LAYERS - 1),
        "add_swa_attention_sink_bias": True,
    },
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 256}},
    "minimax_m3_vl": {"moe_layer_freq": [0] + [1] * (NUM_LAYERS - 1)},
    "ministral3": {"rope_parameters": _YARN},
    "mistral4": {"rope_parameters": _YARN},
    "muse_spark": _KINDS
    | {
        "num_shared_experts": 0,
        "rope_parameters": _ROPE,
        "layer_rope_theta": [10000.0, 10000.0, 0.0, 10000.0] * 2,
    },
    "nemotron-nas": {"block_configs": _NAS_BLOCKS * 2},
    "nemotron_h": {
        "hybrid_override_pattern": list("M*-EMM*-"),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    "olmo3": _KINDS,
    "olmo_hybrid": {"layer_types": _LINEAR_AND_FULL},
    "openelm": {
        "num_query_heads": [4] * NUM_LAYERS,
        "num_kv_heads": [2] * NUM_LAYERS,
        "ffn_multipliers": [1.0] * NUM_LAYERS,
        "ffn_dim_divisor": 32,
    },
    "phi3small": {"vocab_size": 100352},  # It masks tokens by their number.
    "plamo": {"n_shared_head": 2},
    "qwen3_5": {"num_experts": 0, "full_attention_interval": 3},
    "qwen3_5_moe": {"full_attention_interval": 3},
    "qwen3_next": {"full_attention_interval": 3},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention", "recurrent"] * 2,
        "logits_soft_cap": 30.0,
    },
    "spark2_5": _KINDS | {"rope_parameters": _ROPE_BY_KIND},
}

# Further kinds of model within a family.
_MORE_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4_text": {
        "inputs per layer": {"hidden_size_per_layer_input": 16},
        "experts": {"enable_moe_block": True},
    },
    "llama": {"sliding": _KINDS},
    "minimax_m3_vl": {
        "sparse attention": {
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "sparse_attention_freq": [0, 0, 1, 1] * 2,
        }
    },
    "ministral3": {"sliding": _KINDS},
    "smollm3": {"sliding": _KINDS},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of model in a family: what differs in its config, and how its weights are kept."""

    name: str
    dtype: str = "float32"
    quantize_bits: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    inside: str | None = None


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


def tiny_config(family: str, inside: str | None = None) -> dict[str, Any]:
    """A config.json of a small model of `family`, with every kind of layer it has.

    Of a wrapper that takes several families, `inside` is the one it holds.
    """
    own = {"model_type": family, "vocab_size": VOCAB_SIZE}
    if family in _INSIDE:
        return own | {"text_config": tiny_config(inside or _INSIDE[family][0])}
    changes = _FAMILIES.get(family, {})
    module = importlib.import_module(f"mlx_lm.models.{family}")
    if "text_config" not in {setting.name for setting in dataclasses.fields(module.ModelArgs)}:
        return own | _settings(module.ModelArgs, changes)
    text_module = importlib.import_module(f"mlx_lm.models.{family.removesuffix('_moe')}")
    for name in ("TextArgs", "TextConfig", "TextModelArgs"):
        if hasattr(text_module, name):
            text = _settings(getattr(text_module, name), changes)
            return own | {"text_config": {"model_type": f"{family}_text"} | text}
    raise ValueError("its config has a form of its own")


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
    text = config.get("text_config", config)
    tie = "tie_word_embeddings"
    found = [Variant("plain")]
    if tie in text:
        found.append(Variant("untied" if text[tie] else "tied", changes={tie: not text[tie]}))
    found += [Variant(name, changes=c) for name, c in _MORE_KINDS.get(family, {}).items()]
    found += [Variant(f"{name} inside", inside=name) for name in _INSIDE.get(family, ())[1:]]
    found.append(Variant("bfloat16", dtype="bfloat16"))
    found.append(Variant("4-bit", quantize_bits=4))
    if family in ("llama", "qwen3"):
        found.append(Variant("8-bit", quantize_bits=8))
    return found


def write_tiny_model(
    family: str, folder: Path, variant: Variant = Variant("plain"), *, seed: int = 0
) -> None:
    """Write a random model of `family`, one for every `seed`."""
    config = tiny_config(family, variant.inside)
    config.get("text_config", config).update(variant.changes)
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
    for name, start in dict(tree_flatten(model.parameters())).items():
        if not mx.issubdtype(start.dtype, mx.floating):
            weights.append((name, mx.random.randint(0, 255, start.shape).astype(start.dtype)))
            continue
        noise = 0.1 * mx.random.normal(start.shape)
        is_near_start = start.ndim == 1 or name.endswith("A_log")
        array = start + noise if is_near_start else 1.5 * noise
        weights.append((name, array.astype(dtype if may_cast(name) else start.dtype)))
    model.update(tree_unflatten(weights))
