"""Many at once get what each gets alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import openai
import pytest

from benchmarks.reference import Question, Reference
from mlx_dist import LLM
from mlx_dist.demo import MODEL_DIR
from mlx_dist.messages import Sampling
from mlx_dist.params import Params
from tests.serving import serving

NUM_REQUESTS = 200
NUM_CONCURRENT = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: `leaves_after` is the number of pieces after which its client disconnects."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    leaves_after: int | None


def _asks():
    draw = random.Random(0)
    shared = [draw.randrange(5, 700) for _ in range(120)]
    return [
        Ask(
            tuple(shared[: draw.choice([0, 0, 40, 120])])
            + tuple(draw.randrange(5, 700) for _ in range(draw.choice([1, 3, 20, 90]))),
            max_tokens=draw.choice([1, 4, 16, 40]),
            temperature=draw.choice([0.0, 0.0, 0.8, 1.5]),
            seed=draw.randrange(1 << 60),
            leaves_after=draw.choice([None, None, None, draw.randrange(4)]),
        )
        for _ in range(NUM_REQUESTS)
    ]


async def _text(client, ask):
    """What the server said: all of it, or what came before the client left."""
    stream = await client.completions.create(
        model="model",
        prompt=list(ask.prompt),
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        stream=True,
    )
    pieces = []
    async for chunk in stream:
        if len(pieces) == ask.leaves_after:
            break
        pieces.append(chunk.choices[0].text)
    await stream.close()
    return "".join(pieces)


async def _all(url, asks):
    limit = asyncio.Semaphore(NUM_CONCURRENT)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100
    ) as client:

        async def one(ask):
            async with limit:
                return await _text(client, ask)

        return await asyncio.gather(*map(one, asks))


def _alone(llm, ask):
    """The text of `ask` with nobody else about."""
    sampling = Sampling(temperature=ask.temperature, seed=ask.seed)
    chunks = llm.chunks(llm.open(ask.prompt, Params(ask.max_tokens, sampling)))
    return "".join(chunk.piece.text for chunk in chunks)


def could_say(reference, ask, text):
    """Whether one process could say what the server did, but for rounding."""
    sampling = Sampling(temperature=ask.temperature, seed=ask.seed)
    question = Question(ask.prompt, ask.max_tokens, sampling)
    return reference.could_say(question, text, is_whole=ask.leaves_after is None)


@pytest.mark.timeout(240)
def test_many_at_once_get_what_each_gets_alone(capsys):
    asks = _asks()
    with serving(num_ranks=3) as server:
        texts = asyncio.run(_all(server.url, asks))
        stats = server.settled()
        assert stats["num_waiting"] == stats["num_active"] == 0
        assert sum(stats["rank_slots"]) == sum(stats["kv_reserved_bytes"]) == 0
        # What is left on the ranks are prefixes kept for later.
        assert sum(stats["rank_kv_bytes"]) >= stats["prefix_bytes"] > 0
        assert stats["prefix_hits"] > 0
        assert len(set(stats["rank_digests"])) == 1
    reference = Reference(MODEL_DIR)
    num_different = 0
    with LLM(str(MODEL_DIR), batching="fixed:1,1,512", reuse_prefixes=False) as llm:
        for ask, text in zip(asks, texts, strict=True):
            alone = _alone(llm, ask)
            is_same = alone.startswith(text) if ask.leaves_after is not None else alone == text
            if not is_same:
                num_different += 1
                assert could_say(reference, ask, text)
    with capsys.disabled():
        print(f" [{num_different} of {NUM_REQUESTS} differ by a near tie] ", end="")
