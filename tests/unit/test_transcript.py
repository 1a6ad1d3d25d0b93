"""What is new in a stream that is told again, however either is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dist.serve.relayed import tokens_comment
from mlx_dist.supervise.transcript import DivergedError, Transcript

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def event(choices, **more):
    return b"data: " + json.dumps(HEAD | {"choices": choices} | more).encode() + b"\n\n"


def told(tokens, sizes, usage=None):
    """The stream of one choice whose tokens are (kind, text); `sizes` of them share an event."""
    events, left, number, role = [], list(tokens), 0, {"role": "assistant"}
    for size in [*sizes, len(left)]:
        some, left = left[:size], left[size:]
        if not some:
            continue
        delta, role = role | {"content": ""} if role else {}, {}
        for kind, text in some:
            if kind == "tool_calls":
                call = {"id": f"call_{text}", "function": {"name": "f", "arguments": text}}
                delta.setdefault(kind, []).append(call)
            else:
                delta[kind] = delta.get(kind, "") + text
        logprobs = {"content": [{"token": text, "logprob": -1.0} for _, text in some]}
        reason = None if left else "stop"
        comment = tokens_comment(0, range(number, number + len(some)))
        number += len(some)
        part = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        events.append(comment + event([part]))
    if usage:
        events.append(event([], usage=usage))
    return b"".join([*events, b"data: [DONE]\n\n"])


def understood(stream):
    """What a client makes of a stream."""
    answer = {"logprobs": []}
    for line in stream.decode().split("\n"):
        if not line.startswith("data: {"):
            continue
        said = json.loads(line[6:])
        if said.get("usage"):
            assert "usage" not in answer
            answer["usage"] = said["usage"]
        for choice in said["choices"]:
            for name, value in choice["delta"].items():
                answer[name] = answer[name] + value if name in answer else value
            if choice["logprobs"]:
                answer["logprobs"] += [one["token"] for one in choice["logprobs"]["content"]]
            if choice["finish_reason"]:
                assert "finish_reason" not in answer
                answer["finish_reason"] = choice["finish_reason"]
    return answer


KINDS = st.sampled_from(["content", "reasoning_content", "tool_calls"])
TOKENS = st.lists(st.tuples(KINDS, st.text("abé🙂", min_size=1, max_size=4)), min_size=1)
SIZES = st.lists(st.integers(1, 4), max_size=8)


@given(TOKENS, st.lists(st.tuples(SIZES, st.floats(0, 1)), min_size=1, max_size=4), SIZES)
def test_a_client_understands_what_an_undisturbed_one_does(tokens, broken, sizes):
    transcript, got = Transcript(), b""
    usage = {"completion_tokens": len(tokens)}
    for size, share in broken:
        stream = told(tokens, size, usage)
        got += transcript.feed(stream[: int(share * len(stream))])
        transcript.rewind()
    stream = told(tokens, sizes, usage)
    for start in range(0, len(stream), 50):
        got += transcript.feed(stream[start : start + 50])
    assert transcript.is_done
    assert understood(got) == understood(told(tokens, [], usage))
    assert b":t" not in got


@given(TOKENS, SIZES, st.data())
def test_the_tokens_so_far_are_known(tokens, sizes, data):
    transcript = Transcript()
    stream = told(tokens, sizes)
    num_events = data.draw(st.integers(0, stream.count(b"\n\n") - 1))
    for part in stream.split(b"\n\n")[:num_events]:
        transcript.feed(part + b"\n\n")
    [known] = transcript.tokens or [[]]
    assert known == list(range(len(known)))
    transcript.rewind()
    transcript.feed(stream)
    assert transcript.tokens == ([list(range(len(tokens) - 1))] if len(tokens) > 1 else [])


def test_another_answer_is_noticed():
    transcript = Transcript()
    transcript.feed(told([("content", "abc"), ("content", "d")], [1])[:-20])
    transcript.rewind()
    with pytest.raises(DivergedError):
        transcript.feed(told([("content", "abX"), ("content", "d")], [1]))


def test_probabilities_may_differ_and_tokens_may_not():
    transcript = Transcript()
    first = told([("content", "a"), ("content", "b")], [1])
    transcript.feed(first)
    transcript.rewind()
    assert transcript.feed(first.replace(b"-1.0", b"-1.00001")) == b"data: [DONE]\n\n"
    transcript.rewind()
    with pytest.raises(DivergedError):
        transcript.feed(first.replace(b'"token": "a"', b'"token": "z"'))


def test_completions_are_cut_as_chats_are():
    def part(text, tokens, offset):
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [-1.0] * len(tokens),
            "top_logprobs": [{}] * len(tokens),
            "text_offset": list(range(offset, offset + len(tokens))),
        }
        return event([{"index": 1, "text": text, "logprobs": logprobs, "finish_reason": None}])

    transcript = Transcript()
    transcript.feed(part("ab", ["a", "b"], 0))
    transcript.rewind()
    [new] = [json.loads(transcript.feed(part("abc", ["a", "b", "c"], 0))[6:])["choices"][0]]
    assert (new["text"], new["logprobs"]["tokens"], new["logprobs"]["text_offset"]) == (
        "c",
        ["c"],
        [2],
    )


def test_an_error_is_held_back():
    transcript = Transcript()
    said = b'data: {"error":{"message":"m","code":"ending"}}\n\n'
    assert transcript.feed(told([("content", "a"), ("content", "b")], [1])[:-14] + said)
    assert transcript.error == said
    assert not transcript.is_done
    transcript.rewind()
    assert transcript.error is None


def test_comments_pass():
    assert Transcript().feed(b": keep-alive\n\n:t 0 5\n\n") == b": keep-alive\n\n"
