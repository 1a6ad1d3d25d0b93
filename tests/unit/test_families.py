"""A model cut anywhere gives the very logits of the model in one piece.

And sequences that share a microbatch get the logits that each gets alone.
"""

import json

import mlx.core as mx
import pytest

from benchmarks.batches import Batches, check_batches
from benchmarks.families import Proof
from benchmarks.proof import ProofError, Rig, some_cuts
from benchmarks.tiny_models import Variant, variants, write_tiny_model
from mlx_dist.errors import FamilyError
from mlx_dist.model.families import family_of
from mlx_dist.model.files import find_model
from mlx_dist.model.verdicts import PROVEN, REFUSED, UNBATCHED, UNPADDED

FAMILIES = [
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "llama",
    "longcat_flash_ngram",
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


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNBATCHED])
def test_sequences_that_share_a_microbatch_get_their_own_logits(family, tmp_path):
    write_tiny_model(family, tmp_path)
    rig = Rig(tmp_path)
    check_batches(rig.model, rig.stages((1, 4, 8)), pads=family not in UNPADDED)


def test_padding_that_a_family_does_not_bear_is_noticed(tmp_path):
    write_tiny_model("mamba", tmp_path)
    rig = Rig(tmp_path)
    with pytest.raises(ProofError, match="sequence alone"):
        check_batches(rig.model, rig.stages((8,)), pads=True)


def test_one_sequence_in_the_place_of_another_is_noticed(tmp_path):
    write_tiny_model("llama", tmp_path)
    rig = Rig(tmp_path)
    stages = rig.stages((4, 8))
    batches = Batches(rig.model, stages)
    batches.open(0, [0, 1, 2])
    batches.step(0, [5, 11, 3])
    for cache in stages[1].slots.of(0, [0, 1, 2]):
        if not cache.empty():
            cache.filter(mx.array([1, 0, 2]))
    with pytest.raises(ProofError, match="sequence alone"):
        batches.decode(0, 1)


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
    assert not PROVEN & REFUSED.keys()
    assert UNBATCHED.keys() | UNPADDED.keys() <= PROVEN
    assert not UNBATCHED.keys() & UNPADDED.keys()


def test_less_than_is_on_record_is_noticed():
    assert not Proof("llama").does_less
    assert not Proof("kimi_k3", reason="it has several tensors").does_less
    assert Proof("llama", reason="its logits differ").does_less
    assert Proof("llama", unpadded="its logits differ").does_less
    assert Proof("llama", unbatched="it has no batches", unpadded="it has no batches").does_less
