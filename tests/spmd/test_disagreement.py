"""Ranks that differ in what they compute with say so at the start, in one error, naming hosts."""

import shutil
import sys

from mlx_dist.cluster.launch import mpirun_command
from mlx_dist.demo import MODEL_DIR
from tests.launching import program, run


def _two_contexts(first, second):
    """A job of two ranks that were started with different environments and arguments."""
    mpirun = mpirun_command(1, None, [])[:-1]
    options = mpirun[3:]
    both = [mpirun[0], "-np", "1", *options, *first, ":", "-np", "1", *second]
    return run(both, timeout_s=45)


def _rank(*arguments, variables=()):
    command = [sys.executable, "-m", "mlx_dist", "generate", "--prompt", "Hello", *arguments]
    return ["env", *variables, *command]


def _differences(done):
    """What the one error says of each fact."""
    assert done.code == 1, done.err
    [line] = done.error_lines
    facts = line.removeprefix("mlx-dist: error: the ranks differ: ").split("; ")[:-1]
    assert all(" on rank 0 (" in fact and " on rank 1 (" in fact for fact in facts)
    return [fact.partition(" on rank 0 (")[0] for fact in facts]


def test_every_difference_is_named():
    second = _rank("--dtype", "bfloat16", variables=["MLX_DISABLE_COMPILE=1", "PATH=/nowhere"])
    assert _differences(_two_contexts(_rank("--dtype", "float32"), second)) == [
        "--dtype is float32",
        "C++ compiler is present",
        "MLX_DISABLE_COMPILE is nothing",
    ]


def test_another_cut_is_named():
    assert _differences(_two_contexts(_rank("--layers", "3,3"), _rank())) == ["--layers is 3,3"]


def test_another_models_files_are_named(tmp_path):
    other = shutil.copytree(MODEL_DIR, tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    done = program(
        "own_model", MODEL_DIR, other, "--", "generate", "--prompt", "Hello", num_ranks=2
    )
    assert done.code == 1
    [line] = done.error_lines
    assert line.startswith("mlx-dist: error: the ranks differ: model is ")


def test_a_rank_count_that_is_not_the_launchers_is_refused():
    python = ["-m", "mlx_dist", "generate", "--prompt", "Hello", "-n", "3"]
    done = run(mpirun_command(2, None, python))
    assert done.code == 1
    assert "-n 3 under a launcher that started 2 ranks" in done.error_lines[0]
