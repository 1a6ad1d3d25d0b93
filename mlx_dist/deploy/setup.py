"""`mlx-dist cluster init`: what the checks found, as a table, and the files that follow from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_dist.cluster.hostfile import hostfile_of, require_names
from mlx_dist.deploy.checks import NAMES, Finding, examine, require_leader_here
from mlx_dist.display import Level
from mlx_dist.errors import ConfigError

HOSTFILE = "hostfile.txt"


def run_init(
    hosts: Sequence[str], settings: Path, model: str | None, name: str | None, is_forced: bool
) -> bool:
    """Check `hosts`; if nothing fails, or if forced to, write `settings` and a hostfile beside it.

    `model` is a folder or a hub id. Whether the files were written.
    Raises ConfigError for hosts that cannot be and, unless forced, for files that are there.
    """
    if len(set(hosts)) < len(hosts):
        raise ConfigError("a host is named twice; name each once")
    require_names(hosts)
    require_leader_here(hosts)
    is_folder = model is not None and (model.startswith(("/", "~", ".")) or Path(model).exists())
    folder = str(Path(model).expanduser().absolute()) if model is not None and is_folder else None
    files = _files(hosts, settings, folder or model, name)
    there = [path.name for path in files if path.exists()]
    if there and not is_forced:
        raise ConfigError(
            f"{' and '.join(there)} in {settings.parent} would be overwritten; "
            "give --force if that is right, or do this in another folder"
        )
    findings = examine(hosts, folder)
    _show(hosts, findings, has_model=folder is not None)
    if any(finding.level is Level.fail for finding in findings) and not is_forced:
        print("nothing is written; put this right and do it again, or give --force")
        return False
    for path, text in files.items():
        _write(path, text)
    return True


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    print(f"written: {path}")


def _files(
    hosts: Sequence[str], settings: Path, model: str | None, name: str | None
) -> dict[Path, str]:
    files = {settings: _settings(len(hosts), model, name)}
    if len(hosts) > 1:
        files[settings.parent / HOSTFILE] = hostfile_of(hosts)
    return files


def _settings(num_hosts: int, model: str | None, name: str | None) -> str:
    lines = [
        "# What holds for every mlx-dist command in this folder; a flag or a variable goes first.",
        # As JSON a string is one in TOML, too.
        f"model = {json.dumps(model, ensure_ascii=False)}"
        if model is not None
        else '# model = "owner/model"   # or a folder; without, it is the embedded one',
        f"ranks = {num_hosts}",
    ]
    if num_hosts > 1:
        lines.append(f'hostfile = "{HOSTFILE}"')
    lines += ["", "[serve]", "# port = 8100", "", "[cluster]"]
    lines.append(f'{"" if name else "# "}name = "{name or "default"}"   # of the state folder')
    return "\n".join(lines) + "\n"


def _show(hosts: Sequence[str], findings: Sequence[Finding], has_model: bool) -> None:
    """Print a line for each host, and below them what to do."""
    levels = {(finding.host, finding.name): finding.level for finding in findings}
    names = [name for name in NAMES if has_model or name != "model"]
    rows = [["host", *names]]
    rows += [[host, *(levels.get((host, name), "-") for name in names)] for host in hosts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    for finding in findings:
        if finding.level is not Level.ok:
            print(f"{finding.level:<5}{finding.host}, {finding.name}: {finding.found}")
            print(f"     -> {finding.remedy}")
