"""The verdict on each mlx-lm family. Written by `python -m benchmarks.families`; do not edit."""

PROVEN = frozenset(
    {
        "apertus",
        "cohere",
        "cohere2",
        "dbrx",
        "ernie4_5",
        "exaone",
        "exaone4",
        "gear",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "hunyuan_v1_dense",
        "internlm2",
        "llama",
        "qwen3",
    }
)

REFUSED: dict[str, str] = {}
