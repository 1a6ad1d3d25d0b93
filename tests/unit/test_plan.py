"""What `mlx-dist plan` says of machines in a file, and what it says when a model does not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dist.config import Objective, RunConfig, Split
from mlx_dist.demo import MODEL_DIR
from mlx_dist.errors import ConfigError, ModelError, PlacementError
from mlx_dist.plan import Asked, plan_of_file
from mlx_dist.plan_view import as_object, lines, show
from tests.launching import mlx_dist

CONFIG = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
# Layers of 62 M weights, and 66 M each outside of them.
NUM_BYTES = 2 * (8 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 2 * 32000 * 2048)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def machines(folder: Path, usable_gb: float, count: int, kind: str = "10gbe") -> Path:
    path = folder / "machines.toml"
    path.write_text(
        f'[[machine]]\nname = "mini"\nchip = "M4"\nmemory_gb = 16\nusable_gb = {usable_gb}\n'
        f'count = {count}\n[link]\nkind = "{kind}"\n'
    )
    return path


def test_a_config_alone_is_enough(model, tmp_path):
    config = RunConfig(str(model), optimize=Objective.throughput)
    plan = plan_of_file(config, Asked(num_streams=64), machines(tmp_path, 12, 3))
    stages = plan.prediction.stages
    assert [layer for s in stages for layer in range(*s.layers)] == list(range(8))
    held = sum(stage.weights_bytes for stage in stages)
    assert held == pytest.approx(NUM_BYTES, rel=0.01)
    assert sorted(plan.prediction.ttft_s) == [128, 2048]
    assert plan.prediction.total_tokens_per_s > plan.prediction.stream_tokens_per_s
    # Keys and values of 4 heads of 128, in 16 bits.
    assert sum(stage.kv_bytes for stage in stages) == 64 * 4096 * 8 * 2 * 4 * 128 * 2


def test_fewer_bits_are_as_if_quantized(model, tmp_path):
    path = machines(tmp_path, 12, 1)
    whole, thin = (
        plan_of_file(RunConfig(str(model)), Asked(bits=bits), path) for bits in (None, 4)
    )
    ratio = thin.prediction.stages[0].weights_bytes / whole.prediction.stages[0].weights_bytes
    assert ratio == pytest.approx(4.5 / 16, rel=0.02)
    assert thin.case.costs.bits == 4
    assert thin.prediction.stream_tokens_per_s > 2 * whole.prediction.stream_tokens_per_s


def test_a_model_with_files_needs_no_bits(tmp_path):
    plan = plan_of_file(
        RunConfig(str(MODEL_DIR)), Asked(context_tokens=64), machines(tmp_path, 12, 2)
    )
    # Its layers are too small for a hop.
    assert len(plan.prediction.stages) == 1
    assert as_object(plan)["left_out"] == ["mini-2"]


def test_given_layers_are_predicted(model, tmp_path):
    config = RunConfig(str(model), layers=(5, 3))
    path = machines(tmp_path, 12, 2)
    plan = plan_of_file(config, Asked(), path)
    assert [stage.layers for stage in plan.prediction.stages] == [(0, 5), (5, 8)]
    even = plan_of_file(replace(config, layers=Split.even), Asked(), path)
    assert [stage.layers for stage in even.prediction.stages] == [(0, 4), (4, 8)]
    with pytest.raises(PlacementError, match="5,2,1 cuts for 3 ranks and there are 2"):
        plan_of_file(replace(config, layers=(5, 2, 1)), Asked(), path)


def test_what_does_not_fit_says_what_would(model, tmp_path):
    asked = Asked(context_tokens=16384, num_streams=16)
    config = RunConfig(str(model))
    with pytest.raises(PlacementError) as caught:
        plan_of_file(config, asked, machines(tmp_path, 2, 2))
    message = str(caught.value)
    assert "mini-1" in message
    assert "\n" not in message
    context = int(re.search(r"a context of (\d+) tokens", message)[1])
    streams = int(re.search(r"(\d+) sequences? at a time", message)[1])
    (count,) = re.findall(r"(one|\d+) more 16 GB machine", message)
    more = 2 + (1 if count == "one" else int(count))
    for remedy, num_machines in (
        (replace(asked, context_tokens=context), 2),
        (replace(asked, num_streams=streams), 2),
        (asked, more),
    ):
        plan_of_file(config, remedy, machines(tmp_path, 2, num_machines))


def test_fewer_bits_are_a_remedy(model, tmp_path):
    path = machines(tmp_path, 0.7, 2)
    config = RunConfig(str(model))
    asked = Asked(context_tokens=512)
    with pytest.raises(PlacementError) as caught:
        plan_of_file(config, asked, path)
    bits = int(re.search(r"weights of (\d) bits", str(caught.value))[1])
    plan_of_file(config, replace(asked, bits=bits), path)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(context_tokens=32768), "--context is 32768 and the model takes 16384"),
        (Asked(prompt_tokens=(8192,)), "--prompt-tokens 8192 is more than --context 4096"),
    ],
)
def test_more_tokens_than_there_is_room_for_are_refused(model, tmp_path, asked, words):
    with pytest.raises(ConfigError, match=words):
        plan_of_file(RunConfig(str(model)), asked, machines(tmp_path, 12, 1))


def test_a_config_that_makes_no_model_is_refused(model, tmp_path):
    (model / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": "large"}))
    with pytest.raises(ModelError):
        plan_of_file(RunConfig(str(model)), Asked(), machines(tmp_path, 12, 1))


def test_a_person_sees_the_table_and_what_limits(model, tmp_path, capsys):
    config = RunConfig(str(model), optimize=Objective.throughput)
    plan = plan_of_file(config, Asked(num_streams=64), machines(tmp_path, 12, 2, "1gbe"))
    show(plan, as_json=False)
    shown = capsys.readouterr().out
    assert "mini-1" in shown
    assert "[0, " in shown
    said = lines(plan)
    assert all(line in shown for line in said)
    assert [line.partition(":")[0] for line in said] == [
        "one stream",
        "64 streams",
        "first token of a prompt",
        "limited by",
        "best single addition",
    ]


def test_the_command_prints_json(model, tmp_path):
    path = machines(tmp_path, 12, 2)
    done = mlx_dist("plan", "--machines", path, "--model", model, "--streams", "2", "--json")
    found = done.json()
    assert found["model"] == str(model)
    assert found["num_sequences"] == 2
    assert found["addition"] is None or found["addition"]["speedup"] > 1
    assert set(found["ttft_s"]) == {"128", "2048"}
    assert all(stage["headroom_bytes"] > 0 for stage in found["stages"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --machines FILE.toml, or -n N"),
        (["--machines", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--machines", "nowhere.toml", "-n", "2"], "start without -n"),
        (["--bits", "1", "-n", "1"], "--bits is 1"),
        (["--streams", "0", "-n", "1"], "--streams is 0"),
        (["--prompt-tokens", "0", "-n", "1"], "--prompt-tokens 0"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(flags, words):
    done = mlx_dist("plan", *flags)
    assert done.code == 1
    (line,) = done.error_lines
    assert words in line


def test_a_file_that_says_how_many_ranks_does_not_keep_from_planning(model, tmp_path):
    (tmp_path / "mlx-dist.toml").write_text("ranks = 3\n")
    path = machines(tmp_path, 12, 2)
    done = mlx_dist("plan", "--machines", path, "--model", model, "--json", cwd=tmp_path)
    assert done.json()["model"] == str(model)
