"""Bad input under mpirun: one clear error, a non-zero code, no traceback, no hang."""

import json
import shutil

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.launching import mlx_dist, program


def _refused(*arguments, num_ranks=2):
    prompt = () if "--prompt" in arguments else ("--prompt", "Hello")
    done = mlx_dist("generate", *prompt, *arguments, num_ranks=num_ranks, timeout_s=45)
    assert done.code not in (0, None)
    assert "Traceback" not in done.err
    assert done.out == ""
    [line] = done.error_lines
    return line


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def _change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_a_missing_model():
    assert "/no/such/model" in _refused("--model", "/no/such/model", num_ranks=3)


def test_a_truncated_file(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    assert "was cut off" in _refused("--model", model)


def test_a_tokenizer_that_is_missing(model):
    (model / "tokenizer.json").unlink()
    line = _refused("--model", model)
    assert "rank 0 (" in line
    assert "the tokenizer in" in line


def test_a_tokenizer_of_another_model(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        dict(tokenizer["added_tokens"][0], id=5000, content="<|other|>")
    )
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "belongs to another model" in _refused("--model", model)


def test_a_prompt_longer_than_the_model_takes():
    line = _refused("--prompt", "far too long " * 3000)
    assert "tokens and the model takes 2048" in line


def test_an_empty_prompt():
    assert "the prompt is empty" in _refused("--prompt", "")


def test_a_prompt_that_is_no_text():
    assert "is not UTF-8 text" in _refused("--prompt", b"\xff\xfe".decode(errors="surrogateescape"))


def test_a_chat_template_that_refuses(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('only on Sundays') }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    line = _refused("--model", model)
    assert "only on Sundays; use --raw" in line


@pytest.mark.parametrize("changes", [{"architectures": 5}, {"text_config": "x"}])
def test_a_config_of_the_wrong_shape(model, changes):
    _change_config(model, **changes)
    assert "config.json" in _refused("--model", model)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300])
def test_a_model_that_cannot_be_looked_at(name):
    assert "--model" in _refused("--model", name)


def test_more_ranks_than_layers():
    line = _refused(num_ranks=7)
    assert line == "mlx-dist: error: the model has 6 layers and there are 7 ranks; start at most 6"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("3,2,2", "cuts for 3 ranks and there are 2"),
        ("a,b,c", "none of auto, even and a list of counts"),
    ],
)
def test_a_cut_that_does_not_add_up(layers, words):
    assert words in _refused("--layers", layers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "nan"), "--temperature is nan"),
        (("--top-p", "1.5"), "--top-p is 1.5"),
        (("--top-p", "0"), "--top-p is 0"),
        (("--temperature", "1e-40"), "--temperature is 1e-40"),
        (("--logit-bias", "5:nan"), "--logit-bias 5:nan"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--logit-bias", "x:y"), "--logit-bias 'x:y'"),
        (("--logit-bias", "999999:1"), "names token 999999"),
        (("--stop", ""), "--stop is empty"),
        (("--prefill-chunk", "0"), "--prefill-chunk is 0"),
        (("--fabric", "jaccl"), "--jaccl-devices FILE"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_values_that_cannot_be(arguments, words):
    assert words in _refused(*arguments)


def test_a_tensor_that_one_rank_lacks(model, tmp_path):
    """Rank 2's copy says it has another tensor where layer 5's norm should be."""
    broken = shutil.copytree(model, tmp_path / "broken")
    path = broken / "model.safetensors"
    data = path.read_bytes()
    name = b"model.layers.5.input_layernorm.weight"
    assert name in data
    path.write_bytes(data.replace(name, name.replace(b"input", b"other")))
    done = program(
        "own_model", model, model, broken, "--", "generate", "--prompt", "Hello", num_ranks=3
    )
    assert done.code == 1
    [line] = done.error_lines
    assert "model is " in line or "input_layernorm" in line
    assert "rank 2 (" in line


def test_all_errors_name_no_traceback_on_one_rank():
    done = mlx_dist("generate", "--prompt", "Hello", "--model", "/no/such/model")
    assert done.code == 1
    assert len(done.error_lines) == 1
    assert "Traceback" not in done.err
