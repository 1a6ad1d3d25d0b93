"""Everything that crosses ranks on the control plane, and its frame.

Knows no arrays and no MPI. A frame is a 20-byte header (magic, wire version, sequence number,
payload length, CRC-32, all little-endian) and a msgpack payload; docs/wire.md has the tables.
"""

from __future__ import annotations

import struct
import zlib
from typing import TypeVar

import msgspec

from mlx_dist.errors import ProtocolError
from mlx_dist.messages.plans import (
    PENALTY_CONTEXT,
    Close,
    Drop,
    Hidden,
    Keep,
    Logprobs,
    Merge,
    Message,
    Open,
    Opening,
    Plan,
    Probe,
    Row,
    Sampling,
    Shutdown,
    Step,
    Tokens,
    Vitals,
)
from mlx_dist.messages.reports import (
    Address,
    Beat,
    Holding,
    Identity,
    Interface,
    KvCost,
    LinkReport,
    MachineReport,
    Outcome,
    Outline,
    Part,
    Ping,
    Placing,
    Recording,
    Report,
    Speeds,
    State,
    SumReport,
    Tensor,
    Want,
    Wanted,
)

__all__ = [
    "Address",
    "AnyMessage",
    "Beat",
    "Close",
    "Drop",
    "HEADER_BYTES",
    "Hidden",
    "Holding",
    "Identity",
    "Interface",
    "Keep",
    "KvCost",
    "LinkReport",
    "Logprobs",
    "MAGIC",
    "MachineReport",
    "Merge",
    "Message",
    "Open",
    "Opening",
    "Outcome",
    "Outline",
    "PENALTY_CONTEXT",
    "Part",
    "Ping",
    "Placing",
    "Plan",
    "Probe",
    "Recording",
    "Report",
    "Row",
    "Sampling",
    "Shutdown",
    "Speeds",
    "State",
    "Step",
    "SumReport",
    "Tensor",
    "Tokens",
    "Vitals",
    "WIRE_VERSION",
    "Want",
    "Wanted",
    "decode",
    "encode",
    "expect",
]

MAGIC = b"MXDW"
WIRE_VERSION = 4
_HEADER = struct.Struct("<4sIIII")
HEADER_BYTES = _HEADER.size

AnyMessage = (
    Plan
    | Hidden
    | Tokens
    | Report
    | MachineReport
    | Placing
    | Holding
    | Outline
    | Part
    | Wanted
    | Tensor
    | Address
    | Ping
    | LinkReport
    | SumReport
    | Outcome
    | Identity
    | Recording
    | Beat
)
M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message, sequence: int) -> bytes:
    """The frame of `message`, the `sequence`-th from its sender to its receiver."""
    payload = _encoder.encode(message)
    checksum = zlib.crc32(payload)
    return _HEADER.pack(MAGIC, WIRE_VERSION, sequence, len(payload), checksum) + payload


def decode(frame: bytes, sequence: int) -> AnyMessage:
    """The message in `frame`.

    Raises ProtocolError if the frame is damaged, of another wire version, not the `sequence`-th,
    or holds something that is no message.
    """
    if len(frame) < HEADER_BYTES:
        raise ProtocolError(f"a frame of {len(frame)} bytes is shorter than its header")
    magic, version, got_sequence, length, checksum = _HEADER.unpack_from(frame)
    payload = memoryview(frame)[HEADER_BYTES:]
    if magic != MAGIC:
        raise ProtocolError(f"a frame begins with {magic!r} instead of {MAGIC!r}")
    if version != WIRE_VERSION:
        raise ProtocolError(
            f"a frame has wire version {version} and this rank speaks {WIRE_VERSION}; "
            "install one version of mlx_dist on every host"
        )
    if got_sequence != sequence:
        raise ProtocolError(f"frame {got_sequence} arrived where frame {sequence} was due")
    if length != len(payload) or checksum != zlib.crc32(payload):
        raise ProtocolError(f"frame {sequence} of {length} bytes arrived damaged")
    try:
        message: AnyMessage = _decoder.decode(payload)
    # Of text that is no UTF-8, and of too deep a payload, msgspec says something else.
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        # What it quotes of the payload may be long, and no text to print.
        reason = str(error).encode("unicode_escape").decode()[:200]
        raise ProtocolError(f"frame {sequence} holds no known message: {reason}") from None
    return message


def expect(message: AnyMessage, kind: type[M]) -> M:
    """`message` as the `kind` that is due. Raises ProtocolError if it is another."""
    if not isinstance(message, kind):
        raise ProtocolError(f"{type(message).__name__} arrived where {kind.__name__} was due")
    return message
