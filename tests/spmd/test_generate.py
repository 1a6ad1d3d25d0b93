"""`mlx-dist generate` as a user meets it: text, JSON, sampling, stdin, stop strings."""

import sys
from pathlib import Path

import pytest

from mlx_dist.demo import MODEL_DIR
from tests.launching import mlx_dist, run

QUESTION = "What is a rank?"


def _answer(*arguments, ranks=1, **options):
    prompt = () if "--prompt" in arguments else ("--prompt", QUESTION)
    return mlx_dist("generate", *prompt, *arguments, "--json", num_ranks=ranks, **options).json()


@pytest.fixture(scope="module")
def greedy():
    return _answer()


def test_the_embedded_model_makes_sense(greedy):
    assert "rank" in greedy["text"].lower()
    assert greedy["text"].endswith(".")
    assert greedy["finish_reason"] == "stop"


def test_json_has_every_field(spmd_ranks, greedy):
    answer = greedy if spmd_ranks == 1 else _answer(ranks=spmd_ranks)
    assert answer["text"] == greedy["text"]
    assert set(answer) == {
        *("text", "prompt_tokens", "completion_tokens", "finish_reason"),
        *("ttft_s", "prompt_tokens_per_s", "tokens_per_s", "ranks"),
    }
    layers = []
    for i, rank in enumerate(answer["ranks"]):
        assert set(rank) == {"rank", "host", "layers", "weights_bytes", "peak_rss_bytes", "load_s"}
        assert rank["rank"] == i
        start, end = rank["layers"]
        layers += range(start, end)
        assert rank["peak_rss_bytes"] > rank["weights_bytes"] > 0
    assert layers == list(range(6))
    size = (MODEL_DIR / "model.safetensors").stat().st_size
    held = sum(rank["weights_bytes"] for rank in answer["ranks"])
    # The embedding is also the head: on the last rank again.
    assert held >= size * 0.99 if spmd_ranks == 1 else held > size


def test_stdin_is_answered_on_stdout_with_the_table_on_stderr_from_any_folder(greedy, tmp_path):
    """A colon is a stop string like any other, though mpirun takes one for a border."""
    words = ("--prompt", "-", "--stop", ":")
    done = mlx_dist("generate", *words, num_ranks=2, stdin=QUESTION, cwd=tmp_path)
    assert done.code == 0
    assert done.out == greedy["text"] + "\n"
    assert "first token after" in done.err


@pytest.mark.parametrize(
    "sampling",
    [
        "--temperature 1.3 --top-p 0.9 --top-k 50 --min-p 0.01",
        "--repetition-penalty 1.3 --presence-penalty 1 --frequency-penalty 0.5 --logit-bias 300:5",
    ],
)
def test_a_seed_fixes_the_tokens_at_another_cut(sampling):
    """At every cut: test_every_cut.py, with each sampling by itself."""
    words = (*sampling.split(), "--seed", "7", "--max-tokens", "40")
    alone = _answer(*words)["text"]
    assert _answer(*words, "--layers", "2,3,1", ranks=3)["text"] == alone


def test_seeds_differ():
    texts = {_answer("--temperature", "1.5", "--seed", str(seed))["text"] for seed in range(2)}
    assert len(texts) == 2


def test_stop_strings_end_the_text(greedy):
    words = greedy["text"].split()
    stop = words[3][1:] + " " + words[4][:2]
    answer = _answer("--stop", stop, ranks=2)
    assert answer["text"] == greedy["text"][: greedy["text"].index(stop)]
    assert answer["finish_reason"] == "stop"


def test_a_stop_string_at_the_last_token_is_a_stop(greedy):
    answer = _answer("--stop", greedy["text"][5], "--max-tokens", "3")
    assert answer["finish_reason"] == "stop"


def test_max_tokens_is_the_limit_and_chunks_change_no_token(greedy):
    answer = _answer("--max-tokens", "3", "--prefill-chunk", "1", ranks=3)
    assert answer["completion_tokens"] == 3
    assert answer["finish_reason"] == "length"
    assert greedy["text"].startswith(answer["text"])


def test_dtype_changes_what_ranks_hold(greedy):
    half = _answer("--dtype", "bfloat16")
    assert half["text"]
    held = sum(rank["weights_bytes"] for rank in half["ranks"])
    full = sum(rank["weights_bytes"] for rank in greedy["ranks"])
    assert held < 0.6 * full


def test_bench_measures_and_reports():
    done = mlx_dist("bench", "-p", "20", "-g", "5", "-r", "2", "--json", num_ranks=2)
    result = done.json()
    assert len(result["trials"]) == 2
    assert result["mean"]["generation_tokens_per_s"] > 0
    assert result["ranks"][0]["sent_bytes"] == 3 * (20 + 4) * 96 * 4
    assert result["ranks"][1]["sent_bytes"] == 0
    assert all(rank["busy_s"] > 0 for rank in result["ranks"])
    done = mlx_dist("bench", "-p", "8", "-g", "3", "-r", "1")
    assert "tokens/s" in done.out


def test_version_and_help_start_no_ranks():
    """Nor does the console script, which test_launchers.py lets answer."""
    version = mlx_dist("--version").out.strip()
    assert version
    assert run([Path(sys.executable).parent / "mlx-dist", "--version"]).out.strip() == version
    assert "--prompt" in mlx_dist("generate", "--help").out
