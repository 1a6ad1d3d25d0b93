"""A model's folder may hold anything: it is refused in one line, or does no harm."""

import json
import os
import pickle  # noqa: TID251
import resource
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.tiny_models import write_tiny_model
from mlx_dist.config import Dtype
from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import MlxDistError, ModelError
from mlx_dist.model.bounds import check_config
from mlx_dist.model.costing import costs_of_config
from mlx_dist.model.files import find_model
from mlx_dist.model.weights import load_stage

WEIGHTS = "model.safetensors"


def load(folder):
    """All that a rank and the leader do with a model's files."""
    files = find_model(str(folder))
    loaded = load_stage(files, 0, 1, Dtype.auto, lambda _done, _total: None)
    return loaded, Tokenizer(files.folder, files.config)


def refusal(folder):
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as refused:
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


@pytest.fixture(scope="module")
def config():
    return json.loads((MODEL_DIR / "config.json").read_text())


# config.json.

CONFIGS = {
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "more layers than tensors": ({"num_hidden_layers": 4000}, "its files have 56 tensors"),
    "a vocabulary without end": ({"vocab_size": 10**12}, "vocab_size = 1e\\+12"),
    "a number without end": ({"hidden_size": 10**4000}, "hidden_size = 1e300"),
    "heads without end": ({"num_attention_heads": 10**9}, "num_attention_heads"),
    "what no llama has": ({"num_loops": 10**9}, "num_loops"),
    "in a part": ({"text_config": {"n_routed_experts": 10**9}}, "n_routed_experts"),
    "in a list": ({"block_sizes": [1, 10**12]}, "block_sizes"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = NaN"),
    "text for a number": ({"num_hidden_layers": "6"}, "does not load"),
    "text for a size": ({"hidden_size": "96"}, "does not load"),
    "a negative size": ({"hidden_size": -96}, "does not load"),
    "another size": ({"hidden_size": 2**31 - 1}, "does not load"),
    "a fraction": ({"num_hidden_layers": 1.5}, "does not load"),
    "nothing": ({"hidden_size": None}, "does not load"),
    "a list": ({"vocab_size": [1]}, "does not load"),
    "an object": ({"rope_theta": {}}, "does not load"),
    "no tokens": ({"eos_token_id": [{}]}, "no token for eos_token_id"),
    "text for tokens": ({"eos_token_id": "<|end|>"}, "no token for eos_token_id"),
    "a module's path": ({"model_type": "../../evil"}, "'../../evil' is not proven"),
    "a module": ({"model_type": "os.path"}, "'os.path' is not proven"),
    "code": ({"model_file": "../../evil.py"}, "runs no such code"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(model, config, case):
    changes, words = CONFIGS[case]
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=words):
        load(model)
    assert refusal(model)


TEXTS = {
    "deep": '{"a":' * 100_000,
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep and whole": '{"a":' * 900 + "1" + "}" * 900,
    "a number of many digits": '{"model_type": "llama", "a": ' + "9" * 5000 + "}",
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "a key of no use": '{"model_type": {"a": 1}}',
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_config_is_refused_or_harmless(model, name, case):
    text = TEXTS[case]
    (model / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        load(model)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert name == "generation_config.json"


def test_of_a_key_that_comes_twice_the_last_counts(model, config):
    text = json.dumps(config)
    (model / "config.json").write_text(f'{{"num_hidden_layers": 1000000000, {text[1:]}')
    assert load(model)
    (model / "config.json").write_text(f'{text[:-1]}, "num_hidden_layers": 1000000000}}')
    assert "num_hidden_layers" in refusal(model)


def test_a_config_alone_builds_nothing_without_end(config):
    """`mlx-dist plan` needs no files but this."""
    with pytest.raises(ModelError):
        check_config(config | {"num_hidden_layers": 10**9}, Path("config.json"))
    huge = config | {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "head_dim": 1 << 16}
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert costs_of_config(huge, name="huge").weights_bytes(0, 6) > 1 << 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def test_what_real_models_have_is_not_refused():
    check_config(
        {
            "model_type": "deepseek_v3",
            "num_hidden_layers": 128,
            "n_routed_experts": 1024,
            "num_attention_heads": 256,
            "vocab_size": 262_208,
            "num_embeddings": 262_208,
            "rope_theta": 10**11,
            "max_position_embeddings": 10**10,
            "time_step_limit": [0.0, float("inf")],
            "pad_token_id": -1,
            "eos_token_id": [1, 106],
            "sliding_window": None,
            "vision_config": {"image_size": 10**12, "x": float("nan")},
        },
        Path("config.json"),
    )


# What else lies in the folder.


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", WEIGHTS, f"{WEIGHTS}.index.json"],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused(model, name, kind):
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).mkdir()
    else:
        (model / name).symlink_to("/dev/zero")
    assert f"{name} is no file" in refusal(model)


def test_a_link_to_itself_is_refused(model):
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model / WEIGHTS)
    assert WEIGHTS in refusal(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "added_tokens.json"])
def test_a_small_file_that_is_large_is_refused(model, name):
    os.truncate(model / name, 1 << 40) if (model / name).exists() else None
    with (model / name).open("ab") as stream:
        stream.truncate(1 << 40)
    assert f"{name} has 1048576 MiB" in refusal(model)


class _Evil:
    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "model.bin",
    "model.safetensors.pkl",
    "tokenizer.pkl",
    "vocab.pkl",
    "tokenizer.model.pkl",
    "training_args.bin",
    "adapter_model.bin",
)


def test_no_pickle_is_ever_opened_and_no_code_runs(model, config, tmp_path, monkeypatch):
    marker = tmp_path / "made by the model"
    evil = pickle.dumps(_Evil(marker))
    for name in PICKLES:
        (model / name).write_bytes(evil)
    code = f"import os; os.mkdir({str(marker)!r})"
    for name in ("modeling_llama.py", "tokenization_own.py", "sitecustomize.py", "llama.py"):
        (model / name).write_text(code)
    auto_map = {"AutoConfig": "modeling_llama.Config", "AutoModelForCausalLM": "modeling_llama.M"}
    (model / "config.json").write_text(
        json.dumps(config | {"auto_map": auto_map, "trust_remote_code": True})
    )
    monkeypatch.chdir(model)
    assert load(model)
    assert not marker.exists()
    # They are not even taken for weights where there are no others.
    (model / WEIGHTS).unlink()
    assert "has no model*.safetensors" in refusal(model)
    (model / WEIGHTS).write_bytes(evil)
    assert WEIGHTS in refusal(model)
    assert not marker.exists()
    pickle.loads(evil)  # noqa: S301
    assert marker.exists()


# Weights.


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def changed(**changes):
    def change(header):
        header["model.norm.weight"] |= changes
        return header

    return change


HEADERS = {
    "negative offsets": changed(data_offsets=[-384, 0]),
    "offsets that overlap": changed(data_offsets=[4, 388]),
    "offsets that run back": changed(data_offsets=[384, 0]),
    "offsets beyond all": changed(data_offsets=[0, 2**64 - 1]),
    "offsets that are no numbers": changed(data_offsets=["0", "384"]),
    "a huge shape": changed(shape=[2**40]),
    "a shape whose product is none": changed(shape=[2**32, 2**32]),
    "a shape whose product is right again": changed(shape=[2**63, 2, 96]),
    "a negative shape": changed(shape=[-96]),
    "a shape that is too wide for MLX": lambda header: (
        header | {"x": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}
    ),
    "a shape of many dimensions": changed(shape=[96] + [1] * 100_000),
    "no such dtype": changed(dtype="X99"),
    "a dtype that MLX has not": changed(dtype="F64", shape=[48]),
    "no dtype": lambda header: header | {"model.norm.weight": {"shape": [96]}},
    "no tensor": lambda header: header | {"model.norm.weight": 3},
    "a list": lambda header: [header],
    "deep": lambda _header: b'{"a":' * 100_000,
    "deep in what is said of it": lambda header: header | {"__metadata__": {"a": [[[]]]}},
    "no UTF-8": lambda header: json.dumps(header).encode().replace(b"norm", b"\xff\xfe\xfd\xfc"),
    "a name twice": lambda header: (
        json.dumps(header).encode()[:-1]
        + b', "model.norm.weight": {"dtype": "F32", "shape": [96], "data_offsets": [4, 388]}}'
    ),
    "a name that is a path": lambda header: header | {"../../x": header.pop("model.norm.weight")},
    "a name of many parts": lambda header: (
        header | {".".join("a" * 50_000): header.pop("model.norm.weight")}
    ),
    "a layer far away": lambda header: (
        header | {"model.layers.999999999.x": header.pop("model.norm.weight")}
    ),
    "nothing": lambda _header: {},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(model, case):
    header, data = header_of(model / WEIGHTS)
    write_header(model / WEIGHTS, HEADERS[case](header), data)
    assert refusal(model)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_lies_of_its_length_is_refused(model, length):
    header, data = header_of(model / WEIGHTS)
    write_header(model / WEIGHTS, header, data, length)
    assert WEIGHTS in refusal(model)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "model/../../x.safetensors", "", 3, None, "."]
)
def test_an_index_that_leads_elsewhere_is_refused(model, name):
    index = {"weight_map": {"a": WEIGHTS, "b": name}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "index.json" in refusal(model)


def test_a_deep_index_is_refused(model):
    (model / f"{WEIGHTS}.index.json").write_text('{"weight_map":' * 100_000)
    assert "index.json is damaged" in refusal(model)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_header_with_any_bytes_changed_is_refused_or_harmless(model, data):
    original = (MODEL_DIR / WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", original)
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, length + 7))] = data.draw(st.integers(0, 255))
    (model / WEIGHTS).write_bytes(changed)
    try:
        load(model)
    except MlxDistError as error:
        assert "\n" not in str(error)


# Tokenizers.


def changed_tokenizer(**changes):
    return lambda tokenizer: tokenizer | changes


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKENIZERS = {
    "a deep pattern": changed_tokenizer(pre_tokenizer=_split("(" * 9999 + ")" * 9999)),
    "a broken pattern": changed_tokenizer(pre_tokenizer=_split("(")),
    "a pattern without end": changed_tokenizer(
        pre_tokenizer=_split("(?:" * 20 + "a" + "{1,9999})" * 20)
    ),
    "no such part": changed_tokenizer(pre_tokenizer={"type": "Evil"}),
    "deep parts": lambda _: '{"model":' * 100_000,
    "a deep sequence": changed_tokenizer(
        normalizer=json.loads('{"type":"Sequence","normalizers":[' * 150 + "]}" * 150)
    ),
    "a token beyond all": lambda tokenizer: (
        tokenizer | {"added_tokens": [tokenizer["added_tokens"][0] | {"id": 2**40}]}
    ),
    "a negative token": lambda tokenizer: (
        tokenizer | {"added_tokens": [tokenizer["added_tokens"][0] | {"id": -1}]}
    ),
    "an empty token": lambda tokenizer: (
        tokenizer | {"added_tokens": [tokenizer["added_tokens"][0] | {"content": ""}]}
    ),
    "one text for two tokens": lambda tokenizer: (
        tokenizer
        | {"added_tokens": [t | {"content": "<|same|>"} for t in tokenizer["added_tokens"]]}
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_refused_or_harmless(model, case, capfd):
    path = model / "tokenizer.json"
    made = TOKENIZERS[case](json.loads(path.read_text()))
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        _loaded, tokenizer = load(model)
        tokenizer.encode_prompt("Hello there, 12 of you.", None)
        tokenizer.check_vocabulary(768)
    except MlxDistError as error:
        assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "os.system"},
        {"tokenizer_class": "../../evil"},
        {"auto_map": {"AutoTokenizer": ["evil--own.Own", None]}},
        {"model_max_length": -1},
        {"chat_template": {"default": "{{ 1 }}"}},
        {"chat_template": [{"name": "default", "template": 3}]},
        {"tool_parser_type": "../../evil"},
        {"chat_template_type": "os"},
        {"eos_token": {"content": "x" * 100_000}},
        {"added_tokens_decoder": {"999999999": {"content": "<|far|>", "special": True}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_a_tokenizer_are_refused_or_harmless(model, changes):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    try:
        _loaded, tokenizer = load(model)
        tokenizer.encode_prompt("Hello", None)
        tokenizer.check_vocabulary(768)
    except MlxDistError as error:
        assert "\n" not in str(error)


def test_other_families_bear_it_too(tmp_path):
    write_tiny_model("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"num_experts": 10**9}, {"num_experts": "a"}, {"moe_intermediate_size": -1}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError):
            find = find_model(str(tmp_path))
            load_stage(find, 0, 1, Dtype.auto, lambda _done, _total: None)
