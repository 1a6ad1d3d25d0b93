"""Ranks that share every layer say what one rank says, serve as it does, and end together."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.real_groups import run_layout
from benchmarks.reference import Reference
from benchmarks.tiny_models import Variant, write_tiny_model
from mlx_dist import LLM
from mlx_dist.demo import MODEL_DIR
from tests.launching import mlx_dist, program, run
from tests.serving import serving
from tests.spmd.test_load import Ask, _all, _alone, could_say

BIN = Path(sys.executable).parent
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
QUESTION = "What is a rank?"
GENERATE = ("generate", "--prompt", QUESTION, "--json")
TENSOR = ("--parallel", "tensor")
TINY = {
    "gpt_oss": Variant("4-bit", quantize_bits=4),
    "gemma3_text": Variant("bfloat16", dtype="bfloat16"),
    "olmo2": Variant("plain"),
}
SCHEMA = {
    "type": "object",
    "properties": {"rank": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["rank", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def one_rank():
    return mlx_dist(*GENERATE).json()


@pytest.mark.parametrize(
    ("ranks", "options", "layers"),
    [
        (3, (*TENSOR, "--fabric", "ring"), [[0, 6]] * 3),
        (4, ("--parallel", "tensor=2", "--layers", "4,2"), [[0, 4]] * 2 + [[4, 6]] * 2),
    ],
    ids=["ring", "hybrid"],
)
def test_a_group_says_what_one_rank_says(one_rank, ranks, options, layers):
    answer = mlx_dist(*GENERATE, *options, num_ranks=ranks).json()
    assert answer["text"] == one_rank["text"]
    assert [rank["layers"] for rank in answer["ranks"]] == layers
    whole_bytes = one_rank["ranks"][0]["weights_bytes"]
    held = [rank["weights_bytes"] for rank in answer["ranks"]]
    # What is held twice are norms and, in a pipeline of groups, the embedding.
    assert 1 < sum(held) / whole_bytes < 1.3
    assert max(held) / whole_bytes < 0.6


def test_under_mlx_launch(one_rank):
    launch = [BIN / "mlx.launch", "--backend", "ring", "-n", "2", "--python", sys.executable]
    env = {"PATH": f"{BIN}:{os.environ['PATH']}"} | (ROOT if os.geteuid() == 0 else {})
    done = run([*launch, "--", BIN / "mlx-dist", *GENERATE, *TENSOR], env=env)
    assert done.json()["text"] == one_rank["text"]


def test_members_come_to_the_same_bits(tmp_path):
    folders = [tmp_path / family for family in TINY]
    for folder in folders:
        write_tiny_model(folder.name, folder, TINY[folder.name])
    for result in run_layout("mpi:3", folders, timeout_s=60):
        is_precise = result["model"] != "gemma3_text"
        assert result["are_members_equal"]
        assert result["error"] < (1e-5 if is_precise else 0.1)
        assert result["are_tokens_equal"] or not is_precise


def test_groups_that_the_fabric_cannot_form_are_refused():
    options = ("--parallel", "tensor=2", "--fabric", "ring")
    done = mlx_dist(*GENERATE, *options, num_ranks=4)
    assert done.code == 1
    [line] = done.error_lines
    assert "ring fabric cannot form" in line


@pytest.mark.parametrize("fabric", ["mpi", "ring"])
def test_a_rank_that_is_killed_beside_a_sum_ends_the_job(fabric):
    """The others wait for it in the sum of a layer. One that stayed would hold stderr open."""
    arguments = ("generate", "--prompt", QUESTION * 4, "--prefill-chunk", "4", "--fabric", fabric)
    done = program("faulty", "1", "decode", "kill", *arguments, *TENSOR, num_ranks=3, timeout_s=30)
    # Over a ring the neighbours may be the first to fail: they lose their connection.
    assert done.code in ((137,) if fabric == "mpi" else (137, 86)), done.err
    assert "fault at" in done.err
    assert "rank 1" in done.err


def _asks():
    shared = tuple(range(40, 120))
    return [
        Ask(
            shared[: 20 * (i % 4)] + tuple(range(300 + i, 310 + 2 * i)),
            max_tokens=4 + 3 * i % 24,
            temperature=(0.0, 0.0, 0.8, 1.5)[i % 4],
            seed=i,
            leaves_after=2 if i % 5 == 4 else None,
        )
        for i in range(16)
    ]


@pytest.mark.timeout(120)
def test_a_server_of_three_slices(one_rank):
    asks = _asks()
    with serving(*TENSOR, "--slices", "2,1,1", "--batching", "fixed:1,8,64", num_ranks=3) as server:
        client = server.client()

        def ask(**options):
            messages = [{"role": "user", "content": QUESTION}]
            defaults = {"model": "model", "messages": messages, "max_tokens": 24, "temperature": 0}
            return client.chat.completions.create(**(defaults | options))

        first = ask(logprobs=True, top_logprobs=2)
        content = first.choices[0].logprobs.content
        assert all(t.logprob == t.top_logprobs[0].logprob <= 0 for t in content)
        several = [
            [choice.message.content for choice in ask(n=3, temperature=3, seed=5).choices]
            for _ in range(2)
        ]
        assert several[0] == several[1]
        assert len(set(several[0])) > 1
        _check_second_turn(ask, first)
        _check_schema(ask)
        stream = ask(stream=True, max_tokens=400, logit_bias={"0": -100}, temperature=1.0)
        next(iter(stream))
        stream.close()
        texts = asyncio.run(_all(server.url, asks))
        stats = server.settled()
        assert sum(stats["rank_slots"]) == sum(stats["kv_reserved_bytes"]) == 0
        assert len(stats["rank_slots"]) == len(stats["rank_kv_bytes"]) == 3
        assert [rank["layers"] for rank in server.get("/cluster")["ranks"]] == [[0, 6]] * 3
    assert one_rank["text"].startswith(first.choices[0].message.content.strip())
    _check_texts(asks, texts)


def _check_second_turn(ask, first):
    answer = first.choices[0].message.content
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]
    usage = ask(messages=history).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 2 <= cached < usage.prompt_tokens


def _check_schema(ask):
    schema = {"name": "report", "schema": SCHEMA, "strict": True}
    response_format = {"type": "json_schema", "json_schema": schema}
    choice = ask(response_format=response_format, max_tokens=60).choices[0]
    assert choice.finish_reason == "length" or set(json.loads(choice.message.content)) == {
        "rank",
        "ok",
    }


def _check_texts(asks, texts):
    """Each is what one rank says to it alone, up to a near tie."""
    reference = Reference(MODEL_DIR)
    with LLM(str(MODEL_DIR), batching="fixed:1,1,512", reuse_prefixes=False) as llm:
        for ask, text in zip(asks, texts, strict=True):
            alone = _alone(llm, ask)
            is_same = alone.startswith(text) if ask.leaves_after is not None else alone == text
            assert is_same or could_say(reference, ask, text)
