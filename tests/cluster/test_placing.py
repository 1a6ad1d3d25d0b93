"""The model is cut by what each host has, and a host that lacks the model is fed."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_dist.demo import MODEL_DIR

PROMPT = ("--prompt", "What is a rank?", "--max-tokens", "4", "--json")
LIMITS = ("--memory-gb", "1.05", "--memory-gb", "mxh3=0.35")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Seven layers of 67 MB, so that the caps that are set below allow for two of them at most."""
    folder = tmp_path_factory.mktemp("model")
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"num_hidden_layers": 7, "hidden_size": 1024, "intermediate_size": 4096}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    config["layer_types"] = ["full_attention"] * 7
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    weights = llama.Model(llama.ModelArgs.from_dict(config)).parameters()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)))
    return folder


@pytest.fixture(scope="module")
def own(cluster, model):
    """The answer of hosts that each have the model."""
    return cluster.mlx_dist("generate", *PROMPT, "--model", model, *LIMITS).json()


def test_a_third_of_the_memory_gets_a_third_of_the_layers(own):
    assert [rank["layers"] for rank in own["ranks"]] == [[0, 3], [3, 6], [6, 7]]


def test_a_host_without_the_model_is_fed_its_third(cluster, model, own, tmp_path):
    """Over a link of 0.5 ms and 1 Gbit/s, and to the same text as with files of its own."""
    asked = ("generate", *PROMPT, "--model", model, *LIMITS)
    cluster.faults(delay_ms=0.5, rate_mbit=1000)
    (tmp_path / "nothing").mkdir()
    with cluster.replaced("mxh3", model, tmp_path / "nothing"):
        done = cluster.mlx_dist(*asked, "--weights", "leader")
    cluster.faults()
    answer = done.json()
    assert answer["text"] == own["text"]
    assert [rank["layers"] for rank in answer["ranks"]] == [[0, 3], [3, 6], [6, 7]]
    assert "fed rank 2 (mxh3)" in done.err


def test_the_error_names_the_host_that_lacks_memory(cluster, model):
    cut = ("--layers", "2,2,3")
    done = cluster.mlx_dist("generate", *PROMPT, "--model", model, *LIMITS, *cut)
    assert done.code == 1
    assert "mxh3" in done.error_lines[0]
