"""Plans, and what answers them on their way through the stages."""

from __future__ import annotations

from msgspec import Struct

# The number of last tokens that penalties look at, mlx-lm's default.
PENALTY_CONTEXT = 20


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
        return len(self.rows), max((len(row.tokens) for row in self.rows), default=0)


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
    """One rank's state after its part of a plan: time it computed for it, and what it holds.

    `digest` is of its slots and kept entries, the same on every rank.
    """

    step_s: float
    num_slots: int
    kv_bytes: int
    digest: int


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
