"""`mlx-dist verify` finds the placement equal to one process, and finds what is not."""

import json
import math
import shutil
import struct

import numpy as np
import pytest

from benchmarks.tiny_models import Variant, write_tiny_model
from mlx_dist.demo import MODEL_DIR
from mlx_dist.verify import _compare
from tests.launching import mlx_dist, program


def test_every_world_is_equal_to_one_process(spmd_ranks):
    done = mlx_dist("verify", num_ranks=spmd_ranks)
    assert (done.code, done.out) == (0, "equal\n"), done.err


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("gemma3_text", Variant("plain")),
        ("gpt_oss", Variant("plain")),
        ("qwen3_next", Variant("plain")),
        ("deepseek_v3", Variant("plain")),
        ("llama", Variant("4-bit", quantize_bits=4)),
        ("qwen3", Variant("bfloat16", dtype="bfloat16")),
        ("qwen3", Variant("8-bit", quantize_bits=8)),
        ("llama", Variant("bfloat16", dtype="bfloat16")),
    ],
    ids=lambda value: value.name if isinstance(value, Variant) else value,
)
def test_families_are_equal_over_three_ranks(tmp_path, family, variant):
    model = _with_tokenizer(tmp_path / "model", family, variant)
    done = mlx_dist("verify", "--model", model, "--json", num_ranks=3)
    prompts = done.json()["prompts"]
    assert len(prompts) == 3
    for prompt in prompts:
        assert prompt["is_equal"]
        assert (prompt["logits"], prompt["layers"], prompt["first_token"]) == (0, {}, None)


def test_a_group_is_equal_within_rounding():
    done = mlx_dist("verify", "--parallel", "tensor", "--json", num_ranks=2)
    for prompt in done.json()["prompts"]:
        assert prompt["is_equal"]
        assert 0 < prompt["relative"] < prompt["rounding"] == 1e-5
        assert (prompt["layers"], prompt["first_token"]) == ({}, None)


def test_rounding_excuses_small_differences_and_near_ties_only():
    logits = np.array([1, 0.5, -2], np.float32)
    rounded, far = logits + np.float32(1e-5), logits + np.float32(1e-3)

    def compare(own, token=0, rounding=1e-5):
        return _compare("", [0, token], [0, 0], [[own, own]], [[logits, logits]], rounding, 3)

    fine = compare(rounded)
    assert fine.is_equal
    assert fine.relative == pytest.approx(5e-6, rel=0.1)
    assert not compare(rounded, rounding=0.0).is_equal
    assert not compare(far).is_equal
    assert compare(far).layers == {0: pytest.approx(1e-3, rel=0.1)}
    assert not compare(rounded, token=1).is_equal
    tie = np.array([1, 1 - 1e-6, -2], np.float32)
    close = _compare("", [0, 1], [0, 0], [[tie, tie]], [[tie, tie]], 1e-5, 3)
    assert close.is_equal
    assert close.is_near_tie


def test_a_leader_without_room_for_the_whole_model_ends_all():
    done = program("no_whole_model", num_ranks=2, timeout_s=30)
    assert done.code == 1
    [line] = done.error_lines
    assert "one process cannot load the whole model: no room" in line


def test_a_prompt_may_look_like_markup():
    done = mlx_dist("verify", "--prompt", "[/b] [bold]", "--prompt", "Hello", num_ranks=2)
    assert (done.code, done.out) == (0, "equal\n"), done.err
    assert "[/b]" in done.err


def test_not_a_number_is_a_difference():
    fine, broken = np.zeros(3, np.float32), np.array([0, np.nan, 0], np.float32)
    for wrong in (broken, -np.array([np.inf, 0, 0], np.float32)):
        comparison = _compare(
            "", [1, 2, 3], [1, 2, 3], [[fine, fine], [wrong, fine]], [[fine, fine], [fine, fine]]
        )
        assert not comparison.is_equal
        assert comparison.layers == {0: math.inf}


def test_a_changed_weight_is_found_in_its_layer(tmp_path):
    """Rank 1 has another layer 4, changed where no quick comparison of files looks."""
    other = shutil.copytree(MODEL_DIR, tmp_path / "other")
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    start, end = header["model.layers.4.mlp.down_proj.weight"]["data_offsets"]
    start, end = start + 8 + header_bytes, end + 8 + header_bytes
    assert not start - 4096 < len(data) // 2 < end
    weight = np.frombuffer(data[start:end], np.float32) * np.float32(1.5)
    data[start:end] = weight.tobytes()
    path.write_bytes(data)
    done = program("own_model", MODEL_DIR, other, "--", "verify", num_ranks=2)
    assert done.code == 1
    assert done.out == "DIFFERENT\n"
    done = program("own_model", MODEL_DIR, other, "--", "verify", "--json", num_ranks=2)
    for prompt in json.loads(done.out)["prompts"]:
        assert not prompt["is_equal"]
        assert set(prompt["layers"]) == {"4", "5"}
        assert prompt["logits"] > 0


def _with_tokenizer(folder, family, variant):
    """A random model of `family` with the embedded model's tokenizer and vocabulary."""
    vocabulary = Variant(
        variant.name, variant.dtype, variant.quantize_bits, {"vocab_size": 768} | variant.changes
    )
    write_tiny_model(family, folder, vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return folder
