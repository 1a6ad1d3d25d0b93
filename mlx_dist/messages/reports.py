"""What ranks say of themselves, of their machines and links, and how a model is fed to them."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from mlx_dist.messages.plans import Message


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
    """What one rank says of itself: after loading or after a run.

    Of its layers it holds slice number `slice[0]`, of as many as `slice[1]` has sizes of.
    """

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
    slice: tuple[int, list[int]] = (0, [1])


class Speeds(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How fast a machine computes a model's parts, on the device that it runs on.

    `product_s` and `quantized_s` give, for a number of tokens in a step, the seconds that each
    weight of a matrix costs which all of these tokens are multiplied with: in the model's dtype,
    and quantized to `bits`. `op_s` is what a small operation costs, `element_s` an element of an
    activation function, `head_s` one of many small products at a time, as attention has them for
    each head of each sequence, and `stream_bytes_per_s` how fast memory is read.
    """

    dtype: str
    bits: int
    product_s: dict[int, float]
    quantized_s: dict[int, float]
    stream_bytes_per_s: float
    op_s: float
    element_s: float
    head_s: float


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
    """The leader's decision who holds which layers, in order.

    Of each share: rank, start, end, and the place and the weights of its slice.
    """

    shares: list[tuple[int, int, int, int, list[int]]]


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


class Want(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor that a rank must be sent, or parts of it.

    `place` is among the sorted names of all tensors in the model's files. Parts are ranges
    [start, end) of `num_parts` along `axis`; without ranges it is the whole tensor.
    """

    place: int
    axis: int = 0
    ranges: list[tuple[int, int]] = []
    num_parts: int = 1


class Wanted(Message, frozen=True):
    """The tensors that a rank must be sent, in the order in which it takes them."""

    tensors: list[Want]


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


class SumReport(Message, frozen=True):
    """What sums over its tensor group take on one rank: seconds by bytes."""

    seconds: dict[int, float]


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


class State(StrEnum):
    """What a rank's main thread is doing."""

    starting = "starting"
    loading = "loading"
    idle = "idle"
    computing = "computing"
    waiting = "waiting"
    leaving = "leaving"


class Beat(Message, frozen=True):
    """A rank's sign of life, on a communicator of its own.

    `count` changes with every step of progress: a plan that begins, a wait that ends, bytes that
    are read. It has been in `state` for `for_s` and may be for `patience_s`, if it is computing,
    loading or waiting.
    """

    state: State
    count: int = 0
    for_s: float = 0.0
    patience_s: float = 0.0
    doing: str = ""
