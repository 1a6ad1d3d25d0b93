"""`mlx-dist generate` as a user meets it: text, JSON, sampling, stdin, stop strings."""

import json

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
    answer = _answer(ranks=spmd_ranks)
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


def test_text_is_on_stdout_and_the_table_on_stderr(greedy):
    done = mlx_dist("generate", "--prompt", QUESTION, num_ranks=2)
    assert done.code == 0
    assert done.out == greedy["text"] + "\n"
    assert "first token after" in done.err


@pytest.mark.parametrize(
    "sampling",
    [
        ("--temperature", "1", "--seed", "7"),
        ("--temperature", "1.3", "--top-p", "0.9", "--seed", "1"),
        ("--temperature", "1", "--top-k", "5", "--min-p", "0.05", "--seed", "2"),
        ("--temperature", "1", "--repetition-penalty", "1.3", "--seed", "3"),
        ("--presence-penalty", "1", "--frequency-penalty", "0.5", "--logit-bias", "300:5"),
    ],
    ids=" ".join,
)
def test_a_seed_fixes_the_tokens_at_any_cut(sampling):
    alone = _answer(*sampling, "--max-tokens", "40")["text"]
    for ranks, layers in ((2, "1,5"), (3, "2,3,1")):
        got = _answer(*sampling, "--max-tokens", "40", "--layers", layers, ranks=ranks)["text"]
        assert got == alone


def test_seeds_differ():
    texts = {_answer("--temperature", "1.5", "--seed", str(seed))["text"] for seed in range(4)}
    assert len(texts) > 1


def test_stop_strings_end_the_text(greedy):
    words = greedy["text"].split()
    stop = words[3][1:] + " " + words[4][:2]
    answer = _answer("--stop", stop, ranks=2)
    assert answer["text"] == greedy["text"][: greedy["text"].index(stop)]
    assert answer["finish_reason"] == "stop"


def test_a_stop_string_at_the_last_token_is_a_stop(greedy):
    answer = _answer("--stop", greedy["text"][5], "--max-tokens", "3")
    assert answer["finish_reason"] == "stop"


def test_a_colon_is_a_stop_string_like_any_other(greedy):
    assert _answer("--stop", ":", ranks=2)["text"] == greedy["text"]


def test_max_tokens_is_the_limit():
    answer = _answer("--max-tokens", "3", ranks=2)
    assert answer["completion_tokens"] == 3
    assert answer["finish_reason"] == "length"


def test_a_prompt_comes_from_stdin(greedy):
    answer = mlx_dist("generate", "--prompt", "-", "--json", num_ranks=2, stdin=QUESTION).json()
    assert answer["text"] == greedy["text"]


def test_chunks_of_the_prompt_do_not_change_the_answer(greedy):
    for chunk in ("1", "3"):
        assert _answer("--prefill-chunk", chunk, ranks=3)["text"] == greedy["text"]


def test_dtype_changes_what_ranks_hold(greedy):
    half = _answer("--dtype", "bfloat16", ranks=2)
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
    done = mlx_dist("bench", "-p", "8", "-g", "3", "-r", "1", num_ranks=2)
    assert "tokens/s" in done.out


def test_version_and_help_start_no_ranks():
    assert mlx_dist("--version").out.strip()
    assert "--prompt" in mlx_dist("generate", "--help").out


def test_it_runs_from_any_folder(tmp_path, greedy):
    done = mlx_dist("generate", "--prompt", QUESTION, "--json", num_ranks=2, cwd=tmp_path)
    assert json.loads(done.out)["text"] == greedy["text"]


def test_the_console_script_is_there(greedy):
    import sys
    from pathlib import Path

    script = Path(sys.executable).parent / "mlx-dist"
    assert (
        run([script, "generate", "--prompt", QUESTION, "--json"]).json()["text"] == (greedy["text"])
    )
