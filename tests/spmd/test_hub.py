"""A hub id brings each rank the files it needs, once a host, through the real hub client."""

import json
import shutil
import socket
import time

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
SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
# huggingface_hub asks for a file's header in a range of this many bytes.
HEADER_RANGE_BYTES = 100_001


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    (folder / "evil.py").write_text("raise SystemExit('this must never be fetched')")
    (folder / "pytorch_model.bin").write_bytes(b"nor this")
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
def text(repository):
    return mlx_dist("generate", *PROMPT, "--model", repository).json()["text"]


@pytest.fixture(scope="module")
def here(repository, tmp_path_factory):
    """A hub that is down by now, and a cache that holds its model."""
    cache = tmp_path_factory.mktemp("here")
    with serve(repository) as hub:
        assert _generate(hub, cache).code == 0
    return hub, cache


@pytest.fixture(scope="module")
def part_here(repository, tmp_path_factory):
    """The environment of a cache that holds the stage of layers 2 and 3, and what it printed."""
    with serve(repository) as hub:
        environment = hub.environment(tmp_path_factory.mktemp("part"))
        done = program("fetch", REPO, "2,4", num_ranks=1, env=environment)
    assert done.code == 0, done.err
    return environment, done.out


def _generate(hub, cache, model=REPO, ranks=2, **environment):
    return mlx_dist(
        *("generate", *PROMPT, "--model", model),
        num_ranks=ranks,
        env=hub.environment(cache) | environment,
        timeout_s=60,
    )


def _refused(*arguments, **options):
    """The one line that says why, of a run that must not hang."""
    start = time.monotonic()
    done = _generate(*arguments, **options)
    assert time.monotonic() - start < 30
    assert done.code == 1
    assert done.out == ""
    assert "Traceback" not in done.err
    [line] = done.error_lines
    return line


# Layers 0 to 1, 2 to 3 and 4 to 5; the embedding is tied to the head, so the last needs it too.
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("0,2", {FIRST, SECOND}),
        ("2,4", {SECOND, THIRD}),
        ("4,6", {FIRST, THIRD, FOURTH}),
    ],
)
def test_a_stage_fetches_only_its_files(hub, tmp_path, stage, needed):
    done = program("fetch", REPO, stage, num_ranks=1, env=hub.environment(tmp_path))
    assert done.code == 0, done.err
    assert hub.files == SMALL | set(FILES)
    assert {name for name in FILES if hub.whole(name)} == needed
    for name in FILES:
        body_bytes = hub.bytes_of(name) - hub.whole(name) * (hub.folder / name).stat().st_size
        assert hub.whole(name) <= 1
        assert body_bytes <= HEADER_RANGE_BYTES
    stored = {path.name for path in (tmp_path / "hub").glob("models--*/snapshots/*/*")}
    assert stored == SMALL | needed


def test_three_ranks_of_a_host_fetch_each_file_once(hub, tmp_path, text):
    assert _generate(hub, tmp_path, ranks=3).json()["text"] == text
    assert hub.files == SMALL | set(FILES)
    for name in FILES:
        assert hub.whole(name) == 1
        assert hub.bytes_of(name) <= (hub.folder / name).stat().st_size + HEADER_RANGE_BYTES
    for name in SMALL:
        assert hub.whole(name) == 1
    hub.sent.clear()
    assert _generate(hub, tmp_path, ranks=3).json()["text"] == text
    # The hub is asked whether its main branch has moved on, and for nothing else.
    assert hub.files == {"config.json"}
    assert hub.bytes_of("config.json") == 0


def test_a_host_with_one_file_of_the_model_fetches_the_others(hub, tmp_path, text):
    program("fetch", REPO, "3,5", num_ranks=1, env=hub.environment(tmp_path))
    assert {name for name in FILES if hub.whole(name)} == {THIRD}
    assert _generate(hub, tmp_path).json()["text"] == text
    assert {name: hub.whole(name) for name in FILES} == dict.fromkeys(FILES, 1)


@pytest.fixture
def silent():
    """The address of a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _without_hub(how, silent):
    return {"down": {}, "offline": {"HF_HUB_OFFLINE": "1"}, "silent": {"HF_ENDPOINT": silent}}[how]


@pytest.mark.parametrize("how", ["down", "offline", "silent"])
def test_a_model_that_is_here_needs_no_hub(here, text, silent, how):
    assert _generate(*here, **_without_hub(how, silent)).json()["text"] == text


@pytest.mark.parametrize("how", ["down", "offline"])
def test_a_stage_that_is_here_needs_no_hub(part_here, silent, how):
    """Of the files with other stages this host has kept the headers."""
    environment, printed = part_here
    environment = environment | _without_hub(how, silent)
    again = program("fetch", REPO, "2,4", num_ranks=1, env=environment)
    assert (again.code, again.out) == (0, printed), again.err


def test_a_stage_that_is_not_here_needs_the_hub(part_here):
    environment = part_here[0] | {"HF_HUB_OFFLINE": "1"}
    other = program("fetch", REPO, "0,2", num_ranks=1, env=environment)
    assert other.code != 0
    assert f"ModelError: --model {REPO} is no folder and cannot be fetched" in other.err


def test_an_unproven_family_is_refused_before_its_weights_are_fetched(repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma3n"}))
    with serve(other) as hub:
        assert "'gemma3n' is not proven" in _refused(hub, tmp_path / "cache", ranks=3)
        assert hub.files == {"config.json"}


def test_code_that_comes_with_a_model_is_refused(repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with serve(other) as hub:
        assert "runs no such code" in _refused(hub, tmp_path / "cache")
        assert hub.files == {"config.json"}


def test_a_repository_that_is_not_there_is_named(hub, tmp_path):
    line = _refused(hub, tmp_path, "owner/nothing")
    assert "--model owner/nothing is no folder and cannot be fetched: 401" in line
    assert "Repository Not Found" in line


@pytest.mark.parametrize("how", ["down", "offline", "silent"])
def test_a_hub_that_is_away_is_said(repository, tmp_path, silent, how):
    with serve(repository) as hub:
        pass
    line = _refused(hub, tmp_path, **_without_hub(how, silent))
    assert f"--model {REPO} is no folder and cannot be fetched" in line
    words = {"down": "refused", "offline": "HF_HUB_OFFLINE", "silent": "timed out"}
    assert words[how] in line


def test_a_repository_without_weights_is_named(repository, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(repository / "config.json", other)
    with serve(other) as hub:
        line = _refused(hub, tmp_path / "cache")
        assert "model.safetensors" in line
        assert "Entry Not Found" in line


def test_a_weight_file_that_is_none_is_named(repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    (other / THIRD).write_bytes(b"\x07" * 1000)
    with serve(other) as hub:
        assert THIRD in _refused(hub, tmp_path / "cache")


def test_a_weight_file_that_was_uploaded_in_part_is_named(repository, tmp_path):
    other = shutil.copytree(repository, tmp_path / "other")
    (other / THIRD).write_bytes((repository / THIRD).read_bytes()[:-5000])
    with serve(other) as hub:
        line = _refused(hub, tmp_path / "cache")
        assert THIRD in line
        assert "cut off" in line


def test_a_download_that_breaks_off_is_resumed(hub, tmp_path, text):
    hub.breaks[THIRD] = 2
    assert _generate(hub, tmp_path).json()["text"] == text
    assert hub.breaks[THIRD] == 0


def test_a_download_that_always_breaks_off_is_an_error(hub, tmp_path, text):
    hub.breaks[THIRD] = 1000
    assert "cannot be fetched" in _refused(hub, tmp_path)
    assert not list((tmp_path / "hub").glob(f"models--*/snapshots/*/{THIRD}"))
    hub.breaks.clear()
    assert _generate(hub, tmp_path).json()["text"] == text
