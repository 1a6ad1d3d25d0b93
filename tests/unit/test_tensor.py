"""Slices of a model give the logits of the model in one piece, and hold and read no more."""

from itertools import pairwise

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.members import TOLERANCE, SlicedRig
from benchmarks.proof import ProofError, Rig
from benchmarks.tiny_models import NUM_LAYERS, Variant, write_tiny_model
from mlx_dist.cluster.placement import Slice
from mlx_dist.config import Dtype
from mlx_dist.errors import FamilyError
from mlx_dist.model import ranges, tensor, weights
from mlx_dist.model.files import find_model
from mlx_dist.model.tensor import Slicing
from mlx_dist.model.verdicts import PROVEN, SLICED
from mlx_dist.model.weights import load_stage
from tests.unit.test_hub_files import write_split

PLAIN = Variant("plain")
QUANTIZED = Variant("4-bit", quantize_bits=4)
MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
UNTIED = {"tie_word_embeddings": False}
EVEN = (1, 1, 1)
CASES = [
    ("deepseek_v3", PLAIN, EVEN),
    ("deepseek_v3", QUANTIZED, (2, 1)),
    ("gemma3_text", PLAIN, EVEN),
    ("glm4", PLAIN, (1, 1, 1, 1, 1)),
    ("gpt_oss", PLAIN, EVEN),
    ("gpt_oss", QUANTIZED, (3, 1)),
    ("llama", Variant("8 heads of keys", changes=MANY_HEADS), EVEN),
    ("llama", Variant("bfloat16, untied", dtype="bfloat16", changes=UNTIED), (2, 1, 1)),
    ("mixtral", PLAIN, (1, 3)),
    ("olmo2", PLAIN, EVEN),
    ("phi3", PLAIN, (1, 2, 1)),
    ("qwen2", PLAIN, EVEN),
    ("qwen3", Variant("8-bit", quantize_bits=8), EVEN),
    ("qwen3_moe", PLAIN, (1, 1, 1, 1)),
]


@pytest.mark.parametrize(
    ("family", "variant", "split"),
    CASES,
    ids=[f"{family}-{variant.name}-{len(split)}" for family, variant, split in CASES],
)
def test_slices_give_the_logits_of_one_piece(tmp_path, family, variant, split):
    write_tiny_model(family, tmp_path, variant)
    findings = SlicedRig(tmp_path, split).check(Rig(tmp_path), TOLERANCE[variant.dtype])
    # The norms are everyone's, and here and there a head, or a group of quantized weights.
    largest = max(split) / sum(split)
    assert max(findings.member_bytes) < (largest + 0.2) * findings.total_bytes


def test_sequences_that_share_a_microbatch_get_their_own_logits(tmp_path):
    write_tiny_model("qwen3", tmp_path)
    SlicedRig(tmp_path, (2, 1)).check_batches(pads=True)


def test_a_slice_in_the_place_of_another_is_noticed(tmp_path, monkeypatch):
    write_tiny_model("llama", tmp_path)
    cut_inputs = Slicing._cut_inputs

    def swapped(self, linear, path, range_, num_parts):
        cut_inputs(self, linear, path, (range_[0], range_[1]), num_parts)
        if path.endswith("layers.3.mlp.down_proj"):
            own = self.cuts[f"{path}.weight"]
            other = ((num_parts - range_[1], num_parts - range_[0]),)
            self.cuts[f"{path}.weight"] = type(own)(own.axis, other, num_parts)

    monkeypatch.setattr(Slicing, "_cut_inputs", swapped)
    with pytest.raises(ProofError, match="logits of slices"):
        SlicedRig(tmp_path, (1, 1)).check(Rig(tmp_path), TOLERANCE["float32"])


def test_a_part_that_no_rank_holds_is_noticed(tmp_path, monkeypatch):
    write_tiny_model("llama", tmp_path)
    apportion = tensor.parts

    def short(*arguments):
        *others, last = apportion(*arguments)
        return [*others, type(last)(last.start, last.end - 16)]

    monkeypatch.setattr(tensor, "parts", short)
    with pytest.raises(ProofError, match="hold"):
        SlicedRig(tmp_path, (1, 1))


def _slicing(folder, slice_):
    model, anatomy = weights.build(find_model(str(folder)), Dtype.auto)
    return Slicing(model, anatomy, slice_)


@pytest.fixture
def gathered_bytes(monkeypatch):
    """How many bytes are read as ranges, in a list of all of them."""
    gather, found = ranges._PartFile._gather, []

    def counted(self, target):
        found.append(len(target))
        gather(self, target)

    monkeypatch.setattr(ranges._PartFile, "_gather", counted)
    return found


# As uploaded, experts are tensors of their own, which mlx-lm stacks.
@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", PLAIN), ("llama", QUANTIZED), ("mixtral", PLAIN), ("qwen3_moe", PLAIN)],
    ids=["llama", "llama-4-bit", "mixtral", "qwen3_moe"],
)
def test_only_the_ranges_of_a_slice_are_read(tmp_path, gathered_bytes, family, variant):
    write_tiny_model(family, tmp_path / "whole", variant)
    files = find_model(str(write_split(family, tmp_path / "split", variant)))
    whole = mx.load(str(tmp_path / "whole" / "model.safetensors"))
    for place in range(2):
        slice_ = Slice(place, (2, 1))
        slicing = _slicing(tmp_path / "whole", slice_)
        gathered_bytes.clear()
        loaded = load_stage(files, 0, NUM_LAYERS, Dtype.auto, lambda _a, _b: None, slice_)
        held = dict(tree_flatten(loaded.model.parameters()))
        cut_bytes = 0
        for name, array in whole.items():
            expected = array
            if cut := slicing.cuts.get(name):
                borders = [border for each in cut.entries(array.shape[cut.axis]) for border in each]
                # Between the first border of a range and its second is what is kept.
                expected = mx.concatenate(mx.split(array, borders, cut.axis)[1::2], cut.axis)
                cut_bytes += expected.nbytes
            assert mx.array_equal(held[name], expected), name
        assert sum(gathered_bytes) == cut_bytes < loaded.weights_bytes
        whole_bytes = sum(whole[name].nbytes for name in whole if name not in slicing.cuts)
        assert loaded.weights_bytes == cut_bytes + whole_bytes


def test_a_half_of_a_stage_has_half_of_its_layers(tmp_path):
    write_tiny_model("llama", tmp_path)
    files = find_model(str(tmp_path))
    for start, end in pairwise((0, 3, NUM_LAYERS)):
        whole = load_stage(files, start, end, Dtype.bfloat16, lambda _a, _b: None)
        halves = [
            load_stage(files, start, end, Dtype.bfloat16, lambda _a, _b: None, Slice(p, (1, 1)))
            for p in range(2)
        ]
        norm_bytes = sum(
            array.nbytes
            for name, array in tree_flatten(whole.model.parameters())
            if "norm" in name and whole.anatomy.owns(name, start, end)
        )
        assert sum(half.weights_bytes for half in halves) == whole.weights_bytes + norm_bytes


def test_what_a_sequence_costs_is_found_without_a_sum(tmp_path, monkeypatch):
    """Else ranks would be in a sum while they talk of other things on the same wire."""
    write_tiny_model("llama", tmp_path)
    stage = Rig(tmp_path).stage(0, NUM_LAYERS)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "async_eval", lambda *_arrays: pytest.fail("something is computed"))
        assert stage.kv_cost().bytes_for(1) > 0


def test_a_bias_is_added_once(tmp_path):
    write_tiny_model("gpt_oss", tmp_path)
    slicings = [_slicing(tmp_path, Slice(place, EVEN)) for place in range(3)]
    for name in ("self_attn.o_proj.bias", "mlp.experts.down_proj.bias"):
        holders = [s for s in slicings if f"model.layers.0.{name}" not in s.dropped]
        assert len(holders) == 1


def test_a_part_that_nobody_has_looked_at_is_refused(tmp_path):
    write_tiny_model("llama", tmp_path)
    model, anatomy = weights.build(find_model(str(tmp_path)), Dtype.auto)
    model.layers[2].self_attn.novelty = mx.zeros((3,))
    with pytest.raises(FamilyError, match=r"does not know model\.layers\.2\.self_attn\.novelty"):
        Slicing(model, anatomy, Slice(0, (1, 1)))


@pytest.mark.parametrize("family", ["qwen3_next", "mamba", "phi", "nemotron-nas", "plamo"])
def test_a_family_that_is_not_proven_is_refused_by_name(tmp_path, family):
    write_tiny_model(family, tmp_path)
    files = find_model(str(tmp_path))
    with pytest.raises(FamilyError, match=f"'{family}' is not proven for tensor parallelism"):
        load_stage(files, 0, 2, Dtype.auto, lambda _a, _b: None, Slice(0, (1, 1)))
    model, anatomy = weights.build(files, Dtype.auto)
    with pytest.raises(FamilyError, match="does not know"):
        Slicing(model, anatomy, Slice(0, (1, 1)))


def test_sliced_families_are_proven_ones():
    assert {family for family, _, _ in CASES} <= SLICED <= PROVEN
