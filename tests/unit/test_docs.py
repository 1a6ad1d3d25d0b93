"""The pages for users name all that there is: flags with their defaults, metrics, fields, files."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import pytest
import typer

from mlx_dist.cli import app
from mlx_dist.cli.settings import Settings
from mlx_dist.model.verdicts import PROVEN, REFUSED
from mlx_dist.serve import failures
from mlx_dist.serve.metrics import Metrics
from mlx_dist.serve.protocol import ChatRequest, CompletionRequest
from tests.fake_llm import STATS

TOP = Path(__file__).parents[2]
OPERATIONS = (TOP / "docs/operations.md").read_text()
ARCHITECTURE = (TOP / "docs/architecture.md").read_text()
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").rglob("*.md"))]


def section(title):
    """The text under a heading of the operations page."""
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", OPERATIONS, re.DOTALL | re.MULTILINE)
    return text


def rows(text):
    """The cells of each row of the tables in `text`, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(option):
    """An option's default as the page writes it."""
    value = option.default
    if option.name == "model":
        return "the embedded model"
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_every_flag_is_there_with_its_default(command):
    told = {
        flag: row[1]
        for row in rows(section(f"Flags of {command}"))
        for flag in re.findall(r"`(-[-\w]+)`", row[0])
    }
    options = typer.main.get_command(app).commands[command].params
    real = {
        flag: shown(option)
        for option in options
        if option.name != "help"
        for flag in (*option.opts, *option.secondary_opts)
    }
    assert told == real


def test_the_example_of_a_file_is_one(tmp_path):
    [example] = re.findall(r"```toml\n(.*?)```", section("Configuration"), re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    settings = Settings.read(tmp_path / "example.toml")
    defaults = settings.defaults(typer.main.get_command(app))
    assert defaults["serve"]["port"] == 8200
    assert defaults["generate"]["stop"] == ["\n\n", "END"]


def test_the_example_of_the_configuration_is_one(tmp_path, monkeypatch, capsys):
    [example] = re.findall(r"```\n\$ (.*?)```", section("Configuration"), re.DOTALL)
    [file] = re.findall(r"```toml\n(.*?)```", section("Configuration"), re.DOTALL)
    command, *lines = example.splitlines()
    (tmp_path / "mlx-dist.toml").write_text(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    variable, _, *arguments = command.split()
    monkeypatch.setenv(*variable.split("="))
    app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out.replace(str(tmp_path), "/home/me")
    told = {" ".join(line.split()) for line in lines if line != "…"}
    assert told <= {" ".join(line.split()) for line in printed.splitlines()}


def test_every_metric_is_there():
    metrics = Metrics(lambda: STATS)
    metrics.count_response(200)
    families = re.findall(r"^# TYPE (\w+) (\w+)$", metrics.text().decode(), re.MULTILINE)
    real = {name for name, _ in families if not name.endswith("_created")}
    told = {
        name for row in rows(section("Metrics")) for name in re.findall(r"mlx_dist_\w+", row[0])
    }
    assert told == real


@pytest.mark.parametrize("shape", [ChatRequest, CompletionRequest])
def test_every_field_of_a_request_is_there(shape):
    told = {
        field
        for row in rows(section("Fields of a request"))
        for field in re.findall(r"`(\w+)`", row[0])
    }
    assert set(shape.model_fields) <= told


def test_every_status_is_there():
    statuses = set(map(str, failures.STATUSES))
    assert statuses <= {s for row in rows(section("Errors")) for s in re.findall(r"\d+", row[0])}


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_number_of_proven_families_is_told(page):
    text = (TOP / page).read_text()
    [numbers] = re.findall(r"(\d+) of mlx-lm's (\d+) families", text)
    assert tuple(map(int, numbers)) == (len(PROVEN), len(PROVEN) + len(REFUSED))


def test_every_module_is_there():
    modules = {
        path.name for path in (TOP / "mlx_dist").rglob("*.py") if path.parent.name != "demo"
    } - {"__init__.py"}
    assert modules <= set(re.findall(r"\w+\.py", ARCHITECTURE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if ":" not in t and not (page.parent / t).exists()]
    assert not missing
