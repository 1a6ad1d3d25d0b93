"""The verdict on each mlx-lm family. Written by `python -m benchmarks.families`; do not edit."""

PROVEN = frozenset(
    {
        "Klear",
        "afmoe",
        "apertus",
        "baichuan_m1",
        "bailing_hybrid",
        "bailing_moe",
        "bailing_moe_linear",
        "bailing_moe_v3",
        "cohere",
        "cohere2",
        "deepseek",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone",
        "exaone4",
        "exaone_moe",
        "falcon_h1",
        "gear",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "helium",
        "hunyuan",
        "hunyuan_v1_dense",
        "internlm2",
        "internlm3",
        "jamba",
        "kimi_k25",
        "kimi_linear",
        "kimi_vl",
        "laguna",
        "lfm2",
        "lfm2-vl",
        "lfm2_moe",
        "lille-130m",
        "llama",
        "llama4",
        "llama4_text",
        "longcat_flash",
        "longcat_flash_ngram",
        "mamba",
        "mamba2",
        "mellum",
        "mimo",
        "mimo_v2_flash",
        "minicpm",
        "minicpm3",
        "minimax",
        "minimax_m3_vl",
        "ministral3",
        "mistral3",
        "mistral4",
        "mixtral",
        "muse_glimmer",
        "nanbeige",
        "nanochat",
        "nemotron",
        "nemotron-nas",
        "nemotron_h",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "openelm",
        "phi",
        "phi3",
        "phi3small",
        "phimoe",
        "phixtral",
        "pixtral",
        "plamo",
        "plamo2",
        "plamo3",
        "qwen",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl",
        "qwen3_vl_moe",
        "recurrent_gemma",
        "seed_oss",
        "smollm3",
        "solar_open",
        "spark2_5",
        "stablelm",
        "starcoder2",
        "step3p5",
        "talkie",
        "telechat3",
        "youtu_llm",
    }
)

# Proven, but every sequence has a microbatch of its own.
UNBATCHED: dict[str, str] = {
    "gemma2": "[broadcast_shapes] Shapes (3,1,6,6) and (3,2,2,6,6) cannot be broadcast",
    "gpt_bigcode": "[convert] Only length-1 arrays can be converted to Python scalars",
    "llama4": "mlx-lm has no batches of ChunkedKVCache, KVCache",
    "longcat_flash_ngram": (
        "[concatenate] All the input array dimensions must match exactly except for the"
        " concatenation axis"
    ),
    "minimax_m3_vl": (
        "sparse attention: logits differ by 0.3 from those of a sequence alone (a step of [1,"
        " 1, 1, 1] tokens after [8, 8, 8, 10])"
    ),
    "phi3small": "[broadcast_shapes] Shapes (3,2,2,6,6) and (3,1,6,6) cannot be broadcast",
    "plamo3": (
        "logits differ by 0.09 from those of a sequence alone (a step of [4, 4] tokens after"
        " [10, 10])"
    ),
    "recurrent_gemma": (
        "logits differ by 0.002 from those of a sequence alone (a step of [1, 1, 1, 1] tokens"
        " after [16, 16, 0, 1])"
    ),
}

# Sequences share microbatches, but those that share a step have as many tokens in it.
UNPADDED: dict[str, str] = {
    "baichuan_m1": (
        "logits differ by 0.8 from those of a sequence alone (a step of [1, 1, 1] tokens after"
        " [5, 11, 3])"
    ),
    "bailing_moe_linear": (
        "logits differ by 1 from those of a sequence alone (a step of [1, 1, 1] tokens after"
        " [5, 11, 3])"
    ),
    "jamba": (
        "logits differ by 2 from those of a sequence alone (a step of [1, 1, 1] tokens after"
        " [5, 11, 3])"
    ),
    "mamba": (
        "logits differ by 1 from those of a sequence alone (a step of [1, 1, 1] tokens after"
        " [5, 11, 3])"
    ),
    "nemotron_h": (
        "logits differ by 0.02 from those of a sequence alone (a step of [1, 1, 1] tokens"
        " after [5, 11, 3])"
    ),
    "olmo_hybrid": (
        "logits differ by 1 from those of a sequence alone (a step of [1, 1, 1] tokens after"
        " [5, 11, 3])"
    ),
}

# Tensor groups may share every layer.
SLICED = frozenset(
    {
        "Klear",
        "afmoe",
        "apertus",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone_moe",
        "gear",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "internlm3",
        "kimi_k25",
        "kimi_vl",
        "laguna",
        "llama",
        "llama4",
        "mellum",
        "mimo",
        "mimo_v2_flash",
        "minicpm",
        "minicpm3",
        "minimax",
        "ministral3",
        "mistral3",
        "mistral4",
        "mixtral",
        "nanbeige",
        "nemotron",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi3",
        "phimoe",
        "pixtral",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smollm3",
        "solar_open",
        "stablelm",
        "telechat3",
        "youtu_llm",
    }
)

REFUSED: dict[str, str] = {
    "afm7": "its layers are not one list",
    "bitnet": "mlx-lm cannot run it here (one of its kernels is for Apple's GPU only)",
    "dbrx": "its code computes while it runs, so that every stage would read the whole model",
    "deepseek_v41": "layer 1 uses more of layer 0 than its output",
    "gemma3n": "its layers pass several tensors on",
    "iquestloopcoder": "its layers do not run one after another, once each",
    "kimi_k3": "layer 3 uses more of layer 1 than its output",
    "muse_spark": "mlx-lm cannot run it here (one of its kernels is for Apple's GPU only)",
    "olmo": "no tiny model could be built (its module in mlx-lm asks for one more package)",
    "prism_hadamard_qwen35": "no tiny model could be built (its config has a form of its own)",
    "rwkv7": "layer 1 uses more of layer 0 than its output",
}
