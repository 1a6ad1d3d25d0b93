"""OpenBLAS is told which kernels suit the CPU, for it does not know CPUs newer than itself."""

import pytest

from mlx_dist.cluster.blas import _openblas_core_type


@pytest.mark.parametrize(
    ("flags", "core_type"),
    [
        ("fpu avx avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16", "SkylakeX"),
        ("fpu avx avx2 fma avx512f", "Haswell"),
        ("fpu avx avx2 fma", "Haswell"),
        ("fpu sse4_2 avx", None),
    ],
)
def test_the_kernels_follow_the_flags(tmp_path, flags, core_type):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: x\nflags\t\t: {flags}\n")
    assert _openblas_core_type(cpuinfo) == core_type


def test_a_machine_without_the_file_is_left_to_openblas(tmp_path):
    assert _openblas_core_type(tmp_path / "none") is None
