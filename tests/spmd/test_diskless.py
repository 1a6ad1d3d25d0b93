"""Ranks without the model get from the leader what their own files would hold, and no more."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.tiny_models import Variant
from mlx_dist.cluster.launch import mpirun_command
from mlx_dist.demo import MODEL_DIR
from tests.hub import REPO, serve
from tests.launching import PROGRAMS, program, run
from tests.unit.test_hub_files import write_split

NOWHERE = "/no/such/model"
BIN = Path(sys.executable).parent
FABRICS = ["mpi", "ring"]
VARIANTS = {
    "untied": ("llama", Variant("untied", changes={"tie_word_embeddings": False})),
    "tied": ("llama", Variant("tied", changes={"tie_word_embeddings": True})),
    "4-bit": ("llama", Variant("4-bit", quantize_bits=4)),
    "stacked": ("mixtral", Variant("plain")),
    "renamed": ("qwen3_vl", Variant("plain")),
}
CUTS = {2: [[0, 3], [3, 8]], 3: [[0, 2], [2, 5], [5, 8]]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return {
        name: str(write_split(family, top / name, variant))
        for name, (family, variant) in VARIANTS.items()
    }


def _case(whole, cuts, *others, **more):
    """One load: the leader has the model `whole`, and the others what is named, or nothing."""
    absent = [NOWHERE] * (len(cuts) - 1 - len(others))
    return {"models": [whole, *others, *absent], "cuts": cuts, "whole": whole} | more


def _load(fabric, cases, num_ranks):
    return program("fed", fabric, json.dumps(cases), num_ranks=num_ranks, timeout_s=100)


def _check(ranks, fed=None):
    """What is fed is what its own files hold, and the model's small files are gone at the end."""
    leader, *others = ranks
    for rank in ranks:
        assert rank["same"], rank
        done, total = zip(*rank["steps"], strict=True) if rank["steps"] else ((0,), (0,))
        assert list(done) == sorted(done)
        assert {done[-1]} == set(total)
    for rank in others if fed is None else [ranks[place] for place in fed]:
        assert rank["folder"] != leader["folder"]
        assert not Path(rank["folder"]).exists()
        assert "config.json" in rank["files"]
        assert not any("safetensors" in name for name in rank["files"])


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("fabric", FABRICS)
def test_a_rank_is_fed_what_its_own_files_would_hold(models, fabric, num_ranks):
    cuts = CUTS[num_ranks]
    in_pieces = {"piece_bytes": 3000, "dtype": "bfloat16"}
    cases = [_case(whole, cuts) for whole in models.values()]
    cases += [_case(models[name], cuts, **in_pieces) for name in ("tied", "stacked")]
    # Stages that do not follow the ranks, and a rank without one.
    cases += [_case(models["tied"], [*cuts[1:], cuts[0]])]
    cases += [_case(models["stacked"], [[0, 8], *[None] * (num_ranks - 1)])]
    cases += [_case(models["stacked"], [[0, 4], *[None] * (num_ranks - 2), [4, 8]])]
    # A tensor group: of every layer a slice, of which only that is sent.
    slices = {"slices": [1, 2, 1][:num_ranks]}
    cases += [
        _case(models[name], [[0, 8]] * num_ranks, **slices)
        for name in ("untied", "4-bit", "stacked")
    ]
    done = _load(fabric, cases, num_ranks)
    for ranks in done.json():
        _check(ranks)
        fed = [line for line in ranks[0]["lines"] if line.startswith("fed rank")]
        assert len(fed) == sum(rank["own_bytes"] > 0 for rank in ranks[1:])
        pattern = r"fed rank [12] \(.+\): [\d.]+ MB in [\d.]+ s, [\d.]+ MB/s, \d+ tensors"
        assert all(re.fullmatch(pattern, line) for line in fed)


def test_where_the_control_plane_is_the_fabric(models):
    cases = [_case(models[name], CUTS[3]) for name in ("tied", "stacked")]
    launch = [BIN / "mlx.launch", "--backend", "ring", "-n", "3", "--python", sys.executable]
    command = [*launch, "--", PROGRAMS / "fed.py", "ring", json.dumps(cases)]
    done = run(command, env={"PATH": f"{BIN}:{os.environ['PATH']}"}, timeout_s=100)
    for ranks in done.json():
        _check(ranks)


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_rank_that_has_the_model_uses_it_and_another_version_is_not_used(
    models, tmp_path, fabric
):
    copy = shutil.copytree(models["tied"], tmp_path / "copy")
    case = _case(models["tied"], CUTS[3], str(copy), models["4-bit"])
    [[leader, with_copy, with_other]] = _load(fabric, [case], 3).json()
    _check([leader, with_copy, with_other], fed=[2])
    assert with_copy["folder"] == str(copy)
    assert with_copy["steps"][-1] == [with_copy["own_bytes"]] * 2
    [why, fed] = leader["lines"]
    assert re.match(r"rank 2 \(.+\) gets its weights from the leader: it has version \w+, the", why)
    assert fed.startswith("fed rank 2")


@pytest.fixture(scope="module")
def answers():
    return program("diskless", "auto", MODEL_DIR, num_ranks=1).json()


@pytest.mark.parametrize("fabric", FABRICS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_fed_ranks_answer_as_one_process(answers, fabric, num_ranks):
    names = [MODEL_DIR, *[NOWHERE] * (num_ranks - 1)]
    fed = program("diskless", fabric, *names, num_ranks=num_ranks).json()
    assert (fed["text"], fed["json"]) == (answers["text"], answers["json"])
    assert len(fed["weights"]) == num_ranks


def _job(*commands):
    """A job of a rank for each of these commands."""
    mpirun, *options = mpirun_command(1, None, [])[:-1]
    contexts = [[":", "-np", "1", *command] for command in commands[1:]]
    return run([mpirun, *options, *commands[0], *chain.from_iterable(contexts)], timeout_s=100)


def _with_caches(hub, *caches):
    """A rank for each cache of the hub's client; only the first one's reaches the hub."""
    unreachable = {"HF_ENDPOINT": "http://[::1]:1"}
    variables = [hub.environment(cache) | unreachable for cache in caches]
    variables[0] = hub.environment(caches[0])
    program = [sys.executable, PROGRAMS / "diskless.py", "mpi", REPO]
    return _job(
        *(
            ["env", *(f"{name}={value}" for name, value in own.items()), *program]
            for own in variables
        )
    )


def test_only_the_leader_asks_the_hub(answers, tmp_path):
    caches = [tmp_path / name for name in "abc"]
    with serve(MODEL_DIR) as hub:
        done = _with_caches(hub, *caches)
        assert done.json()["text"] == answers["text"]
        assert hub.whole("model.safetensors") == 1
        assert sum(line.startswith("mlx-dist: fed rank") for line in done.err.splitlines()) == 2
        # What a rank has fetched before, it is not sent.
        done = _with_caches(hub, caches[0], caches[0], caches[2])
        assert done.json() == answers | {"weights": done.json()["weights"]}
        [line] = [line for line in done.err.splitlines() if line.startswith("mlx-dist: fed rank")]
        assert "fed rank 2" in line


def test_memory_is_the_shard_and_little_more(tmp_path):
    make = (
        "import sys, pathlib; from mlx_dist.cluster.blas import preload_blas; preload_blas(1); "
        "from benchmarks.random_model import write_random_model; "
        "write_random_model(pathlib.Path(sys.argv[1]), 6)"
    )
    subprocess.run([sys.executable, "-c", make, tmp_path / "big"], check=True, timeout=100)
    whole = str(tmp_path / "big")
    largest_bytes = 896 * 8192 * 4  # the embedding
    cases = [_case(whole, [[0, 3], [3, 6]]), _case(whole, [[0, 3], [3, 6]], dtype="float16")]
    plain, converted = _load("mpi", cases, 2).json()
    for leader, fed in (plain, converted):
        assert fed["same"]
        assert fed["own_bytes"] > 50e6
        # Two tensors: one is sent while the next one is read; of small ones, more.
        assert leader["peak_bytes"] <= leader["own_bytes"] + 2 * max(largest_bytes, 64 << 20)
        allowed_bytes = fed["own_bytes"] + (largest_bytes if fed is converted[1] else 0)
        assert fed["peak_bytes"] <= allowed_bytes + (1 << 20)
    assert plain[1]["own_bytes"] == 2 * converted[1]["own_bytes"]
    # What the process itself grew by, of which the first load says most.
    assert plain[1]["over_idle_bytes"] <= 1.15 * (plain[1]["own_bytes"] + largest_bytes)


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_damaged_tensor_ends_the_job_and_is_named(models, fabric):
    done = _load(fabric, [_case(models["tied"], CUTS[3], damage=2)], 3)
    assert done.code == 86
    line = done.error_lines[0]
    assert re.search(r"rank 2 \(.+\): tensor model\.\S+ arrived damaged", line), line


def _refused(*arguments, models):
    """The one line that says why, of ranks that have these models."""
    command = ("--", "generate", "--prompt", "Hello", *arguments)
    done = program("own_model", *models, *command, num_ranks=len(models))
    assert done.code == 1
    assert "Traceback" not in done.err
    [line] = done.error_lines
    return line


def test_the_leader_must_have_the_model():
    line = _refused("--weights", "leader", models=[NOWHERE, MODEL_DIR])
    assert re.search(rf"rank 0 \(.+\): --model {NOWHERE} is neither a folder here nor", line)
    assert "have the leader" not in line


def test_without_the_flag_the_error_names_it():
    line = _refused(models=[MODEL_DIR, NOWHERE])
    assert re.search(rf"rank 1 \(.+\): --model {NOWHERE} is neither a folder here nor", line)
    assert line.endswith("copy the model there, or have the leader send it: --weights leader")
    assert "--weights" not in _refused(models=[NOWHERE, NOWHERE])


def test_ranks_that_differ_in_the_flag_say_so():
    command = [sys.executable, "-m", "mlx_dist", "generate", "--prompt", "Hello"]
    done = _job([*command, "--weights", "leader"], command)
    [line] = done.error_lines
    assert done.code == 1
    assert "--weights is leader on rank 0" in line


def test_code_is_not_sent(models):
    done = _load("mpi", [_case(models["tied"], CUTS[2], trust=True)], 2)
    assert done.code != 0
    [line] = done.error_lines
    assert "is sent no code" in line


def test_a_tensor_that_the_leader_cannot_read_ends_the_job(models, tmp_path):
    whole = shutil.copytree(models["tied"], tmp_path / "cut")
    done = _load("mpi", [_case(str(whole), CUTS[2], cut_off="model-layer-5.safetensors")], 2)
    assert done.code == 86
    assert any(
        re.search(r"rank 0 .*tensor model\.layers\.5\.\S+ cannot be read", line)
        for line in done.error_lines
    )
