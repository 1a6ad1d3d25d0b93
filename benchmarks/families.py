"""Which mlx-lm families run split, and which sequences share microbatches: the record.

    python -m benchmarks.families [FAMILY...] [--write]

For every family a tiny random model is cut in many places and its logits are compared, bit for
bit, with those of mlx-lm in one piece; then sequences share microbatches, and each one's logits
are compared with those it gets alone; at last the slices of tensor groups, `benchmarks.slices`.
`--write` records the verdicts in mlx_dist/model/verdicts.py and docs/families.md. Exit code 1 if a
family does less than is on record.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.batches import TOLERANCE, check_batches
from benchmarks.members import TOLERANCE as SLICES_TOLERANCE
from benchmarks.members import Findings, check_splits
from benchmarks.proof import ProofError, Rig, UnsupportedError, some_cuts
from benchmarks.tiny_models import Variant, families, variants, write_tiny_model
from mlx_dist.model.verdicts import PROVEN, SLICED, UNBATCHED, UNPADDED

_REPOSITORY = Path(__file__).parent.parent


@dataclass(slots=True)
class Proof:
    """What was tried on a family and, if it is refused, the reason.

    `unbatched` is why its sequences cannot share a microbatch, or else `unpadded` why those of
    several lengths cannot share a step. `unsliced` is why tensor groups cannot share it, or else
    `slice_errors` are the largest ones by the kind of weights.
    """

    family: str
    num_layers: int = 0
    variants: list[str] = field(default_factory=list)
    num_cuts: int = 0
    cache_kinds: set[str] = field(default_factory=set)
    reason: str | None = None
    unbatched: str | None = None
    unpadded: str | None = None
    unsliced: str | None = None
    slice_errors: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In a line for the user."""
        if self.reason is not None:
            return self.reason
        batches = f"unpadded: {self.unpadded}" if self.unpadded else "batched"
        if self.unbatched is not None:
            batches = f"unbatched: {self.unbatched}"
        slices = f"not sliced: {self.unsliced}" if self.unsliced else "sliced"
        return f"proven, {self.num_cuts} cuts; {batches}; {slices}"

    @property
    def does_less(self) -> bool:
        """Whether the record says more of the family than this."""
        if self.family not in PROVEN:
            return False
        batches = self.reason is None and self.unbatched is None
        pads = batches and self.unpadded is None
        return (
            self.reason is not None
            or (not batches and self.family not in UNBATCHED)
            or (not pads and self.family not in UNBATCHED.keys() | UNPADDED.keys())
            or (self.unsliced is not None and self.family in SLICED)
        )


def prove(family: str) -> Proof:
    """Try every variant of a tiny model of `family` at many cuts and, in float32, in batches."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), _quiet_exit():
            tried = variants(family)
    except Exception as error:
        return Proof(family, reason=f"no tiny model could be built ({_summary(error)})")
    proof = Proof(family)
    for variant in tried:
        try:
            with tempfile.TemporaryDirectory() as folder:
                write(family, variant, Path(folder))
                _prove_variant(proof, variant, Path(folder))
        except UnsupportedError as error:
            if variant.name == "plain":
                return Proof(family, reason=str(error))
        except Exception as error:
            return Proof(family, reason=_reason(variant, error))
    return proof


def _prove_variant(proof: Proof, variant: Variant, folder: Path) -> None:
    """Try one variant and add what came of it to `proof`. Raises what refuses the family."""
    rig = Rig(folder)
    is_precise = variant.dtype == "float32" and variant.quantize_bits is None
    if is_precise:
        num_cuts = rig.check_every_cut()
    else:
        cuts = some_cuts(rig.num_layers)
        num_cuts = len(cuts)
        for cut in cuts:
            rig.check(cut)
    rig.check_sensitive()
    proof.num_layers = rig.num_layers
    proof.variants.append(variant.name)
    proof.num_cuts += num_cuts
    proof.cache_kinds |= set(rig.cache_kinds)
    if is_precise and proof.unbatched is None:
        if proof.unpadded is None:
            proof.unpadded = _failure(variant, lambda: _check_batches(rig, pads=True))
        if proof.unpadded is not None:
            proof.unbatched = _failure(variant, lambda: _check_batches(rig, pads=False))
    if proof.unsliced is None:
        prove_slices(proof, variant, folder, rig)


def prove_slices(proof: Proof, variant: Variant, folder: Path, rig: Rig) -> list[Findings]:
    """Try tensor groups of several sizes on one variant, and add what came of it to `proof`."""
    try:
        found = check_splits(
            folder,
            rig,
            variant.dtype,
            batches=variant.name == "plain" and proof.unbatched is None,
            pads=proof.unpadded is None,
        )
    except Exception as error:
        proof.unsliced = _reason(variant, error)
        return []
    kind = variant.dtype if variant.quantize_bits is None else "quantized"
    errors = [findings.error for findings in found]
    proof.slice_errors[kind] = max([*errors, proof.slice_errors.get(kind, 0.0)])
    return found


def _check_batches(rig: Rig, *, pads: bool) -> None:
    """Raise unless sequences share microbatches, uncut and cut, one stage of a single layer."""
    n = rig.num_layers
    # New ones: a check that fails leaves its sequences behind.
    rig.forget_stages()
    for cut in ((n,), (1, n // 2, n)):
        stages = rig.stages(cut)
        if not stages[0].slots.can_batch:
            raise ProofError(f"mlx-lm has no batches of {', '.join(rig.cache_kinds)}")
        check_batches(rig.model, stages, pads=pads)


def _failure(variant: Variant, check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:
        return _reason(variant, error)
    return None


def write(family: str, variant: Variant, folder: Path) -> None:
    """Write the tiny model. Raises UnsupportedError if mlx-lm does not run it here."""
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
    return text.split(". ")[0][:150] or type(error).__name__


def _write_record(proofs: list[Proof]) -> None:
    proven = [p for p in proofs if p.reason is None]
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
        "# Proven, but every sequence has a microbatch of its own.",
        *_table("UNBATCHED", {p.family: p.unbatched for p in proven}),
        "",
        "# Sequences share microbatches, but those that share a step have as many tokens in it.",
        *_table("UNPADDED", {p.family: p.unpadded for p in proven if not p.unbatched}),
        "",
        "# Tensor groups may share every layer.",
        "SLICED = frozenset(",
        "    {",
        *(f"        {_quoted(p.family)}," for p in proven if p.unsliced is None),
        "    }",
        ")",
        "",
        *_table("REFUSED", {p.family: p.reason for p in proofs}),
        "",
    ]
    (_REPOSITORY / "mlx_dist/model/verdicts.py").write_text("\n".join(lines))
    (_REPOSITORY / "docs/families.md").write_text(_page(proofs))


def _table(name: str, reasons: dict[str, str | None]) -> list[str]:
    entries = [line for key, reason in reasons.items() if reason for line in _entry(key, reason)]
    return [f"{name}: dict[str, str] = {{", *entries, "}"]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', "'") + '"'


def _entry(family: str, reason: str) -> list[str]:
    line = f"    {_quoted(family)}: {_quoted(reason)},"
    if len(line) <= 100:
        return [line]
    first, *rest = textwrap.wrap(reason, 85)
    lines = [first, *(f" {line}" for line in rest)]
    return [f"    {_quoted(family)}: (", *(f"        {_quoted(text)}" for text in lines), "    ),"]


def _page(proofs: list[Proof]) -> str:
    proven = [p for p in proofs if p.reason is None]
    refused = [p for p in proofs if p.reason is not None]
    unbatched = [p for p in proven if p.unbatched]
    unpadded = [p for p in proven if p.unpadded and not p.unbatched]
    sliced = [p for p in proven if p.unsliced is None]
    worst = {
        kind: max(p.slice_errors.get(kind, 0.0) for p in sliced)
        for kind in ("float32", "quantized", "bfloat16")
    }
    head = _PAGE_HEAD.format(
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        num_proven=len(proven),
        num_refused=len(refused),
        num_padded=len(proven) - len(unbatched) - len(unpadded),
        num_unpadded=len(unpadded),
        num_unbatched=len(unbatched),
        tolerance=f"{TOLERANCE:g}",
        num_sliced=len(sliced),
        slices_tolerance=f"{SLICES_TOLERANCE['float32']:g}",
        **{kind: f"{error:.0e}" for kind, error in worst.items()},
    )
    rows = [
        f"| {p.family} | {p.num_layers} | {', '.join(p.variants)} | {p.num_cuts} "
        f"| {', '.join(sorted(p.cache_kinds))} "
        f"| {'no' if p.unbatched else 'equal lengths' if p.unpadded else 'yes'} "
        f"| {'no' if p.unsliced else 'yes'} |"
        for p in proven
    ]
    rows += ["", "## Proven, but not batched", "", "| family | reason |", "|---|---|"]
    rows += [f"| {p.family} | {p.unbatched} |" for p in unbatched]
    rows += ["", "## Batched, but with equal lengths in a step", "", "| family | reason |"]
    rows += ["|---|---|", *(f"| {p.family} | {p.unpadded} |" for p in unpadded)]
    rows += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    rows += [f"| {p.family} | {p.reason} |" for p in refused]
    return head + "\n".join(rows) + "\n"


_PAGE_HEAD = """# Model families

mlx_dist runs a model split over machines only if its family is **proven**. Tiny random models of
each family of mlx-lm are cut up, and every cut must give the very logits of mlx-lm in one piece, to
the last bit. In float32 that is shown for all cuts: single layers first, one a stage, then every
run of layers, which must put out from what reaches it what reaches the next. The head is tied to
the embedding and not; bfloat16 and quantized weights are tried at some cuts. Prompt
chunks outgrow the sliding window, and single tokens follow them. Each stage has a model of its
own, in which all that it does not own is overwritten with NaN; and a missing layer or two swapped
ones must show in the logits. Any other family is refused by name before its weights are fetched.

A family is **batched** if its sequences may share a microbatch. In float32, uncut and cut in three,
sequences of several lengths are prefilled together, others join them, one that has seen no token
among them, some leave until one is left, and some begin from what was kept of another, whole and,
where the caches can be cut, in part. After every step the logits of each sequence must be within
{tolerance} (of the largest logit) of those that it gets alone: matrix products round differently
for different batch shapes. Sequences of a family that is not batched run alone, one a microbatch,
and nothing is kept of them for others. Where only *equal lengths* are right, prompts of different
lengths are not prefilled together; they still decode together.

A family is **sliced** if a tensor group may share every layer of it (`--parallel tensor`). It is
cut for 2, 3, 4 and 5 ranks and for two of which one has three times as much as the other. All
ranks of a group must come to the same bits, in every layer; what they hold must be the whole model,
and of each only its slices. In float32 the logits must be within {slices_tolerance} (of the largest
logit) of those of mlx-lm in one piece, for sums of slices round differently, and sequences share
microbatches as above. The largest error of all families was {float32} in float32, {quantized} with
quantized weights and {bfloat16} in bfloat16 (granite), about what bfloat16 costs it in one piece.
The group is simulated in one process; `python -m benchmarks.real_groups` runs it for real.

A model of a proven family can still be refused while it is loaded, when its layers turn out to use
more of each other than their output: gemma4 models that share keys and values across layers.

`python -m benchmarks.families --write` wrote this page, with mlx {mlx} and mlx-lm {mlx_lm}:
{num_proven} families are proven and {num_refused} refused. Of the proven ones {num_padded} are
batched, {num_unpadded} with equal lengths only, and {num_unbatched} are not;
{num_sliced} are sliced. A family is the name
of mlx-lm's module; some model types share one (`mistral` runs as `llama`, `kimi_k2` as
`deepseek_v3`). A variant that mlx-lm itself does not run on a CPU, such as experts in bfloat16, is
left out.

## Proven

| family | layers | variants | cuts | caches | batched | sliced |
|---|---|---|---|---|---|---|
"""


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
        print(f"{family:24} {proof.verdict}", flush=True)
    num_proven = sum(p.reason is None for p in proofs)
    num_batched = sum(p.reason is p.unbatched is None for p in proofs)
    elapsed_s = time.perf_counter() - start_s
    print(
        f"{num_proven} proven, {num_batched} of them batched, {len(proofs) - num_proven} refused, "
        f"{elapsed_s:.0f} s"
    )
    lost = [p.family for p in proofs if p.does_less]
    if lost:
        print(f"less than is on record: {', '.join(lost)}", file=sys.stderr)
    if arguments.write:
        _write_record(proofs)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
