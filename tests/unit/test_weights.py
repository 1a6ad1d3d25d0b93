"""Files are checked before they are trusted, and a stage reads its own tensors only."""

import json
import shutil
import struct
from dataclasses import replace

import mlx.core as mx
import pytest

from benchmarks.tiny_models import Variant, write_tiny_model
from mlx_dist.cluster.placement import cut
from mlx_dist.config import Dtype
from mlx_dist.errors import FamilyError, ModelError
from mlx_dist.model import weights
from mlx_dist.model.files import find_model
from mlx_dist.model.weights import load_stage


def _load(folder, start, end, dtype=Dtype.auto):
    return load_stage(find_model(str(folder)), start, end, dtype, lambda _a, _b: None)


@pytest.fixture
def model(tmp_path):
    write_tiny_model("llama", tmp_path / "model")
    return tmp_path / "model"


def _tensor_bytes(folder, prefix):
    """Bytes in the file of the tensors whose names begin with `prefix`."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name.startswith(prefix)
    )


VARIANTS = [
    Variant("plain"),
    Variant("tied", changes={"tie_word_embeddings": True}),
    Variant("4-bit", quantize_bits=4),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_rank_holds_the_bytes_of_its_own_layers(tmp_path, num_ranks, variant):
    write_tiny_model("llama", tmp_path, variant)
    num_layers = json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"]
    layers = [_tensor_bytes(tmp_path, f"model.layers.{i}.") for i in range(num_layers)]
    embedding = _tensor_bytes(tmp_path, "model.embed_tokens.")
    norm_and_head = _tensor_bytes(tmp_path, "model.norm.") + _tensor_bytes(tmp_path, "lm_head.")
    is_tied = not _tensor_bytes(tmp_path, "lm_head.")
    for start, end in cut(num_layers, num_ranks, None):
        is_first, is_last = start == 0, end == num_layers
        expected = sum(layers[start:end])
        expected += embedding if is_first or (is_last and is_tied) else 0
        expected += norm_and_head if is_last else 0
        assert _load(tmp_path, start, end).weights_bytes == expected
    assert sum(layers) + embedding + norm_and_head == _tensor_bytes(tmp_path, "")


def test_dtype_converts_while_loading(model):
    full = _load(model, 0, 2)
    half = _load(model, 0, 2, Dtype.bfloat16)
    assert half.weights_bytes * 2 == full.weights_bytes
    assert set(half.anatomy.hidden_dtypes) == {mx.bfloat16}


def test_progress_ends_with_all_bytes(model):
    seen = []
    loaded = load_stage(find_model(str(model)), 0, 1, Dtype.auto, lambda *p: seen.append(p))
    assert seen[-1] == (loaded.weights_bytes, loaded.weights_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("ahead_bytes", [0, 20_000, 1 << 30])
def test_few_bytes_are_read_at_a_time(model, monkeypatch, ahead_bytes):
    monkeypatch.setattr(weights, "_AHEAD_BYTES", ahead_bytes)
    stage = weights.open_stage(find_model(str(model)), 0, 2, Dtype.auto)
    sizes = [array.nbytes for array in stage.own.values()]
    begun = []
    begin = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda array: (begin(array), begun.append(array.nbytes)))
    done = []
    for num_bytes in stage.read():
        under_way = begun[len(done) :]
        assert len(under_way) == 1 or sum(under_way) <= ahead_bytes
        done.append(num_bytes)
    assert done == begun == sizes


def test_a_failure_is_told_once_and_not_of_what_comes_next(model):
    files = find_model(str(model))
    gone = tuple(replace(file, path=None) for file in files.weights)
    for _ in range(5):
        with pytest.raises(ModelError, match="cannot be read"):
            load_stage(replace(files, weights=gone), 0, 2, Dtype.auto, lambda _a, _b: None)
        for _ in range(3):
            mx.eval(mx.ones((3,)) + 1)


def test_a_tensor_is_made_of_those_that_files_hold(model):
    made_of, _ = weights.raw_tensors_of(find_model(str(model)), 2, 4, Dtype.bfloat16)
    assert made_of == {name: (name,) for name in made_of}
    assert {name.split(".")[2] for name in made_of} == {"2", "3"}


def _edit_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def test_a_truncated_file_is_named(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or was cut off"):
        find_model(str(model))


@pytest.mark.parametrize(
    "data",
    [b"", b"short", struct.pack("<Q", 1 << 60), struct.pack("<Q", 5) + b"{abcd", b"\xff" * 100],
)
def test_a_corrupt_header_is_named(model, data):
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        find_model(str(model))


def test_a_header_with_offsets_beyond_the_file_is_named(model):
    def widen(header):
        header["model.norm.weight"]["data_offsets"] = [0, 1 << 40]
        return header

    _edit_header(model / "model.safetensors", widen)
    with pytest.raises(ModelError, match="was cut off"):
        find_model(str(model))


def test_a_missing_tensor_is_named(model):
    path = str(model / "model.safetensors")
    tensors = mx.load(path)
    tensors.pop("model.layers.3.mlp.up_proj.weight")
    mx.eval(tensors)
    mx.save_safetensors(path, tensors, {"format": "mlx"})
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        _load(model, 0, 1)


def test_a_file_that_the_index_names_must_be_there(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        find_model(str(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        find_model(str(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_a_damaged_config_is_named(model, text):
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model(str(model))


def test_a_config_that_does_not_fit_the_weights_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 999}))
    with pytest.raises(ModelError, match="does not load"):
        _load(model, 0, 1)


def test_code_that_comes_with_a_model_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(ModelError, match=r"runs no such code"):
        find_model(str(model))


def test_an_unproven_family_is_refused_by_name(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(FamilyError, match="'nonesuch'"):
        find_model(str(model))


@pytest.mark.parametrize("name", ["/no/such/folder", "a b", "a/b/c"])
def test_a_model_that_is_nowhere_is_named(name):
    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        find_model(name)


def test_a_folder_without_weights_is_named(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        find_model(str(model))


def test_equal_models_have_equal_fingerprints_and_others_do_not(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert find_model(str(copy)).fingerprint() == find_model(str(model)).fingerprint()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert find_model(str(copy)).fingerprint() != find_model(str(model)).fingerprint()
