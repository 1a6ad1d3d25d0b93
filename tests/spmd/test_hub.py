"""A hub id brings each rank the files it needs, once a host, through the real hub client."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_dist.demo import MODEL_DIR
from tests.hub import REPO, serve
from tests.launching import mlx_dist, program

PROMPT = ("--prompt", "What is a rank?", "--json")
# The embedded model in four files: where each tensor goes.
FILES = {
    "model-00001-of-00004.safetensors": ("model.embed_tokens.", "model.layers.0."),
    "model-00002-of-00004.safetensors": ("model.layers.1.", "model.layers.2."),
    "model-00003-of-00004.safetensors": ("model.layers.3.", "model.layers.4."),
    "model-00004-of-00004.safetensors": ("model.layers.5.", "model.norm."),
}
FIRST, SECOND, THIRD, FOURTH = FILES


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    (folder / "evil.py").write_text("raise SystemExit('this must never be fetched')")
    weights = mx.load(str(MODEL_DIR / "model.safetensors"))
    weight_map = {}
    for file, prefixes in FILES.items():
        part = {name: array for name, array in weights.items() if name.startswith(prefixes)}
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    assert set(weight_map) == set(weights)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def hub(repository):
    with serve(repository) as running:
        yield running


@pytest.fixture(scope="module")
def text():
    return mlx_dist("generate", *PROMPT).json()["text"]


def _sizes(repository):
    return {name: (repository / name).stat().st_size for name in FILES}


def _fetched_whole(hub):
    """The weight files of which more than a header was sent."""
    return {name for name, size in _sizes(hub.folder).items() if hub.sent_bytes[name] >= size}


# Layers 0 to 1, 2 to 3 and 4 to 5; the embedding is tied to the head, so the last needs it too.
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("0,2", {FIRST, SECOND}),
        ("2,4", {SECOND, THIRD}),
        ("4,6", {FIRST, THIRD, FOURTH}),
        ("3,5", {THIRD}),
    ],
)
def test_a_stage_fetches_only_its_files(hub, tmp_path, stage, needed):
    done = program("fetch", REPO, stage, num_ranks=1, env=hub.environment(tmp_path))
    assert done.code == 0, done.err
    assert _fetched_whole(hub) == needed
    sizes = _sizes(hub.folder)
    for name in needed:
        assert hub.sent_bytes[name] < 1.5 * sizes[name] + 300_000
    assert not any(name.endswith(".py") for name in hub.sent_bytes)


def test_three_ranks_of_a_host_fetch_each_file_once(hub, tmp_path, text):
    environment = hub.environment(tmp_path)
    answer = mlx_dist("generate", *PROMPT, "--model", REPO, num_ranks=3, env=environment).json()
    assert answer["text"] == text
    for name, size in _sizes(hub.folder).items():
        # Each rank may read headers, of up to 100 kB, beside one whole download.
        assert size <= hub.sent_bytes[name] < size + 3 * 2 * 100_001
        assert hub.sent_bytes[name] < 2 * size
    before = dict(hub.sent_bytes)
    answer = mlx_dist("generate", *PROMPT, "--model", REPO, num_ranks=3, env=environment).json()
    assert answer["text"] == text
    assert {n: hub.sent_bytes[n] for n in FILES} == {n: before[n] for n in FILES}


def test_an_unproven_family_is_refused_before_its_weights_are_fetched(repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma3n"}))
    with serve(other) as hub:
        done = mlx_dist(
            "generate", *PROMPT, "--model", REPO, num_ranks=3, env=hub.environment(tmp_path)
        )
        assert done.code == 1
        assert "'gemma3n' is not proven" in done.error_lines[0]
        assert set(hub.sent_bytes) == {"config.json"}


def test_a_repository_that_is_not_there_is_named(hub, tmp_path):
    done = mlx_dist(
        "generate", *PROMPT, "--model", "owner/nothing", num_ranks=2, env=hub.environment(tmp_path)
    )
    assert done.code == 1
    assert "Traceback" not in done.err
    [line] = done.error_lines
    assert "--model owner/nothing is no folder and cannot be fetched" in line


def test_a_hub_that_is_down_is_said(hub, tmp_path):
    environment = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = mlx_dist("generate", *PROMPT, "--model", REPO, num_ranks=2, env=environment)
    assert done.code == 1
    assert "Traceback" not in done.err
    [line] = done.error_lines
    assert f"--model {REPO} is no folder and cannot be fetched" in line


def test_a_download_that_breaks_off_is_an_error(hub, tmp_path):
    hub.breaking.add(THIRD)
    done = mlx_dist(
        "generate", *PROMPT, "--model", REPO, num_ranks=3, env=hub.environment(tmp_path)
    )
    assert done.code == 1
    assert done.out == ""
    assert "Traceback" not in done.err
    assert len(done.error_lines) == 1
