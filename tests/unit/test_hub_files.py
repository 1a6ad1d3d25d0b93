"""Which files of a model on the hub a stage needs, and what the files it lacks are good for."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from benchmarks.tiny_models import NUM_LAYERS, Variant, write_tiny_model
from mlx_dist.config import Dtype
from mlx_dist.errors import ModelError
from mlx_dist.model import files as model_files
from mlx_dist.model import weights
from mlx_dist.model.files import find_model
from mlx_dist.model.weights import load_stage

PLAIN = Variant("plain")
STAGES = [(0, 8), (0, 3), (3, 5), (5, 8), (7, 8), (2, 3)]


def _as_uploaded(family, tensors):
    """The tensors as a checkpoint of this family names them before mlx-lm stacks or renames."""
    for name, array in tensors.items():
        if family == "mixtral" and ".switch_mlp." in name:
            own = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
            before, _, (kind, rest) = *name.partition(".switch_mlp.")[:2], name.split(".")[-2:]
            for i, expert in enumerate(array):
                yield f"{before}.experts.{i}.{own[kind]}.{rest}", expert
        elif family == "qwen3_moe" and ".switch_mlp." in name:
            before, _, after = name.partition(".switch_mlp.")
            for i, expert in enumerate(array):
                yield f"{before}.experts.{i}.{after}", expert
        elif family == "qwen3_vl":
            renamed = name.replace("language_model.model.", "model.language_model.")
            yield renamed.removeprefix("language_model."), array
        else:
            yield name, array


def _file_of(name):
    layer = name.partition(".layers.")[2].partition(".")[0]
    if layer:
        return f"model-layer-{layer}.safetensors"
    return "model-embed.safetensors" if "embed_tokens" in name else "model-head.safetensors"


def write_split(family, folder, variant=PLAIN):
    """A tiny model as uploaded, a file for each layer, one for the embedding, one for the rest."""
    write_tiny_model(family, folder, variant)
    path = folder / "model.safetensors"
    tensors = dict(_as_uploaded(family, mx.load(str(path))))
    mx.eval(tensors)
    path.unlink()
    weight_map = {name: _file_of(name) for name in tensors}
    for file in set(weight_map.values()):
        part = {name: array for name, array in tensors.items() if weight_map[name] == file}
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _as_on_hub(files):
    """The model as it looks to a host that has none of its weights."""
    absent = tuple(replace(file, path=None) for file in files.weights)
    return replace(files, repo="owner/model", revision="0" * 40, weights=absent)


def _load(files, start, end):
    return load_stage(files, start, end, Dtype.auto, lambda _done, _total: None)


def _own_weights(loaded, start, end):
    parameters = tree_flatten(loaded.model.parameters())
    return {name: array for name, array in parameters if loaded.anatomy.owns(name, start, end)}


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", Variant("untied", changes={"tie_word_embeddings": False})),
        ("llama", Variant("tied", changes={"tie_word_embeddings": True})),
        ("llama", Variant("4-bit", quantize_bits=4)),
        ("mixtral", PLAIN),
        ("qwen3_moe", PLAIN),
        ("qwen3_vl", PLAIN),
    ],
    ids=str,
)
def test_a_stage_needs_the_files_of_its_layers(tmp_path, monkeypatch, family, variant, stage):
    start, end = stage
    files = find_model(str(write_split(family, tmp_path, variant)))
    fetched = set()

    def download(_repo, name, revision):
        fetched.add(name)
        return str(tmp_path / name)

    monkeypatch.setattr(model_files, "hf_hub_download", download)
    loaded = _load(_as_on_hub(files), start, end)
    whole = _load(files, start, end)
    expected, got = _own_weights(whole, start, end), _own_weights(loaded, start, end)
    assert set(got) == set(expected)
    assert all(mx.array_equal(got[name], expected[name]) for name in expected)
    needed = {f"model-layer-{i}.safetensors" for i in range(start, end)}
    is_tied = not any("lm_head" in name for name, _ in tree_flatten(whole.model.parameters()))
    # Where names differ, what has no layer's number is one group, for the first and the last.
    is_end = start == 0 or end == NUM_LAYERS
    if start == 0 or (is_end and (is_tied or family == "qwen3_vl")):
        needed.add("model-embed.safetensors")
    if end == NUM_LAYERS or (is_end and family == "qwen3_vl"):
        needed.add("model-head.safetensors")
    assert fetched == needed


def test_the_scales_of_the_head_go_with_it(tmp_path):
    files = find_model(str(write_split("llama", tmp_path)))
    scales = b'{"lm_head.weight_scale_inv":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    other = model_files.WeightFile("model-scales.safetensors", scales, 12 + len(scales), None)
    _, anatomy = weights.build(files, Dtype.auto)
    files = replace(files, weights=(*files.weights, other))
    for own, is_needed in (({"lm_head.weight"}, True), ({"model.embed_tokens.weight"}, False)):
        needed = weights._files_needed(files, own, anatomy, 0, 0)
        assert (other.name in needed) is is_needed


@pytest.mark.parametrize(
    ("family", "name", "num_raw"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe.switch_mlp.up_proj.weight", 4),
        ("mixtral", "model.layers.2.self_attn.q_proj.weight", 1),
        ("qwen3_vl", "language_model.model.layers.2.mlp.up_proj.weight", 1),
    ],
)
def test_a_tensor_is_made_of_those_that_were_uploaded(tmp_path, family, name, num_raw):
    files = _as_on_hub(find_model(str(write_split(family, tmp_path))))
    made_of, _ = weights.raw_tensors_of(files, 2, 4, Dtype.auto)
    assert len(made_of[name]) == num_raw
    assert all(".layers.2." in raw for raw in made_of[name])
    assert {raw for raws in made_of.values() for raw in raws} == {
        name
        for file in files.weights
        for name in file.tensors()
        if ".layers.2." in name or ".layers.3." in name
    }


def test_a_file_that_was_fetched_before_is_used_if_it_is_the_same(tmp_path, monkeypatch):
    files = find_model(str(write_split("llama", tmp_path)))
    monkeypatch.setattr(
        model_files,
        "try_to_load_from_cache",
        lambda _repo, name, revision: str(tmp_path / name) if "layer-2" in name else None,
    )
    absent = [replace(file, path=None) for file in files.weights]
    larger = [replace(file, size_bytes=file.size_bytes + 1) for file in absent]

    def found(name, weights):
        described = model_files.find_described(name, tmp_path, weights, "version")
        assert described.fingerprint() == "version"
        return [file.name for file in described.weights if file.path is not None]

    assert found("owner/model", absent) == ["model-layer-2.safetensors"]
    assert found("owner/model", larger) == []
    assert found("/a/folder", absent) == []


def test_the_hub_is_not_asked_where_it_must_not_be(monkeypatch):
    monkeypatch.setattr(model_files, "_find_on_hub", lambda *_args: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="owner/model is no folder here"):
        find_model("owner/model", asks_hub=False)


def test_a_tensor_that_is_not_here_cannot_be_read(tmp_path):
    files = _as_on_hub(find_model(str(write_split("llama", tmp_path))))
    model, anatomy = weights.build(files, Dtype.auto)
    assert anatomy.num_layers == NUM_LAYERS
    arrays = tree_flatten(model.parameters())
    assert len(arrays) > NUM_LAYERS
    for _name, array in arrays:
        with pytest.raises(RuntimeError, match="Unable to read"):
            mx.eval(array)


def test_nor_while_the_model_is_built(tmp_path, monkeypatch):
    """A family that looks at values while renaming must not see zeros."""
    from mlx_lm.models import llama

    def look(_self, tensors):
        mx.eval(tensors)
        return tensors

    files = find_model(str(write_split("llama", tmp_path)))
    monkeypatch.setattr(llama.Model, "sanitize", look)
    weights.build(files, Dtype.auto)
    with pytest.raises(ModelError, match=r"does not load.*Unable to read"):
        weights.build(_as_on_hub(files), Dtype.auto)


def test_a_stage_does_not_load_without_a_file_it_needs(tmp_path, monkeypatch):
    files = find_model(str(write_split("llama", tmp_path)))
    monkeypatch.setattr(weights, "_files_needed", lambda *_args: frozenset())
    with pytest.raises(ModelError, match=r"tensor .* cannot be read"):
        _load(_as_on_hub(files), 0, 1)


@pytest.mark.parametrize(
    "name", ["./x", "../x", "~/x/y", "x/..", "a/b/c", "a", "a/", "/a", "a b/c", "a/b\n", "ä/b", ""]
)
def test_what_is_no_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr(model_files, "_find_on_hub", lambda *_args: pytest.fail("asked the hub"))
    with pytest.raises(ModelError):
        find_model(name)


@pytest.mark.parametrize("name", ["a/b", "mlx-community/Qwen3-0.6B-4bit", "_a/b.c_d-e"])
def test_what_is_a_hub_id_is_asked_for(monkeypatch, name):
    monkeypatch.setattr(model_files, "_find_on_hub", lambda asked, _proven: asked)
    assert find_model(name) == name


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "model/../../x.safetensors", "evil.py", "model.bin"],
)
def test_an_index_names_only_weight_files_beside_it(tmp_path, file):
    write_tiny_model("llama", tmp_path)
    index = {"weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no model"):
        find_model(str(tmp_path))
