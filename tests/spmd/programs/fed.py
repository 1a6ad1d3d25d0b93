"""Loads models of which ranks lack files, and compares each rank's tensors with the whole model's.

fed.py FABRIC CASES: CASES is a JSON list of objects with: models (each rank's --model), cuts (each
rank's [start, end] or null), whole (the folder to compare with), and if need be dtype, slices (the
sizes of the ranks' slices of all layers), piece_bytes (the most that is sent at once), damage (the
rank that finds other checksums), trust, cut_off (a weight file that loses its end once the leader
has looked at it).
Prints a JSON list with, for each case, what came of it on each rank.
"""

import json
import os
import sys
import zlib

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dist.cluster.memory import peak_rss_bytes
from mlx_dist.cluster.placement import WHOLE, Slice
from mlx_dist.cluster.world import join
from mlx_dist.config import Dtype, Fabric, RunConfig, Weights
from mlx_dist.messages import Outcome
from mlx_dist.model import delivery
from mlx_dist.model.feed import load_stages
from mlx_dist.model.files import find_model
from mlx_dist.model.outline import found_model
from mlx_dist.model.weights import load_stage

PIECE_BYTES = delivery._MOST_PIECE_BYTES


def own(loaded, start, end):
    parameters = dict(tree_flatten(loaded.model.parameters()))
    return {name: a for name, a in parameters.items() if loaded.anatomy.owns(name, start, end)}


def is_same(loaded, share, dtype, folder, slice_):
    alone = load_stage(find_model(folder), *share, dtype, lambda *_: None, slice_)
    due, got = own(alone, *share), own(loaded, *share)
    for name in () if alone.slicing is None else alone.slicing.dropped:
        del due[name], got[name]
    return due.keys() == got.keys() and all(
        (a.shape, a.dtype, checksum(a)) == (got[name].shape, got[name].dtype, checksum(got[name]))
        for name, a in due.items()
    )


def checksum(array):
    return zlib.crc32(memoryview(mx.contiguous(array)))


def cut_off(path, take):
    def after(shelf, tensor):
        if tensor.file.name == path.name and tensor.name not in shelf._lazy.get(path.name, {}):
            shelf._lazy[path.name] = mx.load(str(path))
            os.truncate(path, path.stat().st_size // 2)
        return take(shelf, tensor)

    return after


def run(world, case):
    share = case["cuts"][world.rank]
    dtype = Dtype(case.get("dtype", "auto"))
    delivery._MOST_PIECE_BYTES = case.get("piece_bytes", PIECE_BYTES)
    if case.get("damage") == world.rank:
        delivery.checksum = lambda _pieces: 1
    model, trust = case["models"][world.rank], case.get("trust", False)
    config = RunConfig(model, weights=Weights.leader, trust_remote_code=trust)
    slice_ = Slice(world.rank, tuple(case["slices"])) if "slices" in case else WHOLE
    lines, steps = [], []
    with found_model(world, config, lines.append) as files:
        mx.clear_cache()
        mx.reset_peak_memory()
        before_bytes, idle_rss_bytes = mx.get_active_memory(), peak_rss_bytes()
        if "cut_off" in case and world.is_leader:
            delivery.Shelf.take = cut_off(files.folder / case["cut_off"], delivery.Shelf.take)
        loaded = load_stages(
            world, files, share, dtype, lambda *step: steps.append(step), lines.append, slice_
        )
        return {
            "rank": world.rank,
            "lines": lines,
            "peak_bytes": mx.get_peak_memory() - before_bytes,
            "over_idle_bytes": peak_rss_bytes() - idle_rss_bytes,
            "own_bytes": loaded.weights_bytes if loaded else 0,
            "same": share is None or is_same(loaded, share, dtype, case["whole"], slice_),
            "steps": steps,
            "folder": str(files.folder),
            "files": sorted(path.name for path in files.folder.iterdir()),
        }


with join(Fabric(sys.argv[1])) as world:
    came = [run(world, case) for case in json.loads(sys.argv[2])]
    gathered = world.control.all_gather(Outcome(json.dumps(came)))
if world.is_leader:
    ranks = [json.loads(outcome.error) for outcome in gathered]
    print(json.dumps(list(zip(*ranks, strict=True))))
