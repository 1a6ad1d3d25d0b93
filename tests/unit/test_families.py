"""A model cut anywhere gives the very logits of the model in one piece."""

import json

import mlx.core as mx
import pytest

from benchmarks.families import ProofError, Rig, some_cuts
from benchmarks.tiny_models import Variant, variants, write_tiny_model
from mlx_dist.errors import FamilyError
from mlx_dist.model.families import family_of
from mlx_dist.model.files import find_model
from mlx_dist.model.verdicts import PROVEN, REFUSED

FAMILIES = [
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "llama",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
]
VARIANTS = [
    (family, variant)
    for family in ("llama", "qwen3")
    for variant in variants(family)
    if variant.name != "plain"
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cut_gives_the_same_logits(family, tmp_path):
    write_tiny_model(family, tmp_path)
    rig = Rig(tmp_path)
    rig.check_every_cut()
    rig.check_sensitive()


@pytest.mark.parametrize(
    ("family", "variant"), VARIANTS, ids=lambda case: getattr(case, "name", case)
)
def test_every_kind_of_weights_gives_the_same_logits(family, variant, tmp_path):
    write_tiny_model(family, tmp_path, variant)
    rig = Rig(tmp_path)
    for cut in some_cuts(rig.num_layers):
        rig.check(cut)


def test_a_wrong_order_of_layers_is_noticed(tmp_path):
    write_tiny_model("llama", tmp_path)
    rig = Rig(tmp_path)
    first, second, third, last = (rig.stage(a, b) for a, b in ((0, 2), (2, 3), (3, 4), (4, 8)))
    right = next(rig.logits([first, second, third, last], 1))
    wrong = next(rig.logits([first, third, second, last], 1))
    assert mx.array_equal(right, rig.expected_BLV[0])
    assert not mx.array_equal(wrong, rig.expected_BLV[0])


def test_a_stage_that_lacks_a_weight_is_noticed(tmp_path):
    write_tiny_model("llama", tmp_path)
    rig = Rig(tmp_path)
    stage = rig.stage(0, 4)
    stage._layers[2].mlp.down_proj.weight *= mx.array(float("nan"))
    with pytest.raises(ProofError, match="not its own"):
        rig.check((4, 8))


def test_an_unproven_family_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k3"}))
    with pytest.raises(FamilyError, match="kimi_k3"):
        find_model(str(tmp_path))
    with pytest.raises(FamilyError, match="no such family"):
        family_of({"model_type": "unheard_of"})
    with pytest.raises(FamilyError, match="no model_type"):
        family_of({})


def test_layers_that_share_keys_and_values_are_refused(tmp_path):
    write_tiny_model(
        "gemma4_text", tmp_path, Variant("shared", changes={"num_kv_shared_layers": 3})
    )
    with pytest.raises(FamilyError, match="than its output"):
        Rig(tmp_path)


def test_the_verdicts_do_not_contradict_each_other():
    assert set(FAMILIES) <= PROVEN
    assert not PROVEN & set(REFUSED)
