"""A file of machines means what it says, and what it cannot mean is refused by file and key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlx_dist.cluster.costs import Link
from mlx_dist.cluster.machines import faster_link, nominal_link, read_cluster, usable_bytes
from mlx_dist.errors import ConfigError

GIB = 1 << 30
EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "plans" / "machines").glob("*.toml"))

MINI = '[[machine]]\nchip = "M4"\nmemory_gb = 16\n'


def read(tmp_path: Path, text: str):
    path = tmp_path / "machines.toml"
    path.write_text(text)
    return read_cluster(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_clusters(path):
    cluster = read_cluster(path)
    machines = cluster.machines("bfloat16", 4)
    assert [machine.name for machine in machines] == list(cluster.names)
    assert all(0 < machine.usable_bytes < machine.memory_bytes for machine in machines)
    assert [len(row) for row in cluster.links] == [len(machines)] * len(machines)


def test_a_count_makes_machines_of_numbered_names(tmp_path):
    cluster = read(tmp_path, f'{MINI}count = 3\nname = "mini"\n[link]\nkind = "10gbe"\n')
    assert cluster.names == ("mini-1", "mini-2", "mini-3")
    ten = nominal_link("10gbe")
    for a, row in enumerate(cluster.links):
        assert row == tuple(Link(0.0, math.inf) if a == b else ten for b in range(3))


def test_a_pair_may_have_a_link_of_its_own(tmp_path):
    cluster = read(
        tmp_path,
        f'{MINI}name = "a"\n{MINI}name = "b"\n{MINI}name = "c"\n'
        "[link]\ngbit_s = 8\nlatency_us = 50\n"
        '[[links]]\nbetween = ["c", "a"]\nkind = "thunderbolt4"\nlatency_us = 10\n',
    )
    common = Link(50e-6, 1e9)
    assert cluster.links[0][1] == cluster.links[1][2] == pytest.approx(common)
    special = Link(10e-6, nominal_link("thunderbolt4").bytes_per_s)
    assert cluster.links[0][2] == cluster.links[2][0] == pytest.approx(special)


def test_a_mac_may_use_what_metal_recommends(tmp_path):
    # As llama.cpp logs it, in MiB.
    for memory_gib, recommended_mib in ((16, 10922), (32, 21845), (36, 27648), (96, 73728)):
        assert usable_bytes(memory_gib * GIB) >> 20 == recommended_mib
    (machine,) = read(tmp_path, MINI + "usable_gb = 12\n").machines("bfloat16", 4)
    assert machine.memory_bytes == 16 * GIB
    assert machine.usable_bytes == 12 * GIB


def test_numbers_stand_for_a_chip(tmp_path):
    (slow,) = read(
        tmp_path, "[[machine]]\nmemory_gb = 64\nbandwidth_gb_s = 100\ntflops = 5\n"
    ).machines("float16", 4)
    (fast,) = read(
        tmp_path, "[[machine]]\nmemory_gb = 64\nbandwidth_gb_s = 200\ntflops = 50\n"
    ).machines("float16", 4)
    most = max(slow.speeds.product_s)
    assert slow.speeds.product_s[1] == pytest.approx(2 * fast.speeds.product_s[1])
    assert slow.speeds.product_s[most] == pytest.approx(10 * fast.speeds.product_s[most])


def test_the_next_faster_link_is_faster():
    seen = ["wifi"]
    while (faster := faster_link(nominal_link(seen[-1]))) is not None:
        assert faster[1].bytes_per_s > nominal_link(seen[-1]).bytes_per_s
        assert faster[1].latency_s <= nominal_link(seen[-1]).latency_s
        seen.append(faster[0])
    assert seen[-1] == "rdma"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["machine"]),
        ("[[machine", ["not TOML"]),
        (MINI + "memroy_gb = 3\n", ["'memroy_gb'", "machine[0]", "memory_gb"]),
        ("[[machine]]\nchip = 'M4'\n", ["memory_gb", "machine[0]"]),
        ("[[machine]]\nchip = 'M4'\nmemory_gb = 'much'\n", ["machine[0].memory_gb", "str"]),
        ("[[machine]]\nchip = 'M4'\nmemory_gb = 0\n", ["machine[0].memory_gb", "> 0"]),
        ("[[machine]]\nchip = 'M4'\nmemory_gb = inf\n", ["machine[0].memory_gb"]),
        ("[[machine]]\nchip = 'M4'\nmemory_gb = nan\n", ["machine[0].memory_gb"]),
        (MINI + "count = 0\n", ["machine[0].count"]),
        (MINI + "usable_gb = 20\n", ["usable_gb 20", "memory_gb 16"]),
        (MINI + "tflops = 4\n", ["'m4'", "either a chip"]),
        ("[[machine]]\nmemory_gb = 8\n", ["'machine'", "either a chip"]),
        ("[[machine]]\nmemory_gb = 8\ntflops = 4\n", ["both bandwidth_gb_s and tflops"]),
        ("[[machine]]\nmemory_gb = 8\nchip = 'M9'\n", ["'M9'", "M4 Pro"]),
        (MINI + "gpu_cores = 99\n", ["99", "M4"]),
        (MINI * 2, ["two machines are called 'm4'"]),
        (MINI + "count = 2\n", ["nothing connects 'm4-1' and 'm4-2'", "[link]"]),
        (MINI + "[link]\nkind = 'string'\n", ["'string'", "10gbe"]),
        (MINI + "[link]\ngbit_s = 3\n", ["latency_us"]),
        (MINI + "[link]\n", ["either a kind"]),
        (MINI + "[link]\nspeed = 3\n", ["'speed'", "latency_us"]),
        (MINI + "[[links]]\nbetween = ['m4', 'm5']\nkind = 'wifi'\n", ["'m5'", "m4"]),
        (MINI + "[[links]]\nbetween = ['m4']\nkind = 'wifi'\n", ["links[0].between"]),
        (MINI + "[[links]]\nbetween = ['m4', 'm4']\nkind = 'wifi'\n", ["'m4'", "itself"]),
        ("machines = 3\n" + MINI, ["'machines'", "machine, link, links"]),
    ],
)
def test_what_a_file_cannot_mean_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "machines.toml" in message
    assert "\n" not in message or "TOML" in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        read_cluster(tmp_path / "nowhere.toml")
