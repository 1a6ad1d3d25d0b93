"""What a rank makes of frames that no rank sent: an error of the protocol, and nothing else.

    python -m benchmarks.fuzz_frames [--frames 1000000] [--seed 0]

Frames come of valid ones of every kind: changed bytes, cut, spliced, with other numbers, types
and depths, half of them under a header that is right for them, so that they reach the payload's
decoder; and of noise. Each must decode to a message or raise ProtocolError; what decodes must
encode. Prints how many did which, how long it took, and how far the memory grew.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgspec

from mlx_dist.cluster.memory import peak_rss_bytes
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import (
    HEADER_BYTES,
    MAGIC,
    WIRE_VERSION,
    AnyMessage,
    Message,
    Step,
    Tokens,
    decode,
    encode,
    expect,
)

KINDS: tuple[type[Message], ...] = typing.get_args(AnyMessage)
_SEQUENCE = 7
# Of a msgpack payload: integers, lengths and nesting that a decoder may trust too much.
_MARKS = (
    b"\xc0",
    b"\xc1",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\x00" * 7,
    b"\xcb\x7f\xf8" + b"\x00" * 6,
    b"\xcb\xff\xf0" + b"\x00" * 6,
    b"\x91" * 2000,
    b"\x81\x01" * 2000,
    b"\xa4\xff\xfe\xfd\xfc",
)
_HUGE: tuple[Any, ...] = (
    0,
    -1,
    1 << 31,
    1 << 63,
    (1 << 64) - 1,
    -(1 << 63),
    1e308,
    float("nan"),
    None,
    True,
    "",
    "x" * 5000,
    b"\0" * 5000,
    [],
    {},
    [[[[]]]],
    {"a": {"b": 1}},
)


def samples(random: random.Random) -> list[bytes]:
    """A frame of each kind of message, its fields filled by their types."""
    return [encode(_filled(kind, random), _SEQUENCE) for kind in KINDS for _ in range(3)]


def _filled(hint: Any, random: random.Random) -> Any:
    """Some value of the type `hint`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = typing.get_type_hints(hint)
        return hint(*(_filled(hints[name], random) for name in hint.__struct_fields__))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return random.choice(list(hint))
    if origin is list:
        return [_filled(inner[0], random) for _ in range(random.randrange(4))]
    if origin is tuple:
        return tuple(_filled(kind, random) for kind in inner)
    if origin is dict:
        return {_filled(inner[0], random): _filled(inner[1], random) for _ in range(2)}
    if inner:
        return _filled(random.choice(inner), random)
    plain: dict[Any, Callable[[], Any]] = {
        int: lambda: random.choice((0, 1, 5, 200, 70_000, 1 << 40)),
        float: random.random,
        str: lambda: random.choice(("", "a", "host-1", "ü" * 40)),
        bytes: lambda: random.randbytes(random.randrange(30)),
        bool: lambda: random.random() < 0.5,
        type(None): lambda: None,
    }
    return plain[hint]()


def framed(payload: bytes) -> bytes:
    """`payload` under a header that is right for it."""
    checksum = zlib.crc32(payload)
    header = struct.pack("<4sIIII", MAGIC, WIRE_VERSION, _SEQUENCE, len(payload), checksum)
    return header + payload


def spoiled(valid: Sequence[bytes], random: random.Random) -> bytes:
    """A frame that is none, or perhaps one of another message."""
    frame = bytearray(random.choice(valid))
    if random.random() < 0.05:
        return random.randbytes(random.randrange(200))
    payload = bytearray(frame[HEADER_BYTES:])
    if random.random() < 0.25:
        payload = bytearray(msgspec.msgpack.encode(_reshaped(bytes(payload), random)))
    for _ in range(random.choice((0, 1, 1, 2, 5))):
        random.choice(_CHANGES)(payload, valid, random)
    if random.random() < 0.6:
        return framed(bytes(payload))
    frame[HEADER_BYTES:] = payload
    for _ in range(random.choice((0, 1, 1, 4))):
        random.choice(_CHANGES)(frame, valid, random)
    return bytes(frame)


def _reshaped(payload: bytes, random: random.Random) -> Any:
    """The payload's own values with one of them exchanged, doubled, left out or wrapped."""
    root = msgspec.msgpack.decode(payload)
    part = root
    while isinstance(part, list) and part:
        index = random.randrange(len(part))
        if not isinstance(part[index], list) or random.random() < 0.4:
            change = random.randrange(4)
            if change == 0:
                part[index] = random.choice(_HUGE)
            elif change == 1:
                part.insert(index, part[index])
            elif change == 2:
                del part[index]
            else:
                part[index] = [part[index]]
            break
        part = part[index]
    return root


def _flip(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    start = random.randrange(len(data) + 1)
    mark = random.choice(_MARKS)
    data[start : start + random.choice((0, 1, len(mark)))] = mark


def _cut(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _leave_out(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    start = random.randrange(len(data) + 1)
    del data[start : start + random.randrange(1, 9)]


def _repeat(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = data[start : start + random.randrange(1, 40)] * random.randrange(1, 5)


def _splice(data: bytearray, valid: Sequence[bytes], random: random.Random) -> None:
    other = random.choice(valid)[HEADER_BYTES:]
    data[random.randrange(len(data) + 1) :] = other[random.randrange(len(other) + 1) :]


def _random_bytes(data: bytearray, _valid: Sequence[bytes], random: random.Random) -> None:
    start = random.randrange(len(data) + 1)
    data[start : start + 4] = random.randbytes(4)


_CHANGES = (_flip, _flip, _overwrite, _cut, _leave_out, _repeat, _splice, _random_bytes)


def fuzz(num_frames: int, seed: int) -> Counter[str]:
    """Decode so many frames; how many were refused, and how many were messages after all.

    Whatever else than ProtocolError comes of one is raised, with the frame.
    """
    source = random.Random(seed)
    valid = samples(source)
    counts: Counter[str] = Counter()
    for _ in range(num_frames):
        frame = spoiled(valid, source)
        try:
            counts[_judged(frame)] += 1
        except BaseException as error:
            error.add_note(f"of the frame {frame.hex()[:4000]}")
            raise
    return counts


def _judged(frame: bytes) -> str:
    try:
        message = decode(frame, _SEQUENCE)
    except ProtocolError as error:
        assert "\n" not in str(error)
        return (
            "refused by its payload" if "holds no known" in str(error) else "refused by its frame"
        )
    # What a trace shows, and what is passed on.
    assert len(repr(message)) > 0
    assert isinstance(decode(encode(message, _SEQUENCE), _SEQUENCE), type(message))
    for kind in (Step, Tokens):
        try:
            expect(message, kind)
        except ProtocolError:
            continue
    return f"a message, {type(message).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    # What a run needs at all.
    fuzz(20_000, asked.seed + 1)
    before_bytes, start_s = peak_rss_bytes(), time.perf_counter()
    counts = fuzz(asked.frames, asked.seed)
    taken_s, grown_bytes = time.perf_counter() - start_s, peak_rss_bytes() - before_bytes
    for what, count in counts.most_common():
        print(f"{count:9,} {what}")
    print(f"{asked.frames:,} frames in {taken_s:.0f} s; memory grew by {grown_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
