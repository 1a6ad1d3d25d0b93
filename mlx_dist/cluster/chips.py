"""Apple's chips M1 to M5, and how fast one should be where nobody has measured it. Pure.

Bandwidths (GB/s) and GPU cores are Apple's published figures, from the announcements at
apple.com/newsroom and the technical specifications of the Macs that have the chip. A chip that
Apple has not announced is not here. What a machine can do is better measured
(`cluster.hardware`); `nominal_speeds` is for machines that are not there to be asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_dist.errors import ConfigError
from mlx_dist.messages import Speeds

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# A group of 64 weights has a scale and a bias of 16 bits each.
_SCALE_BITS = 0.5

# A core of every Apple GPU so far has 128 lanes that do a multiplication and an addition a cycle,
# in 32 or 16 bits. This gives the 2.6, 3.6 and 27.2 TFLOPS that Apple published for M1, M2 and M2
# Ultra; for later chips Apple publishes none.
_FLOPS_PER_CYCLE = 256
# M5's neural accelerators: "over 4x the peak GPU compute for AI compared to M4" (Apple, October
# 2025), for numbers of 16 bits.
_NEURAL_GAIN = 4.0

# Of the published bandwidth. llama.cpp generates with a 7 B model in 16 bits at 86% on an M1 Pro
# and 89% on an M3 Pro (its discussion 4167); MLX streams 79 to 84% on an M3 Ultra (mlx 3266).
_BANDWIDTH_EFFICIENCY = 0.8
# Of the peak, for large matrices: 75 and 76% of these Pros for llama.cpp's prompts of 512 tokens,
# 67 to 71% of an M3 Ultra for MLX's (mlx-vlm 2153).
_PRODUCT_EFFICIENCY = 0.7
# The same for quantized ones, which are unpacked on the way: 53% of an M2 Ultra (31.8 ms for 32
# rows and the 7.1 G weights of Mistral, mlx 2031).
_QUANTIZED_EFFICIENCY = 0.55
# MLX's matrix kernels compute tiles of 32 rows, and as long for fewer.
_TILE_ROWS = 32
# For few rows MLX unpacks quantized weights once a row: 3.2 ms a row of the same measurement.
_VECTOR_EFFICIENCY = 0.16
# What is left of a decoding step of mlx-lm after reading its weights, by operation: 1.3 us on an M4
# Pro (vllm-mlx 531), 3 to 4 us on an M3 Ultra (Rapid-MLX 630, 633, 636).
_OP_S = 2.5e-6


@dataclass(frozen=True, slots=True)
class Variant:
    """A chip as sold: some of its GPU's cores, and memory of this bandwidth."""

    gpu_cores: int
    bandwidth_gb_s: float


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip and its variants, the largest last. `gpu_ghz` is its GPU's highest clock."""

    name: str
    gpu_ghz: float
    variants: tuple[Variant, ...]
    has_neural_accelerators: bool = False

    def variant(self, gpu_cores: int | None = None) -> Variant:
        """The variant with so many cores, or the largest. Raises ConfigError if there is none."""
        if gpu_cores is None:
            return self.variants[-1]
        for variant in self.variants:
            if variant.gpu_cores == gpu_cores:
                return variant
        known = " or ".join(str(variant.gpu_cores) for variant in self.variants)
        raise ConfigError(f"{self.name} has {known} GPU cores, not {gpu_cores}")

    def tflops(self, gpu_cores: int | None = None, dtype: str = "float16") -> float:
        """An estimate of the peak in matrix products: cores, 256 operations a cycle, clock.

        Times 4 in 16 bits where there are neural accelerators, for M4's clock, as Apple compares.
        """
        cores = self.variant(gpu_cores).gpu_cores
        if self.has_neural_accelerators and _DTYPE_BYTES[dtype] == 2:
            return cores * _FLOPS_PER_CYCLE * _M4_GHZ * _NEURAL_GAIN / 1e3
        return cores * _FLOPS_PER_CYCLE * self.gpu_ghz / 1e3


# The GPUs' highest clocks, as macOS' powermetrics shows them: Apple publishes none.
_M1_GHZ, _M2_GHZ, _M3_GHZ, _M4_GHZ, _M5_GHZ = 1.296, 1.398, 1.398, 1.578, 1.62


def _chip(name: str, ghz: float, *variants: tuple[int, float], neural: bool = False) -> Chip:
    return Chip(name, ghz, tuple(Variant(*variant) for variant in variants), neural)


CHIPS = (
    _chip("M1", _M1_GHZ, (7, 68), (8, 68)),
    _chip("M1 Pro", _M1_GHZ, (14, 200), (16, 200)),
    _chip("M1 Max", _M1_GHZ, (24, 400), (32, 400)),
    _chip("M1 Ultra", _M1_GHZ, (48, 800), (64, 800)),
    _chip("M2", _M2_GHZ, (8, 100), (10, 100)),
    _chip("M2 Pro", _M2_GHZ, (16, 200), (19, 200)),
    _chip("M2 Max", _M2_GHZ, (30, 400), (38, 400)),
    _chip("M2 Ultra", _M2_GHZ, (60, 800), (76, 800)),
    _chip("M3", _M3_GHZ, (8, 100), (10, 100)),
    _chip("M3 Pro", _M3_GHZ, (14, 150), (18, 150)),
    _chip("M3 Max", _M3_GHZ, (30, 300), (40, 400)),
    _chip("M3 Ultra", _M3_GHZ, (60, 819), (80, 819)),
    _chip("M4", _M4_GHZ, (8, 120), (10, 120)),
    _chip("M4 Pro", _M4_GHZ, (16, 273), (20, 273)),
    _chip("M4 Max", _M4_GHZ, (32, 410), (40, 546)),
    _chip("M5", _M5_GHZ, (8, 153), (10, 153), neural=True),
    _chip("M5 Pro", _M5_GHZ, (16, 307), (20, 307), neural=True),
    _chip("M5 Max", _M5_GHZ, (32, 460), (40, 614), neural=True),
    _chip("M5 Ultra", _M5_GHZ, (64, 1200), (80, 1200), neural=True),
)


def chip_named(text: str) -> Chip:
    """The chip that `text` names: "M4 Pro", "Apple M3 Ultra", in any case.

    Raises ConfigError, which names all that are known, for another.
    """
    wanted = _key(text)
    for chip in CHIPS:
        if _key(chip.name) == wanted:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise ConfigError(f"{text!r} is no chip known here; known are {known}")


def nominal_speeds(chip: Chip, gpu_cores: int | None, dtype: str, bits: int) -> Speeds:
    """What `chip` should reach on its GPU, by its published figures (a roofline).

    A weight costs its bytes at 80% of the bandwidth, or the products of all tokens at 70% of the
    peak (quantized: 55%) in tiles of 32 tokens, whichever is longer; quantized weights and few
    tokens go to MLX's vector kernels where these are faster. No figure is measured on the chip
    itself, and newer versions of MLX are faster at some: expect errors of a quarter.

    `bits` of 0 or of 16 and more: nothing is quantized. Raises ConfigError for a dtype that is
    none of float32, float16 and bfloat16, or GPU cores that the chip is not sold with.
    """
    if dtype not in _DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(_DTYPE_BYTES)}")
    bytes_per_s = chip.variant(gpu_cores).bandwidth_gb_s * 1e9 * _BANDWIDTH_EFFICIENCY
    flops = chip.tflops(gpu_cores, dtype) * 1e12
    lanes_flops = chip.tflops(gpu_cores, "float32") * 1e12
    width = _DTYPE_BYTES[dtype]

    def product_s(num_tokens: int) -> float:
        read_s = width / bytes_per_s
        return max(read_s, _tiles_s(num_tokens, flops * _PRODUCT_EFFICIENCY))

    def quantized_s(num_tokens: int) -> float:
        read_s = (bits + _SCALE_BITS) / 8 / bytes_per_s
        vector_s = 2 * num_tokens / (lanes_flops * _VECTOR_EFFICIENCY)
        matrix_s = _tiles_s(num_tokens, flops * _QUANTIZED_EFFICIENCY)
        return max(read_s, min(vector_s, matrix_s))

    return Speeds(
        dtype=dtype,
        bits=bits,
        product_s={n: product_s(n) for n in _SIZES},
        quantized_s={n: quantized_s(n) for n in _SIZES} if 0 < bits < 16 else {},
        stream_bytes_per_s=bytes_per_s,
        op_s=_OP_S,
        # Two arrays are read and one is written; the function itself is nothing beside that.
        element_s=3 * width / bytes_per_s,
        # Attention is one operation.
        head_s=0.0,
    )


def ordinary_speeds(dtype: str) -> Speeds:
    """Speeds to take for machines that are all alike and that nobody has measured: an M4's."""
    return nominal_speeds(chip_named("M4"), None, dtype, bits=4)


def _tiles_s(num_tokens: int, flops: float) -> float:
    """Seconds a weight; a single token needs no tile."""
    if num_tokens == 1:
        return 2 / flops
    return 2 * _TILE_ROWS * -(-num_tokens // _TILE_ROWS) / flops


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("apple", ""))
