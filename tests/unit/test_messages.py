"""Frames hold what was put in, and nothing damaged passes for a message."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fuzz_frames
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import (
    HEADER_BYTES,
    Beat,
    Close,
    Drop,
    Hidden,
    Holding,
    Identity,
    Interface,
    Keep,
    LinkReport,
    Logprobs,
    MachineReport,
    Merge,
    Open,
    Opening,
    Outcome,
    Outline,
    Part,
    Ping,
    Placing,
    Probe,
    Recording,
    Report,
    Row,
    Sampling,
    Shutdown,
    Speeds,
    State,
    Step,
    SumReport,
    Tensor,
    Tokens,
    Vitals,
    Want,
    Wanted,
    decode,
    encode,
    expect,
)

counts = st.integers(0, 2**31)
tokens = st.lists(counts, min_size=1, max_size=50)
rows = st.builds(Row, counts, counts, tokens)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_k=counts,
    logit_bias=st.dictionaries(counts, st.floats(-100, 100), max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
openings = st.builds(Opening, counts, samplings, st.none() | counts, counts, tokens)
vitals = st.lists(st.builds(Vitals, st.floats(0, 9), counts, counts, counts), max_size=3)
logprobs = st.none() | st.builds(
    Logprobs, st.floats(-99, 0), st.lists(st.tuples(counts, st.floats(-99, 0)), max_size=3)
)
interfaces = st.builds(Interface, st.text(), st.just("wifi"), st.text(), st.none())
links = st.lists(st.none() | st.tuples(st.floats(0, 9), st.floats(0, 1e12)), max_size=3)
messages = st.one_of(
    st.builds(Open, counts, st.lists(openings, max_size=3)),
    st.builds(Merge, counts, counts),
    st.builds(Keep, counts, counts),
    st.builds(Drop, tokens),
    st.just(Probe()),
    st.builds(Step, counts, st.lists(rows, min_size=1, max_size=4), st.booleans(), st.booleans()),
    st.builds(Close, tokens),
    st.just(Shutdown()),
    st.builds(
        Hidden,
        st.lists(counts, max_size=4),
        st.sampled_from(["float32", "bfloat16"]),
        st.none() | counts,
        vitals,
    ),
    st.builds(Tokens, counts, tokens, st.lists(logprobs, max_size=3), vitals),
    st.builds(Ping, counts, counts, st.binary(max_size=50)),
    st.builds(SumReport, st.dictionaries(st.integers(1, 2**40), st.floats(0, 10))),
    st.builds(LinkReport, links, links, st.lists(st.none() | interfaces), st.lists(interfaces)),
    st.builds(Outcome, st.none() | st.text()),
    st.builds(Beat, st.sampled_from(State), counts, st.floats(0, 9), st.floats(0, 9), st.text()),
    st.builds(Identity, st.text(), st.dictionaries(st.text(), st.text())),
    st.builds(Placing, st.lists(st.tuples(counts, counts, counts, counts, tokens))),
    st.builds(Holding, st.text(), st.text()),
    st.builds(
        Outline,
        st.text(),
        st.lists(st.tuples(st.text(), counts), max_size=3),
        st.dictionaries(st.text(), counts, max_size=3),
    ),
    st.builds(Part, st.binary(max_size=50)),
    st.builds(
        Wanted, st.lists(st.builds(Want, counts, counts, st.lists(st.tuples(counts, counts))))
    ),
    st.builds(Tensor, counts, counts),
    st.builds(Recording, st.lists(st.lists(st.binary()))),
    st.builds(
        MachineReport,
        counts,
        st.text(),
        st.text(),
        st.tuples(counts, counts),
        counts,
        st.just("cpu"),
        counts,
        counts,
        st.dictionaries(st.text(), st.text()),
        st.lists(interfaces),
        st.none()
        | st.builds(
            Speeds,
            st.just("float32"),
            counts,
            st.dictionaries(counts, st.floats(0, 1)),
            st.dictionaries(counts, st.floats(0, 1)),
            st.floats(0, 1e12),
            st.floats(0, 1),
            st.floats(0, 1),
        ),
    ),
    st.builds(
        Report, counts, st.text(), st.tuples(counts, counts), counts, counts, st.floats(0, 9)
    ),
)
sequences = st.integers(0, 2**32 - 1)


@given(messages, sequences)
def test_a_frame_holds_what_was_put_in(message, sequence):
    assert decode(encode(message, sequence), sequence) == message


@given(messages, sequences, st.data())
def test_a_changed_byte_is_noticed(message, sequence, data):
    frame = bytearray(encode(message, sequence))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        decode(bytes(frame), sequence)


@given(messages, sequences, st.data())
def test_a_cut_frame_is_noticed(message, sequence, data):
    frame = encode(message, sequence)
    with pytest.raises(ProtocolError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))], sequence)


@given(st.binary(max_size=200))
def test_noise_is_no_message(noise):
    with pytest.raises(ProtocolError):
        decode(noise, 0)


def test_a_frame_out_of_turn_is_named():
    with pytest.raises(ProtocolError, match="frame 7 arrived where frame 6 was due"):
        decode(encode(Shutdown(), 7), 6)


def test_another_wire_version_is_named():
    frame = bytearray(encode(Shutdown(), 0))
    frame[4] = 99
    with pytest.raises(ProtocolError, match="wire version 99"):
        decode(bytes(frame), 0)


def test_a_known_message_of_the_wrong_kind_is_named():
    with pytest.raises(ProtocolError, match="Close arrived where Tokens was due"):
        expect(Close([3]), Tokens)


def test_whatever_frames_come_nothing_but_an_error_of_the_protocol_does():
    """`python -m benchmarks.fuzz_frames` does this a million times."""
    fuzz_frames.fuzz(2_000, seed=1)
    tracemalloc.start()
    counts = fuzz_frames.fuzz(18_000, seed=2)
    held_bytes, _peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 1_000_000
    assert counts["refused by its frame"] > 5_000
    assert counts["refused by its payload"] > 5_000
    reached = {what.removeprefix("a message, ") for what in counts}
    assert {kind.__name__ for kind in fuzz_frames.KINDS} <= reached


@pytest.mark.parametrize(
    "payload",
    [b"\x91\xa2\x81\x01", b"\x91\xa3a\nb", b"\x92\xa4Part\xdb\xff\xff\xff\xff", b"\x91" * 9999],
    ids=["no UTF-8", "two lines", "a length without end", "deep"],
)
def test_a_payload_that_is_none_is_refused_in_one_line(payload):
    with pytest.raises(ProtocolError) as refused:
        decode(fuzz_frames.framed(payload), 7)
    assert str(refused.value).startswith("frame 7 holds no known message")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


def test_the_header_has_the_documented_size():
    assert HEADER_BYTES == 20
