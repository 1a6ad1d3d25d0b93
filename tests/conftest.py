"""What all tests share: the BLAS before MLX, the header line, and where ranks are counted."""

from __future__ import annotations

import os

import pytest

from mlx_dist.cluster.blas import preload_blas

BLAS = preload_blas(1)

RANKS = [int(n) for n in os.environ.get("MLX_DIST_TEST_RANKS", "1,2,3").split(",")]


def pytest_report_header() -> str:
    import mlx.core as mx

    ranks = ", ".join(map(str, RANKS))
    return (
        f"mlx {mx.__version__} on {mx.default_device()}, BLAS {BLAS}; ranks of SPMD tests: {ranks}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that takes `spmd_ranks` at 1, 2 and 3 ranks, or at those asked for."""
    if "spmd_ranks" in metafunc.fixturenames:
        metafunc.parametrize("spmd_ranks", RANKS)
