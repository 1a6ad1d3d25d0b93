"""Everything that crosses ranks on the control plane, and its frame.

Knows no arrays and no MPI. A frame is a 20-byte header (magic, wire version, sequence number,
payload length, CRC-32, all little-endian) and a msgpack payload; docs/wire.md has the tables.
"""

from __future__ import annotations

import struct
import zlib
from typing import TypeVar

import msgspec
from msgspec import Struct

from mlx_dist.errors import ProtocolError

MAGIC = b"MXDW"
WIRE_VERSION = 3
# The number of last tokens that penalties look at, mlx-lm's default.
PENALTY_CONTEXT = 20
_HEADER = struct.Struct("<4sIIII")
HEADER_BYTES = _HEADER.size


class Message(Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: an immutable struct whose first element is its type's name."""


class Sampling(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the last stage turns the logits of one sequence into tokens.

    `temperature` 0 is greedy. `top_p` 1, `top_k` 0, `min_p` 0 and penalties of 0 (repetition: 1)
    are off. `seed` and the position of a token fix that token's random number, so that neither
    the cut of the model nor the other sequences of a microbatch can change it. `grammar`, in
    llguidance's form, restricts the text. `num_logprobs` asks for the logarithm of the sampled
    token's probability and of that many of the likeliest.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    grammar: str | None = None
    num_logprobs: int | None = None


class Opening(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence that begins: its slot, how it is sampled, and what it takes from a kept entry.

    Its caches begin as a copy of the first `num_cached` tokens of `entry`, or empty. `prefix` are
    the last of these tokens, which the penalties look at.
    """

    slot: int
    sampling: Sampling
    entry: int | None = None
    num_cached: int = 0
    prefix: list[int] = []


class Open(Message, frozen=True):
    """Plan: make the microbatch `microbatch` of these sequences."""

    microbatch: int
    sequences: list[Opening]


class Row(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One sequence's share of a step: `tokens` that follow the `position` tokens already cached."""

    slot: int
    position: int
    tokens: list[int]


class Step(Message, frozen=True):
    """Plan: run these rows, all of the microbatch in its order, through every stage.

    With `sample`, the last stage samples one token a row. It answers `Tokens` either way. With
    `record`, every stage keeps what its layers put out, for `mlx-dist verify`.
    """

    microbatch: int
    rows: list[Row]
    sample: bool = True
    record: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L): sequences, and tokens of the longest; shorter ones are padded on the right."""
        return len(self.rows), max(len(row.tokens) for row in self.rows)


class Merge(Message, frozen=True):
    """Plan: the sequences of microbatch `source` follow those of `target` from now on."""

    source: int
    target: int


class Close(Message, frozen=True):
    """Plan: the sequences in these slots are over; free their caches."""

    slots: list[int]


class Keep(Message, frozen=True):
    """Plan: keep a copy of the caches of `slot`, called `entry`, for later sequences."""

    slot: int
    entry: int


class Drop(Message, frozen=True):
    """Plan: free these kept entries."""

    entries: list[int]


class Probe(Message, frozen=True):
    """Plan: every rank gives an account of itself, and the last one answers `Tokens`."""


class Shutdown(Message, frozen=True):
    """Plan: no more plans follow."""


Plan = Open | Step | Merge | Close | Keep | Drop | Probe | Shutdown


class Vitals(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One rank's state after its part of a plan: time it computed for it, and what it holds."""

    step_s: float
    num_slots: int
    kv_bytes: int


class Hidden(Message, frozen=True):
    """Goes right before the activations of a step, which follow on the fabric.

    A probe sends it without activations. `vitals` are those of the ranks so far.
    """

    shape: list[int]
    dtype: str
    checksum: int | None = None
    vitals: list[Vitals] = []


class Logprobs(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The natural logarithm of a sampled token's probability, and the likeliest tokens with theirs.

    Of the model's own distribution, before temperature, penalties and masks.
    """

    logprob: float
    top: list[tuple[int, float]]


class Tokens(Message, frozen=True):
    """From the last stage to the leader, for each step: a sampled token for each row, if any.

    `logprobs` has an entry a row if any row asked for them. `vitals` are of all ranks.
    """

    microbatch: int
    tokens: list[int]
    logprobs: list[Logprobs | None] = []
    vitals: list[Vitals] = []


class KvCost(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one sequence costs one rank: some bytes, and for every token those of `growing`.

    A `growing` pair is bytes a token and the number of tokens after which they grow no more.
    """

    fixed_bytes: int = 0
    growing: list[tuple[int, int | None]] = []

    def bytes_for(self, num_tokens: int, slack: int = 0) -> int:
        """Bytes of a sequence of `num_tokens`; a window may hold `slack` tokens more than it is."""
        return self.fixed_bytes + sum(
            cost * (num_tokens if window is None else min(num_tokens, window + slack))
            for cost, window in self.growing
        )


class Report(Message, frozen=True):
    """What one rank says of itself: after loading or after a run."""

    rank: int
    host: str
    layers: tuple[int, int]
    weights_bytes: int
    peak_rss_bytes: int
    load_s: float
    kv_cost: KvCost = KvCost()
    kv_budget_bytes: int = 0
    busy_s: float = 0.0
    sent_bytes: int = 0


class Speeds(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How fast a machine computes a model's parts, on the device that it runs on.

    `product_s` and `quantized_s` give, for a number of tokens in a step, the seconds that each
    weight of a matrix costs which all of these tokens are multiplied with: in the model's dtype,
    and quantized to `bits`. `op_s` is what a small operation costs, `element_s` an element of an
    activation function, `stream_bytes_per_s` how fast memory is read.
    """

    dtype: str
    bits: int
    product_s: dict[int, float]
    quantized_s: dict[int, float]
    stream_bytes_per_s: float
    op_s: float
    element_s: float


class Interface(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A network interface that is up.

    `kind` is thunderbolt, ethernet, wifi, loopback, virtual or other; `gbit_s` is its nominal
    rate, or None where the system does not tell.
    """

    name: str
    kind: str
    address: str
    gbit_s: float | None = None


class MachineReport(Message, frozen=True):
    """What one rank says of the machine it runs on. Read, not measured.

    `usable_bytes` is what this rank may allocate, the weights included: what is available now
    (on macOS within Metal's recommended working set, on Linux within the container's limit),
    divided by the ranks of its host. `cores` are performance and efficiency cores. `device` is
    cpu or gpu; `versions` name the system, Python and packages. `speeds` are None until measured.
    """

    rank: int
    host: str
    chip: str
    cores: tuple[int, int]
    gpu_cores: int
    device: str
    memory_bytes: int
    usable_bytes: int
    versions: dict[str, str]
    interfaces: list[Interface]
    speeds: Speeds | None = None


class Placing(Message, frozen=True):
    """The leader's decision who holds which layers: rank, start, end of each stage, in order."""

    shares: list[tuple[int, int, int]]


class Holding(Message, frozen=True):
    """Which version of the model a rank has, by its fingerprint, or why it has none."""

    fingerprint: str = ""
    reason: str = ""


class Outline(Message, frozen=True):
    """From the leader, rank to rank: what describes the model, in `Part`s that follow.

    `files` are the names with numbers of bytes: of a small file all of them, of a weight file its
    header. `weights` gives the size of each weight file.
    """

    fingerprint: str
    files: list[tuple[str, int]]
    weights: dict[str, int]


class Part(Message, frozen=True):
    """The next bytes of an outline."""

    data: bytes

    def __repr__(self) -> str:
        # What a trace shows.
        return f"Part({len(self.data)} bytes)"


class Wanted(Message, frozen=True):
    """The tensors that a rank must be sent, in the order in which it takes them.

    By their places in the sorted list of the names of all tensors in the model's files.
    """

    tensors: list[int]


class Tensor(Message, frozen=True):
    """Goes right before the bytes of one tensor, with their CRC-32."""

    place: int
    checksum: int


class Address(Message, frozen=True):
    """Where a rank is: its host's name and, for the ring, the `ip:port` it listens on."""

    host: str
    endpoint: str = ""


class Ping(Message, frozen=True):
    """Measures a link: goes to a rank that sends it back.

    Either its `padding` makes the frame as long as is asked for, or `num_arrays` of `array_bytes`
    each follow on the fabric, and it is those that are sent back.
    """

    array_bytes: int = 0
    num_arrays: int = 0
    padding: bytes = b""


class LinkReport(Message, frozen=True):
    """What one rank says of its links to every rank: seconds one way and bytes a second, or None.

    `used` are the interfaces that led there, `interfaces` all that this rank's host has.
    """

    fabric: list[tuple[float, float] | None]
    control: list[tuple[float, float] | None]
    used: list[Interface | None]
    interfaces: list[Interface]


class Outcome(Message, frozen=True):
    """How one rank fared in something that all ranks do together."""

    error: str | None = None


class Identity(Message, frozen=True):
    """What must be equal on all ranks before they compute together."""

    host: str
    facts: dict[str, str]


class Recording(Message, frozen=True):
    """For each recorded step, what each of a rank's layers put out, as float32 bytes.

    The last rank adds the logits.
    """

    steps: list[list[bytes]]


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
    | Outcome
    | Identity
    | Recording
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
    except msgspec.DecodeError as error:
        raise ProtocolError(f"frame {sequence} holds no known message: {error}") from None
    return message


def expect(message: AnyMessage, kind: type[M]) -> M:
    """`message` as the `kind` that is due. Raises ProtocolError if it is another."""
    if not isinstance(message, kind):
        raise ProtocolError(f"{type(message).__name__} arrived where {kind.__name__} was due")
    return message
