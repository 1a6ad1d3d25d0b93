"""What a model is said to cost is what it costs: bytes at every cut, caches, experts, head."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.tiny_models import NUM_LAYERS, Variant, tiny_config, write_tiny_model
from mlx_dist.cluster.costs import ModelCosts
from mlx_dist.cluster.placement import Slice
from mlx_dist.config import Dtype
from mlx_dist.errors import FamilyError, ModelError
from mlx_dist.messages import KvCost
from mlx_dist.model.costing import costs_of_config, costs_of_files
from mlx_dist.model.counted import Counted
from mlx_dist.model.dry_run import QuietGroup
from mlx_dist.model.files import find_model
from mlx_dist.model.stage import Stage
from mlx_dist.model.weights import load_stage

PUBLISHED = Path(__file__).parents[2] / "docs" / "plans" / "models"
SOME_CUTS = [(0, NUM_LAYERS), (0, 3), (2, 5), (NUM_LAYERS - 1, NUM_LAYERS)]
TIED, UNTIED = ({"tie_word_embeddings": is_tied} for is_tied in (True, False))
MODELS = [
    ("llama", Variant("tied", changes=TIED)),
    ("llama", Variant("untied", changes=UNTIED)),
    ("llama", Variant("bfloat16", dtype="bfloat16")),
    ("llama", Variant("tied 4-bit", quantize_bits=4, changes=TIED)),
    ("qwen3", Variant("untied 8-bit", quantize_bits=8, changes=UNTIED)),
    ("deepseek_v3", Variant("plain")),
    ("deepseek_v3", Variant("4-bit", quantize_bits=4)),
    ("gemma3_text", Variant("plain")),
    ("gpt_oss", Variant("4-bit", quantize_bits=4)),
    ("mamba", Variant("plain")),
    ("qwen3_moe", Variant("plain")),
    ("qwen3_next", Variant("4-bit", quantize_bits=4)),
]


def _name(case):
    return getattr(case, "name", case)


def _published(name, **kwargs) -> ModelCosts:
    config = json.loads((PUBLISHED / name / "config.json").read_text())
    return costs_of_config(config, name=name, **kwargs)


def _in_one(kv_costs: list[KvCost]) -> tuple[int, dict[int | None, int]]:
    growing: dict[int | None, int] = {}
    for num_bytes, window in (pair for kv in kv_costs for pair in kv.growing):
        growing[window] = growing.get(window, 0) + num_bytes
    return sum(kv.fixed_bytes for kv in kv_costs), growing


def _num_weights(costs: ModelCosts, *, is_active: bool) -> int:
    return costs.head.num_weights + sum(
        layer.dense.num_weights
        + layer.expert.num_weights * (layer.experts_per_token if is_active else layer.num_experts)
        for layer in costs.layers
    )


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=_name)
def test_bytes_are_those_that_a_stage_loads(family, variant, tmp_path):
    write_tiny_model(family, tmp_path, variant)
    files = find_model(str(tmp_path))
    costs = costs_of_files(files, Dtype.auto)
    assert costs.num_layers == NUM_LAYERS
    for start, end in SOME_CUTS:
        loaded = load_stage(files, start, end, Dtype.auto, lambda _a, _b: None)
        assert costs.weights_bytes(start, end) == loaded.weights_bytes
    weights = dict(tree_flatten(loaded.model.parameters()))
    for start, end in combinations(range(NUM_LAYERS + 1), 2):
        own = (a.nbytes for name, a in weights.items() if loaded.anatomy.owns(name, start, end))
        assert costs.weights_bytes(start, end) == sum(own)


@pytest.mark.parametrize(
    ("family", "variant", "weights"),
    [
        ("llama", Variant("tied", changes=TIED), (2, 1)),
        ("llama", Variant("4-bit", quantize_bits=4), (1, 1)),
        # More ranks than heads of keys and values, and some left with nothing.
        ("qwen3_moe", Variant("plain"), (1, 1, 1, 1, 1)),
        ("deepseek_v3", Variant("plain"), (3, 1)),
    ],
    ids=["llama tied", "llama 4-bit", "qwen3_moe", "deepseek_v3"],
)
def test_a_slice_costs_what_its_rank_loads_and_keeps(family, variant, weights, tmp_path):
    write_tiny_model(family, tmp_path, variant)
    files = find_model(str(tmp_path))
    counted = Counted(files, Dtype.auto, fused=True)
    whole = counted.of()
    assert whole == costs_of_files(files, Dtype.auto)
    assert (whole.entry_sums, whole.logits_bytes, whole.layers[0].sums) == ((), 0, ())
    for place in range(len(weights)):
        slice_ = Slice(place, weights)
        costs = counted.of(slice_)
        for start, end in SOME_CUTS:
            loaded = load_stage(files, start, end, Dtype.auto, lambda _a, _b: None, slice_)
            assert costs.weights_bytes(start, end) == loaded.weights_bytes
            loaded.slicing.join(QuietGroup(len(weights)))
            kept = Stage(loaded.model, loaded.anatomy, start, end).kv_cost()
            assert _in_one([layer.kv for layer in costs.layers[start:end]]) == _in_one([kept])
        # Attention, MLP and embedding are added up; logits are gathered.
        assert costs.entry_sums == (costs.hidden_bytes,)
        assert all(layer.sums == (costs.hidden_bytes,) * 2 for layer in costs.layers)
        assert costs.logits_bytes >= costs.vocab_size * costs.hidden_bytes / 64


def test_a_config_of_no_size_is_sliced_without_its_weights():
    config = tiny_config("llama")
    slice_ = Slice(0, (1, 1))
    half = costs_of_config(config, name="m", bits=4, group_size=32, slice_=slice_)
    whole = costs_of_config(config, name="m", bits=4, group_size=32)
    assert half.layers[0].dense.num_weights == whole.layers[0].dense.num_weights / 2
    assert half.head.num_weights == whole.head.num_weights / 2
    assert half.layers[0].kv.growing[0][0] == whole.layers[0].kv.growing[0][0] / 2
    assert half.layers[0].score_flops == whole.layers[0].score_flops / 2


def test_bytes_are_of_the_dtype_that_is_asked_for(tmp_path):
    write_tiny_model("qwen3_moe", tmp_path, Variant("4-bit", quantize_bits=4))
    files = find_model(str(tmp_path))
    costs = costs_of_files(files, Dtype.float16)
    assert costs.dtype == "float16"
    for start, end in SOME_CUTS:
        loaded = load_stage(files, start, end, Dtype.float16, lambda _a, _b: None)
        assert costs.weights_bytes(start, end) == loaded.weights_bytes


def test_of_files_that_are_elsewhere_the_headers_suffice(tmp_path):
    write_tiny_model("qwen3_moe", tmp_path)
    files = find_model(str(tmp_path))
    elsewhere = tuple(replace(file, path=None) for file in files.weights)
    on_hub = replace(files, repo="some/model", revision="1", weights=elsewhere)
    assert costs_of_files(on_hub, Dtype.auto) == costs_of_files(files, Dtype.auto)


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=_name)
def test_caches_cost_what_a_stage_says(family, variant, tmp_path):
    write_tiny_model(family, tmp_path, variant)
    files = find_model(str(tmp_path))
    layers = costs_of_files(files, Dtype.auto).layers
    for start, end in SOME_CUTS:
        loaded = load_stage(files, start, end, Dtype.auto, lambda _a, _b: None)
        whole = Stage(loaded.model, loaded.anatomy, start, end).kv_cost()
        assert _in_one([layer.kv for layer in layers[start:end]]) == _in_one([whole])


@pytest.mark.parametrize(("family", "variant"), MODELS, ids=_name)
def test_a_config_costs_what_its_files_do(family, variant, tmp_path):
    write_tiny_model(family, tmp_path, variant)
    files = find_model(str(tmp_path))
    dtype = Dtype(variant.dtype)
    assert costs_of_config(files.config, name=files.name, dtype=dtype) == costs_of_files(
        files, Dtype.auto
    )


def test_quantized_to_some_bits_a_config_costs_what_files_so_quantized_do(tmp_path):
    for family in ("llama", "qwen3_moe"):
        write_tiny_model(family, tmp_path / family, Variant("4-bit", quantize_bits=4))
        files = find_model(str(tmp_path / family))
        plain = {k: v for k, v in files.config.items() if not k.startswith("quantization")}
        for config in (plain, files.config | {"quantization": {"group_size": 64, "bits": 8}}):
            costs = costs_of_config(
                config, name=files.name, bits=4, group_size=32, dtype=Dtype.float32
            )
            assert costs == costs_of_files(files, Dtype.auto)


def test_one_module_may_be_quantized_otherwise():
    config = tiny_config("llama")
    four, head = {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 8}
    untied = config | UNTIED
    costs = costs_of_config(untied | {"quantization": four | {"lm_head": head}}, name="m")
    assert (costs.layers[0].dense.bits, costs.head.bits) == (5, 9)
    costs = costs_of_config(untied | {"quantization": four | {"lm_head": False}}, name="m")
    assert costs.head.bits == 16


def test_the_parts_of_a_layer():
    costs = costs_of_config(tiny_config("llama"), name="m")
    layer = costs.layers[3]
    # Queries and output of 64 by 64, keys and values of 64 by 32; an MLP of three 64 by 128.
    assert layer.dense.num_weights == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert layer.dense.bits == 16
    assert layer.weights_bytes == 2 * (layer.dense.num_weights + 2 * 64)
    assert layer.kv == KvCost(0, [(2 * 2 * 32, None)])
    assert layer.score_flops == 4 * 4 * 16
    assert (layer.num_activations, layer.num_experts) == (128, 0)
    # Two norms, seven matrices, two rotations, two caches, attention, an activation, two sums.
    assert layer.num_ops == 17
    assert (costs.hidden_bytes, costs.vocab_size, costs.context_tokens) == (128, 160, 256)
    assert (costs.head.num_weights, costs.dtype) == (160 * 64, "bfloat16")


def test_experts_are_counted_apart():
    costs = costs_of_config(tiny_config("deepseek_v3"), name="m")
    first, second = costs.layers[:2]
    assert (first.num_experts, first.expert.num_weights, first.num_activations) == (0, 0, 128)
    assert (second.num_experts, second.experts_per_token) == (4, 2)
    assert second.expert.num_weights == 3 * 64 * 64
    assert second.num_activations == (2 + 1) * 64
    # The shared expert and the router take the place of the first layer's MLP.
    assert second.dense.num_weights == first.dense.num_weights - 3 * 64 * 128 + 3 * 64 * 64 + 4 * 64
    # A latent of 32, and 8 elements that rotate, for each of 4 heads.
    assert first.score_flops == 2 * 4 * (32 + 8 + 32)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba"])
def test_layers_without_attention_have_no_scores(family):
    layer = costs_of_config(tiny_config(family), name="m").layers[0]
    assert layer.score_flops == 0
    assert layer.kv.fixed_bytes > 0 and not layer.kv.growing


def test_on_this_device_there_may_be_more_operations():
    config = tiny_config("llama")
    fused, here = (costs_of_config(config, name="m", fused=f) for f in (True, False))
    for one, other in zip(fused.layers, here.layers, strict=True):
        assert one.num_ops <= other.num_ops
        assert one.num_scores == 0 < other.num_scores
        assert replace(one, num_ops=0) == replace(other, num_ops=0, num_scores=0)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # Meta's, Qwen's, DeepSeek's and OpenAI's model cards. OpenAI counts the head as active and
    # not the embedding; Qwen counts both.
    [
        ("llama-3.3-70b", 70.6e9, 70.6e9),
        ("qwen3-235b-a22b", 235e9, 22e9),
        ("deepseek-v3", 671e9, 37e9),
        ("gpt-oss-120b", 117e9, 5.1e9),
    ],
)
def test_published_models_have_as_many_weights_as_published(name, total, active):
    costs = _published(name, bits=4)
    # None of them ties its embeddings, which are as large as the head.
    num_all = _num_weights(costs, is_active=False) + costs.head.num_weights
    assert num_all == pytest.approx(total, rel=0.01)
    assert _num_weights(costs, is_active=True) == pytest.approx(active, rel=0.03)


def test_a_checkpoint_keeps_the_format_that_it_came_in():
    costs = _published("gpt-oss-120b")
    # OpenAI's model card: 60.8 GiB.
    assert costs.weights_bytes(0, 36) == pytest.approx(60.8 * 2**30, rel=0.01)
    eight = _published("gpt-oss-120b", bits=8)
    assert eight.layers[0].expert == costs.layers[0].expert
    assert (costs.layers[0].dense.bits, eight.layers[0].dense.bits) == (16, 8.5)
    assert costs.layers[0].expert.bits == 4.25


def test_the_largest_model_takes_no_memory():
    mx.clear_cache()
    before_bytes = mx.get_active_memory()
    mx.reset_peak_memory()
    costs = _published("deepseek-v3", bits=8)
    assert mx.get_peak_memory() - before_bytes < 1 << 20
    assert costs.weights_bytes(0, 61) > 700e9
    # The same for all but the first three, whose MLP has no experts.
    assert len(set(map(repr, costs.layers[3:]))) == 1
    assert costs.layers[3].kv == KvCost(0, [(2 * (512 + 64), None)])
    assert costs.layers[3].score_flops == 2 * 128 * (512 + 64 + 512)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": None}, "makes no model"),
        ({"hidden_size": "wide"}, "makes no model"),
        ({"hidden_size": -1}, "makes no model"),
        ({"num_attention_heads": 0}, "makes no model"),
        ({"rope_scaling": {"rope_type": "unheard_of"}}, "makes no model"),
        ({"quantization": {"bits": 4}}, "there is no 'group_size'"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "bits"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"torch_dtype": "auto"}, "--dtype"),
        ({"text_config": 3}, "makes no model"),
        ({"architectures": 3}, "makes no model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
    ],
)
def test_a_config_that_makes_no_model_is_named(changes, reason):
    with pytest.raises(ModelError, match=rf"my model.*{reason}"):
        costs_of_config(tiny_config("llama") | changes, name="my model")


def test_settings_that_are_missing_are_named():
    config = tiny_config("llama")
    del config["intermediate_size"]
    with pytest.raises(ModelError, match="'intermediate_size'"):
        costs_of_config(config, name="m")


def test_an_unproven_family_is_refused():
    with pytest.raises(FamilyError, match="kimi_k3"):
        costs_of_config({"model_type": "kimi_k3"}, name="m")
