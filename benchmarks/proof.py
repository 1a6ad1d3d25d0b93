"""The proof that a model cut anywhere gives the very logits of the model in one piece.

Knows stages and the model they are cut from; knows nothing of what a family is.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.tiny_models import VOCAB_SIZE
from mlx_dist.config import Dtype
from mlx_dist.messages import Row, Step
from mlx_dist.model.families import dissect
from mlx_dist.model.files import find_model
from mlx_dist.model.stage import Stage
from mlx_dist.model.weights import LoadedModel, load_stage

# Prefill in chunks that cross the sliding window, then decode.
_STEP_LENGTHS = (5, 11, 3, 1, 1, 1)
# One sequence alone, which has plain caches.
_MICROBATCH = 0
_SLOT = 0

Cut = tuple[int, ...]  # where the stages end, the last at the number of layers


class ProofError(Exception):
    """Why a family is not proven, in a line for the user."""


class UnsupportedError(ProofError):
    """mlx-lm itself does not run this model here, such as a mixture in bfloat16 on a CPU."""


def some_cuts(num_layers: int) -> list[Cut]:
    """Two cuts in two, two in three, and the cut into single layers."""
    n = num_layers
    return [(1, n), (n - 3, n), (2, n - 3, n), (n // 2, n // 2 + 1, n), tuple(range(1, n + 1))]


class Rig:
    """A model folder, its logits in one piece, and its stages, each a model of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages: dict[tuple[int, int], tuple[LoadedModel, Stage]] = {}
        self.steps_BL = _random_tokens()
        self.model, _ = load_model(folder)
        model = self.model
        self._sizes = {
            name: array.nbytes for name, array in dict(tree_flatten(model.parameters())).items()
        }
        self._anatomy = dissect(model)
        self.num_layers = self._anatomy.num_layers
        cache = make_prompt_cache(model)
        self.cache_kinds = tuple(sorted({type(c).__name__ for c in cache}))
        self.expected_BLV: list[mx.array] = []
        for tokens_BL in self.steps_BL:
            self.expected_BLV.append(model(tokens_BL, cache=cache))
            mx.eval(self.expected_BLV[-1], [c.state for c in cache if not c.empty()])
        if any(mx.any(mx.isnan(logits)).item() for logits in self.expected_BLV):
            raise ProofError("the tiny model's logits are not numbers")

    def stage(self, start: int, end: int) -> Stage:
        """The stage [start, end); what it does not own is not a number."""
        if (start, end) not in self._stages:
            files = find_model(str(self._folder), require_proven=False)
            loaded = load_stage(files, start, end, Dtype.auto, lambda _d, _t: None)
            _poison(loaded, start, end)
            stage = Stage(loaded.model, loaded.anatomy, start, end)
            self._stages[start, end] = loaded, stage
        return self._stages[start, end][1]

    def forget_stages(self) -> None:
        """Let the next use of a stage load it anew."""
        self._stages.clear()

    def logits(self, stages: Sequence[Stage], num_steps: int | None = None) -> Iterator[mx.array]:
        """The logits of each step, (B, L, V), when `stages` run one after another."""
        for stage in stages:
            stage.slots.open(_MICROBATCH, [_SLOT], [None])
        try:
            for step in steps_of(self.steps_BL[:num_steps]):
                yield run(stages, step)
        finally:  # However many of them are taken.
            for stage in stages:
                stage.slots.close([_SLOT])

    def stages(self, cut: Cut) -> list[Stage]:
        return [self.stage(a, b) for a, b in zip((0, *cut), cut, strict=False)]

    def check(self, cut: Cut) -> None:
        """Raise ProofError unless `cut` gives the very logits of the model in one piece."""
        for step, got_BLV in enumerate(self.logits(self.stages(cut))):
            if mx.array_equal(got_BLV, self.expected_BLV[step]):
                continue
            where = f"cut after layers {', '.join(map(str, cut[:-1]))}"
            if mx.any(mx.isnan(got_BLV)).item():
                raise ProofError(f"a stage needs weights that are not its own ({where})")
            raise ProofError(f"logits differ from those in one piece ({where}, step {step})")
        if step != len(self.steps_BL) - 1:
            raise ProofError("not every step was run")
        self._check_bytes(cut)

    def check_every_cut(self) -> int:
        """Raise ProofError unless every cut gives the very logits; answer how many there are.

        Single layers first; then every stage [start, end) must put out, from what reaches it,
        what reaches the next. A cut is a row of such stages, so all of them give the same logits.
        """
        n = self.num_layers
        self.check(tuple(range(1, n + 1)))
        reaching: list[list[Any]] = [[None] * len(self.steps_BL)]
        for i in range(n):
            reaching.append(self._outputs(self.stage(i, i + 1), reaching[i]))
        for start, end in itertools.combinations(range(n + 1), 2):
            outputs = self._outputs(self.stage(start, end), reaching[start])
            if not all(map(mx.array_equal, outputs, reaching[end])):
                raise ProofError(f"layers {start} to {end - 1} differ from those in one piece")
        for i in range(1, n):
            self._check_bytes((i, n))
        return 1 << (n - 1)

    def _outputs(self, stage: Stage, inputs: Sequence[mx.array | None]) -> list[mx.array]:
        """What `stage` puts out at each step, given what reaches it."""
        stage.slots.open(_MICROBATCH, [_SLOT], [None])
        outputs = []
        for step, hidden_BLD in zip(steps_of(self.steps_BL), inputs, strict=True):
            outputs.append(stage.forward(step, hidden_BLD))
            mx.eval(outputs[-1], stage.slots.states(_MICROBATCH))
        stage.slots.close([_SLOT])
        return outputs

    def _check_bytes(self, cut: Cut) -> None:
        """Every parameter is owned: a layer's by one stage, the others' by those that use them."""
        stages = list(zip((0, *cut), cut, strict=False))
        expected_bytes = 0
        for name, num_bytes in self._sizes.items():
            num_owners = sum(self._anatomy.owns(name, a, b) for a, b in stages)
            is_of_layer = name.startswith(self._anatomy.layers_path + ".")
            if num_owners < 1 or (is_of_layer and num_owners > 1):
                raise ProofError(f"{num_owners} stages own {name}")
            expected_bytes += num_owners * num_bytes
        if sum(self._stages[stage][0].weights_bytes for stage in stages) != expected_bytes:
            raise ProofError("the stages' bytes do not add up to the model's")

    def check_sensitive(self) -> None:
        """Raise ProofError unless a layer less, or two swapped, shows in the logits."""
        n = self.num_layers
        single = [self.stage(i, i + 1) for i in range(n)]
        wrong = [[*single[:i], *single[i + 1 :]] for i in range(1, n - 1)]
        wrong += [
            [*single[:i], single[i + 1], single[i], *single[i + 2 :]] for i in range(1, n - 2)
        ]
        for stages in wrong:
            if all(
                mx.array_equal(got, want)
                for got, want in zip(self.logits(stages, 1), self.expected_BLV, strict=False)
            ):
                raise ProofError("the tiny model does not show a missing layer")


def run(stages: Sequence[Stage], step: Step) -> mx.array:
    """What the last of `stages` puts out, (B, L, V), when they run one after another."""
    hidden_BLD: mx.array | None = None
    for stage in stages:
        if hidden_BLD is not None:
            _check_announced(stage, hidden_BLD)
        hidden_BLD = stage.forward(step, hidden_BLD)
        mx.eval(hidden_BLD, stage.slots.states(step.microbatch))
    assert hidden_BLD is not None
    return hidden_BLD


def steps_of(steps_BL: Sequence[mx.array]) -> Iterator[Step]:
    """The steps of one sequence that these tokens (1, L) make up."""
    position = 0
    for tokens_BL in steps_BL:
        tokens: list[int] = tokens_BL[0].tolist()  # type: ignore[assignment]
        yield Step(_MICROBATCH, [Row(_SLOT, position, tokens)])
        position += len(tokens)


def _random_tokens() -> list[mx.array]:
    mx.random.seed(1)
    return [mx.random.randint(0, VOCAB_SIZE, (1, n)) for n in _STEP_LENGTHS]


def _poison(loaded: LoadedModel, start: int, end: int) -> None:
    """Overwrite what the stage does not own, so that any use of it shows."""
    foreign = [
        (name, mx.full(array.shape, _poison_value(array.dtype), array.dtype))
        for name, array in dict(tree_flatten(loaded.model.parameters())).items()
        if not loaded.anatomy.owns(name, start, end)
    ]
    loaded.model.update(tree_unflatten(foreign))


def _poison_value(dtype: mx.Dtype) -> Any:
    return float("nan") if mx.issubdtype(dtype, mx.floating) else 0


def _check_announced(stage: Stage, hidden_BLD: mx.array) -> None:
    shape = stage.hidden_shape(*hidden_BLD.shape[:2])
    if hidden_BLD.shape != shape or hidden_BLD.dtype != stage.hidden_dtype_in:
        raise ProofError(
            f"layer {stage.start} was to get {stage.hidden_dtype_in} {shape} "
            f"and got {hidden_BLD.dtype} {hidden_BLD.shape}"
        )
