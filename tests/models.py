"""Model folders for tests: the embedded model, made to call tools and to reason.

It was never taught either; what it answers is told from text by its markers all the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from mlx_dist.demo import MODEL_DIR

CALL_MARKERS = ("<tool_call>", "</tool_call>")
THINK_MARKERS = ("<think>", "</think>")

# As Qwen's: tools in the head, calls as JSON between markers, results in a user's message.
_TEMPLATE = """\
{%- if tools %}
{{- '<|system|># Tools' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '<|end|>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|user|><tool_response>' + message.content + '</tool_response><|end|>' }}
{%- else %}
{{- '<|' + message.role + '|>' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{{- message.content | trim }}
{%- for tool_call in message.tool_calls or [] %}
{%- set tool_call = tool_call.function %}
{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- (tool_call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
"""
_ENDS = {
    False: "{%- endif %}\n",
    True: "{{- '<think>\\n' if enable_thinking else '' }}\n{%- endif %}\n",
}


def write_tool_model(folder: Path, *, reasons: bool = False) -> Path:
    """The embedded model in `folder`, with a template and markers for tool calls.

    With `reasons` it has markers for reasoning, too, which its template opens in the prompt
    unless `enable_thinking` is false. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    markers = [*CALL_MARKERS, *(THINK_MARKERS if reasons else ())]
    config = json.loads((MODEL_DIR / "config.json").read_text())
    first_id = config["vocab_size"]
    _write(folder / "config.json", config | {"vocab_size": first_id + len(markers)})
    weights = mx.load(str(MODEL_DIR / "model.safetensors"))
    assert isinstance(weights, dict)
    # The embeddings are the head, too: a row of zeros is a token of average likelihood.
    embeddings = weights["model.embed_tokens.weight"]
    new = mx.zeros((len(markers), embeddings.shape[1]), embeddings.dtype)
    weights["model.embed_tokens.weight"] = mx.concatenate([embeddings, new])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    # As Qwen's, the markers are added tokens and not special ones.
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": first_id + i, "content": text, "special": False}
        for i, text in enumerate(markers)
    ]
    _write(folder / "tokenizer.json", tokenizer)
    write_template(folder, _TEMPLATE + _ENDS[reasons])
    return folder


def write_template(folder: Path, template: str) -> Path:
    """Give the tokenizer in `folder`, or the embedded one if it has none, this chat template."""
    if not (folder / "tokenizer.json").exists():
        shutil.copy(MODEL_DIR / "tokenizer.json", folder)
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", config | {"chat_template": template})
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
