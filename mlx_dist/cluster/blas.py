"""Which BLAS MLX multiplies with on Linux. Knows nothing of ranks.

MLX's CPU build for x86-64 ships the reference BLAS. An optimized one that is opened with global
symbols before `mlx.core` is imported takes its place; on macOS MLX uses Accelerate.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Debian's and Fedora's names, in order of preference.
_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libblis.so.4", "libmkl_rt.so.2")
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "MKL_NUM_THREADS")


def preload_blas(num_threads: int) -> str:
    """Open an optimized BLAS if this host has one, and say which BLAS MLX will use.

    After the first import of `mlx.core` it is too late to open one. A thread count that the user
    has set in the environment stays as it is.
    """
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, str(num_threads))
    if sys.platform == "darwin":
        return "Accelerate"
    mode = ctypes.RTLD_GLOBAL
    if "mlx.core" in sys.modules:
        mode |= os.RTLD_NOLOAD
    if core_type := _openblas_core_type(Path("/proc/cpuinfo")):
        os.environ.setdefault("OPENBLAS_CORETYPE", core_type)
    for library in _LIBRARIES:
        try:
            ctypes.CDLL(library, mode=mode)
        except OSError:
            continue
        return library
    return "reference"


def _openblas_core_type(cpuinfo: Path) -> str | None:
    """The OpenBLAS kernels that suit this CPU's instructions, or None to leave it to OpenBLAS.

    An OpenBLAS older than the CPU does not know its model number and takes its oldest kernels,
    which are five times slower; the flags tell what the CPU can do all the same.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None
