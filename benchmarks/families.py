"""Which mlx-lm families run split: the proof, and its record.

    python -m benchmarks.families [FAMILY...] [--write]

For every family a tiny random model is cut in many places and its logits are compared, bit for
bit, with those of mlx-lm in one piece. `--write` records the verdicts in mlx_dist/model/verdicts.py
and docs/families.md. Exit code 1 if a family that is on record as proven fails.
"""

# B sequences, L tokens, D hidden, V vocabulary

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.tiny_models import (
    VOCAB_SIZE,
    Variant,
    families,
    variants,
    write_tiny_model,
)
from mlx_dist.config import Dtype
from mlx_dist.model.families import dissect
from mlx_dist.model.files import find_model
from mlx_dist.model.stage import Stage
from mlx_dist.model.verdicts import PROVEN
from mlx_dist.model.weights import LoadedModel, load_stage

_NUM_SEQUENCES = 2
# Prefill in chunks that cross the sliding window, then decode.
_STEP_LENGTHS = (5, 11, 3, 1, 1, 1)
_REPOSITORY = Path(__file__).parent.parent

Cut = tuple[int, ...]  # where the stages end, the last at the number of layers


class ProofError(Exception):
    """Why a family is not proven, in a line for the user."""


class UnsupportedError(ProofError):
    """mlx-lm itself does not run this model here, such as a mixture in bfloat16 on a CPU."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was tried on a family and, if it is refused, the reason."""

    family: str
    num_layers: int = 0
    variants: tuple[str, ...] = ()
    num_cuts: int = 0
    cache_kinds: tuple[str, ...] = ()
    reason: str | None = None


def some_cuts(num_layers: int) -> list[Cut]:
    """Two cuts in two, two in three, and the cut into single layers."""
    n = num_layers
    return [(1, n), (n - 3, n), (2, n - 3, n), (n // 2, n // 2 + 1, n), tuple(range(1, n + 1))]


class Rig:
    """A model folder, its logits in one piece, and its stages, each a model of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages: dict[tuple[int, int], tuple[LoadedModel, Stage]] = {}
        self._slot = 0
        self.steps_BL = _random_tokens()
        model, _ = load_model(folder)
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
            loaded = load_stage(files, lambda _n: (start, end), Dtype.auto, lambda _d, _t: None)
            _poison(loaded, start, end)
            stage = Stage(loaded.model, loaded.anatomy, start, end)
            self._stages[start, end] = loaded, stage
        return self._stages[start, end][1]

    def logits(self, stages: Sequence[Stage], num_steps: int | None = None) -> Iterator[mx.array]:
        """The logits of each step, (B, L, V), when `stages` run one after another."""
        self._slot += 1
        for stage in stages:
            stage.slots.open(self._slot)
        for tokens_BL in self.steps_BL[:num_steps]:
            hidden_BLD: mx.array | None = None
            for stage in stages:
                if hidden_BLD is not None:
                    _check_announced(stage, hidden_BLD)
                hidden_BLD = stage.forward(self._slot, tokens_BL, hidden_BLD)
                mx.eval(hidden_BLD, stage.slots.states(self._slot))
            assert hidden_BLD is not None
            yield hidden_BLD
        for stage in stages:
            stage.slots.close(self._slot)

    def check(self, cut: Cut) -> None:
        """Raise ProofError unless `cut` gives the very logits of the model in one piece."""
        stages = [self.stage(a, b) for a, b in zip((0, *cut), cut, strict=False)]
        for step, got_BLV in enumerate(self.logits(stages)):
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
        self._slot += 1
        stage.slots.open(self._slot)
        outputs = []
        for tokens_BL, hidden_BLD in zip(self.steps_BL, inputs, strict=True):
            outputs.append(stage.forward(self._slot, tokens_BL, hidden_BLD))
            mx.eval(outputs[-1], stage.slots.states(self._slot))
        stage.slots.close(self._slot)
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


def _random_tokens() -> list[mx.array]:
    mx.random.seed(1)
    return [mx.random.randint(0, VOCAB_SIZE, (_NUM_SEQUENCES, n)) for n in _STEP_LENGTHS]


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


def prove(family: str) -> Proof:
    """Try every variant of a tiny model of `family` at many cuts."""
    proof = Proof(family)
    try:
        with contextlib.redirect_stdout(io.StringIO()), _quiet_exit():
            tried = variants(family)
    except Exception as error:
        return Proof(family, reason=f"no tiny model could be built ({_summary(error)})")
    kinds: set[str] = set()
    for variant in tried:
        try:
            with tempfile.TemporaryDirectory() as folder:
                _write(family, variant, Path(folder))
                rig = Rig(Path(folder))
                is_precise = variant.dtype == "float32" and variant.quantize_bits is None
                if is_precise:
                    num_cuts = rig.check_every_cut()
                else:
                    cuts = some_cuts(rig.num_layers)
                    num_cuts = len(cuts)
                    for cut in cuts:
                        rig.check(cut)
                rig.check_sensitive()
        except UnsupportedError as error:
            if variant.name == "plain":
                return Proof(family, reason=str(error))
            continue
        except Exception as error:
            return Proof(family, reason=_reason(variant, error))
        kinds |= set(rig.cache_kinds)
        proof = Proof(
            family,
            rig.num_layers,
            (*proof.variants, variant.name),
            proof.num_cuts + num_cuts,
            tuple(sorted(kinds)),
        )
    return proof


def _write(family: str, variant: Variant, folder: Path) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            write_tiny_model(family, folder, variant)
            model, _ = load_model(folder)
    except Exception as error:
        raise UnsupportedError(f"no tiny model could be built ({_summary(error)})") from error
    try:
        mx.eval(model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model)))
    except Exception as error:
        raise UnsupportedError(f"mlx-lm cannot run it here ({_summary(error)})") from error


@contextlib.contextmanager
def _quiet_exit() -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise ImportError("its module in mlx-lm asks for one more package") from error


def _reason(variant: Variant, error: Exception) -> str:
    text = str(error) if isinstance(error, ProofError) else _summary(error)
    return text if variant.name == "plain" else f"{variant.name}: {text}"


def _summary(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if "No Metal back-end" in text:
        return "one of its kernels is for Apple's GPU only"
    if os.sep in text:
        text = text.split(": ", 1)[-1]
    return text[:150] or type(error).__name__


def _write_record(proofs: list[Proof]) -> None:
    proven = [p for p in proofs if p.reason is None]
    refused = [p for p in proofs if p.reason is not None]
    lines = [
        '"""The verdict on each mlx-lm family. Written by `python -m benchmarks.families`; '
        'do not edit."""',
        "",
        "PROVEN = frozenset(",
        "    {",
        *(f"        {_quoted(p.family)}," for p in proven),
        "    }",
        ")",
        "",
        "REFUSED: dict[str, str] = {",
        *(line for p in refused for line in _entry(p.family, p.reason or "")),
        "}",
        "",
    ]
    (_REPOSITORY / "mlx_dist/model/verdicts.py").write_text("\n".join(lines))
    (_REPOSITORY / "docs/families.md").write_text(_page(proven, refused))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', "'") + '"'


def _entry(family: str, reason: str) -> list[str]:
    line = f"    {_quoted(family)}: {_quoted(reason)},"
    if len(line) <= 100:
        return [line]
    return [f"    {_quoted(family)}: (", f"        {_quoted(reason)}", "    ),"]


def _page(proven: list[Proof], refused: list[Proof]) -> str:
    num_proven, num_refused = len(proven), len(refused)
    versions = f"mlx {version('mlx')} and mlx-lm {version('mlx-lm')}"
    head = f"""# Model families

mlx_dist runs a model split over machines only if its family is **proven**. Tiny random models of
each family of mlx-lm are cut up, and every cut must give the very logits of mlx-lm in one piece, to
the last bit. In float32 that is shown for all cuts: single layers first, one a stage, then every
run of layers, which must put out from what reaches it what reaches the next. The head is tied to
the embedding and not; bfloat16 and quantized weights are tried at some cuts. Prompt
chunks outgrow the sliding window, and single tokens follow them. Each stage has a model of its
own, in which all that it does not own is overwritten with NaN; and a missing layer or two swapped
ones must show in the logits. Any other family is refused by name before its weights are fetched.

A model of a proven family can still be refused while it is loaded, when its layers turn out to use
more of each other than their output: gemma4 models that share keys and values across layers.

`python -m benchmarks.families --write` wrote this page, with {versions}:
{num_proven} families are proven and {num_refused} refused. A family is the name of mlx-lm's module;
some model types share one (`mistral` runs as `llama`, `kimi_k2` as `deepseek_v3`). A variant that
mlx-lm itself does not run on a CPU, such as experts in bfloat16, is left out.

## Proven

| family | layers | variants | cuts | caches |
|---|---|---|---|---|
"""
    rows = [
        f"| {p.family} | {p.num_layers} | {', '.join(p.variants)} | {p.num_cuts} "
        f"| {', '.join(p.cache_kinds)} |"
        for p in proven
    ]
    rows += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    rows += [f"| {p.family} | {p.reason} |" for p in refused]
    return head + "\n".join(rows) + "\n"


def main() -> int:
    """Run the sweep; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--write", action="store_true", help="record the verdicts")
    arguments = parser.parse_args()
    if arguments.write and arguments.families:
        parser.error("--write records all families; name none")
    start_s = time.perf_counter()
    proofs = []
    for family in arguments.families or families():
        proof = prove(family)
        proofs.append(proof)
        print(f"{family:24} {proof.reason or f'proven, {proof.num_cuts} cuts'}", flush=True)
    num_proven = sum(p.reason is None for p in proofs)
    elapsed_s = time.perf_counter() - start_s
    print(f"{num_proven} proven, {len(proofs) - num_proven} refused, {elapsed_s:.0f} s")
    lost = [p.family for p in proofs if p.reason is not None and p.family in PROVEN]
    if lost:
        print(f"on record as proven, but not so now: {', '.join(lost)}", file=sys.stderr)
    if arguments.write:
        _write_record(proofs)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
