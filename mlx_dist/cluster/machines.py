"""Machines that nobody has started: a TOML file of them becomes machines and links.

Knows published numbers and what people have measured; asks no machine. docs/plans.md has the keys.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from mlx_dist.cluster import chips
from mlx_dist.cluster.costs import Link, Machine
from mlx_dist.errors import ConfigError

# Memory is sold in these.
_GIB = 1 << 30
_BYTES_PER_GBIT = 1e9 / 8
_NOWHERE = Link(latency_s=0.0, bytes_per_s=float("inf"))
_HELP = "docs/plans.md has an example"

# What Metal recommends to use at most, as llama.cpp logs it on Macs of many sizes: 10,923 MiB of
# 16 GiB, 21,845 of 32, 27,648 of 36, 73,728 of 96. A newer macOS gives more (475,136 of 512 GiB).
_SMALL_BELOW_GIB = 36
_SMALL_SHARE, _LARGE_SHARE = 2 / 3, 3 / 4

# Seconds one way and bytes a second of a stream. Thunderbolt's IP takes 0.38 to 0.95 ms for a round
# trip and Wi-Fi 5 to 30 ms (exo issue 2295); RDMA less than 50 us (Apple's TN3205) at 50 to
# 60 Gbit/s; TCP over Thunderbolt 4 has been seen at 16.4 of 20 Gbit/s, and Thunderbolt 5, of twice
# the rate, is taken to do as well. Wired Ethernet carries 94% of its rate as data.
_KINDS = {
    "rdma": Link(50e-6, 50 * _BYTES_PER_GBIT),
    "thunderbolt5": Link(300e-6, 32 * _BYTES_PER_GBIT),
    "thunderbolt4": Link(300e-6, 16 * _BYTES_PER_GBIT),
    "10gbe": Link(100e-6, 9.4 * _BYTES_PER_GBIT),
    "2.5gbe": Link(150e-6, 2.35 * _BYTES_PER_GBIT),
    "1gbe": Link(150e-6, 0.94 * _BYTES_PER_GBIT),
    "wifi": Link(5e-3, 0.5 * _BYTES_PER_GBIT),
}

# TOML has numbers that are infinite, and some that are none.
Positive = Annotated[float, Meta(gt=0, lt=1e9)]
Micros = Annotated[float, Meta(ge=0, lt=1e9)]
Count = Annotated[int, Meta(ge=1, le=64)]


class _MachineTable(Struct, frozen=True, forbid_unknown_fields=True):
    memory_gb: Positive
    chip: str | None = None
    gpu_cores: Annotated[int, Meta(ge=1)] | None = None
    bandwidth_gb_s: Positive | None = None
    tflops: Positive | None = None
    usable_gb: Positive | None = None
    count: Count = 1
    name: str | None = None


class _LinkTable(Struct, frozen=True, forbid_unknown_fields=True):
    kind: str | None = None
    gbit_s: Positive | None = None
    latency_us: Micros | None = None


class _PairTable(Struct, frozen=True, forbid_unknown_fields=True):
    between: tuple[str, str]
    kind: str | None = None
    gbit_s: Positive | None = None
    latency_us: Micros | None = None


class _FileTables(Struct, frozen=True, forbid_unknown_fields=True):
    machine: Annotated[list[_MachineTable], Meta(min_length=1)]
    link: _LinkTable | None = None
    links: list[_PairTable] = []


@dataclass(frozen=True, slots=True)
class Cluster:
    """Machines of a file, and links[a][b] from each to each. Their speeds depend on the model."""

    names: tuple[str, ...]
    links: tuple[tuple[Link, ...], ...]
    _tables: tuple[_MachineTable, ...]

    def machines(self, dtype: str, bits: int) -> tuple[Machine, ...]:
        """The machines as they compute in `dtype`, and with weights quantized to `bits`."""
        return tuple(
            _machine(name, table, dtype, bits)
            for name, table in zip(self.names, self._tables, strict=True)
        )


def read_cluster(path: Path) -> Cluster:
    """The cluster that the TOML file `path` describes. Raises ConfigError for what it cannot be."""
    try:
        tables = msgspec.convert(tomllib.loads(path.read_text()), _FileTables)
        return _cluster(tables)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--machines {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--machines {path} is not TOML: {error}; {_HELP}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"--machines {path}: {_explained(error)}; {_HELP}") from None
    except ConfigError as error:
        raise ConfigError(f"--machines {path}: {error}") from None


def usable_bytes(memory_bytes: int) -> int:
    """What weights and caches may take of a Mac's memory, if nobody says otherwise."""
    is_small = memory_bytes < _SMALL_BELOW_GIB * _GIB
    return int(memory_bytes * (_SMALL_SHARE if is_small else _LARGE_SHARE))


def nominal_link(kind: str) -> Link:
    """What a link of this kind does. Raises ConfigError for an unknown one."""
    if kind not in _KINDS:
        raise ConfigError(f"kind {kind!r} of a link is none of {', '.join(_KINDS)}")
    return _KINDS[kind]


def faster_link(link: Link) -> tuple[str, Link] | None:
    """The next faster kind of wired link and what it does, or None if there is none."""
    wired = [(kind, link) for kind, link in _KINDS.items() if kind != "wifi"]
    for kind, better in sorted(wired, key=lambda item: item[1].bytes_per_s):
        if better.bytes_per_s > link.bytes_per_s and better.latency_s <= link.latency_s:
            return kind, better
    return None


def _cluster(tables: _FileTables) -> Cluster:
    names, expanded = [], []
    for table in tables.machine:
        stem = table.name or (table.chip or "machine").lower().replace(" ", "-")
        names += [stem] if table.count == 1 else [f"{stem}-{i + 1}" for i in range(table.count)]
        expanded += [table] * table.count
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two machines are called {min(twice)!r}; give each a name of its own")
    for name, table in zip(names, expanded, strict=True):
        _check(name, table)
    return Cluster(tuple(names), _links(names, tables), tuple(expanded))


def _check(name: str, table: _MachineTable) -> None:
    has_numbers = table.bandwidth_gb_s is not None and table.tflops is not None
    has_any = table.bandwidth_gb_s is not None or table.tflops is not None
    if (table.chip is None) != has_numbers or (table.chip is None) != has_any:
        raise ConfigError(
            f'machine {name!r} needs either a chip, as in chip = "M4 Pro", or both '
            "bandwidth_gb_s and tflops"
        )
    if table.chip is not None:
        chips.chip_named(table.chip).variant(table.gpu_cores)
    if table.usable_gb is not None and table.usable_gb > table.memory_gb:
        raise ConfigError(
            f"usable_gb {table.usable_gb:g} of machine {name!r} is more than its memory_gb "
            f"{table.memory_gb:g}"
        )


def _machine(name: str, table: _MachineTable, dtype: str, bits: int) -> Machine:
    memory_bytes = int(table.memory_gb * _GIB)
    usable = usable_bytes(memory_bytes) if table.usable_gb is None else table.usable_gb * _GIB
    if table.chip is None:
        assert table.bandwidth_gb_s is not None
        assert table.tflops is not None
        chip = f"{table.tflops:g} TFLOPS, {table.bandwidth_gb_s:g} GB/s"
        unnamed = _chip_of(table.bandwidth_gb_s, table.tflops)
        speeds = chips.nominal_speeds(unnamed, None, dtype, bits)
    else:
        chip = table.chip
        speeds = chips.nominal_speeds(chips.chip_named(chip), table.gpu_cores, dtype, bits)
    return Machine(name, chip, memory_bytes, int(usable), speeds)


def _chip_of(bandwidth_gb_s: float, tflops: float) -> chips.Chip:
    """A chip of one large core that does as much."""
    chip = chips.Chip("unnamed", 1.0, (chips.Variant(1, bandwidth_gb_s),))
    return replace(chip, gpu_ghz=tflops / chip.tflops())


def _links(names: list[str], tables: _FileTables) -> tuple[tuple[Link, ...], ...]:
    pairs: dict[frozenset[str], Link] = {}
    for pair in tables.links:
        if pair.between[0] == pair.between[1]:
            raise ConfigError(f"links between {pair.between[0]!r} and itself; name two machines")
        for name in pair.between:
            if name not in names:
                raise ConfigError(
                    f"links between {name!r}: there is no such machine; there are "
                    f"{', '.join(names)}"
                )
        pairs[frozenset(pair.between)] = _link("[[links]]", pair.kind, pair.gbit_s, pair.latency_us)
    common = None
    if tables.link is not None:
        common = _link("[link]", tables.link.kind, tables.link.gbit_s, tables.link.latency_us)

    def between(a: str, b: str) -> Link:
        if a == b:
            return _NOWHERE
        link = pairs.get(frozenset((a, b)), common)
        if link is None:
            raise ConfigError(
                f'nothing connects {a!r} and {b!r}; add a [link] with a kind, as in kind = "10gbe"'
            )
        return link

    return tuple(tuple(between(a, b) for b in names) for a in names)


def _link(where: str, kind: str | None, gbit_s: float | None, latency_us: float | None) -> Link:
    if (kind is None) == (gbit_s is None):
        raise ConfigError(f"{where} needs either a kind, one of {', '.join(_KINDS)}, or gbit_s")
    if kind is not None:
        link = nominal_link(kind)
        return link if latency_us is None else Link(latency_us / 1e6, link.bytes_per_s)
    assert gbit_s is not None
    if latency_us is None:
        raise ConfigError(f"{where} has gbit_s and no latency_us; give it both, or a kind")
    return Link(latency_us / 1e6, gbit_s * _BYTES_PER_GBIT)


def _explained(error: msgspec.ValidationError) -> str:
    """msgspec's words with the place as it is written in TOML, and the keys that there are."""
    words, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").removeprefix(".").removesuffix("[...]")
    where = f" in {place}" if place else ""
    if unknown := re.search("unknown field `(.*)`", words):
        tables: dict[str, Any] = {"machine": _MachineTable, "link": _LinkTable, "links": _PairTable}
        keys = tables.get(place.partition("[")[0], _FileTables).__struct_fields__
        return f"{unknown[1]!r}{where} is unknown; known keys are {', '.join(keys)}"
    return f"{words[0].lower()}{words[1:]}{where}"
