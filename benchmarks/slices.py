"""Which proven families tensor groups can share, and what their ranks hold.

    python -m benchmarks.slices [FAMILY...]

Every variant of a tiny random model is cut for groups of several sizes, in this process. For each
group: the largest error, of the largest logit; the most that a rank holds, of the whole; and what
ranks hold twice, of the whole. `benchmarks.families` does the same and records the verdicts. Exit
code 1 if a family does less than is on record.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.families import Proof, prove_slices, write
from benchmarks.members import SPLITS, Findings
from benchmarks.proof import Rig, UnsupportedError
from benchmarks.tiny_models import variants
from mlx_dist.model.verdicts import PROVEN, SLICED, UNBATCHED, UNPADDED


def try_slices(family: str) -> Proof:
    """Try every variant of a tiny model, as its sequences are on record to share microbatches."""
    proof = Proof(family, unbatched=UNBATCHED.get(family), unpadded=UNPADDED.get(family))
    for variant in variants(family):
        try:
            with tempfile.TemporaryDirectory() as folder:
                write(family, variant, Path(folder))
                found = prove_slices(proof, variant, Path(folder), Rig(Path(folder)))
        except UnsupportedError as error:
            print(f"{family:20} {variant.name:9} left out: {error}", flush=True)
            continue
        if proof.unsliced is not None:
            print(f"{family:20} not sliced: {proof.unsliced}", flush=True)
            break
        print(f"{family:20} {variant.name:9} {_row(found)}", flush=True)
    return proof


def _row(found: list[Findings]) -> str:
    return "  ".join(
        f"{':'.join(map(str, split))} {findings.error:.0e} "
        f"{max(findings.member_bytes) / findings.total_bytes:.0%} "
        f"+{findings.replicated_bytes / findings.total_bytes:.0%}"
        for split, findings in zip(SPLITS, found, strict=True)
    )


def main() -> int:
    """Run the sweep; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slices")
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    named = parser.parse_args().families
    proofs = [try_slices(family) for family in named or sorted(PROVEN)]
    sliced = {proof.family for proof in proofs if proof.unsliced is None}
    print(f"{len(sliced)} of {len(proofs)} are sliced")
    lost = sorted({proof.family for proof in proofs} & SLICED - sliced)
    if lost:
        print(f"less than is on record: {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
