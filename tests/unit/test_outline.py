"""What describes a model arrives whole, and nothing in it leads out of its folder."""

import struct
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.tiny_models import write_tiny_model
from mlx_dist.errors import ModelError, ProtocolError
from mlx_dist.messages import Outline, Part
from mlx_dist.model import outline
from mlx_dist.model.files import find_model


class _Line:
    """Neighbours in a row, each with the messages that were sent to it."""

    def __init__(self, size):
        self.size = size
        self._to = [[] for _ in range(size)]

    def world(self, rank):
        return SimpleNamespace(rank=rank, size=self.size, is_leader=rank == 0, control=self)

    def send(self, message, destination):
        self._to[destination].append(message)

    def receive(self, source):
        return self._to[source + 1].pop(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model("llama", folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / ".hidden.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors"}}'
    )
    return find_model(str(folder))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(part_bytes=st.integers(1, 100_000), size=st.integers(1, 4))
def test_every_rank_gets_the_whole_outline(files, monkeypatch, part_bytes, size):
    monkeypatch.setattr(outline, "_PART_BYTES", part_bytes)
    line, contents = _Line(size), outline._read(files)
    assert set(contents) == {"config.json", "chat_template.jinja", "model.safetensors"}
    sent, same = outline._pass_down(line.world(0), files, contents)
    assert same == contents
    for rank in range(1, size):
        assert outline._pass_down(line.world(rank), None, {}) == (sent, contents)


def test_what_is_unpacked_is_the_same_model(files, tmp_path):
    line = _Line(2)
    outline._pass_down(line.world(0), files, outline._read(files))
    sent, contents = outline._pass_down(line.world(1), None, {})
    described = outline._unpack("/no/where", tmp_path, sent, contents)
    assert described.fingerprint() == files.fingerprint()
    assert described.config == files.config
    [here], [there] = files.weights, described.weights
    assert (there.header, there.size_bytes, there.path) == (here.header, here.size_bytes, None)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "chat_template.jinja"}


def test_a_folder_is_gone_at_the_end_and_so_are_those_of_killed_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(outline.tempfile, "tempdir", str(tmp_path))
    left, others = tmp_path / "mlx_dist-model-left", tmp_path / "other"
    for folder in (left, others):
        folder.mkdir()
        (folder / ".lock").touch()
    with outline._folder() as first:
        assert not left.exists()
        with outline._folder() as second:
            assert first.exists()
        assert not second.exists()
    assert list(tmp_path.iterdir()) == [others]


STRANGE = [
    "../x.json",
    "/etc/x.json",
    "a/b.json",
    ".x.json",
    "..",
    "",
    "x.py",
    "a\n.json",
    "ä.json",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_that_is_no_small_file_is_refused(name):
    line = _Line(2)
    line.send(Outline("version", [(name, 3)], {}), 1)
    line.send(Part(b"abc"), 1)
    with pytest.raises(ProtocolError, match="is no file of a model"):
        outline._pass_down(line.world(1), None, {})


@pytest.mark.parametrize("name", ["../model.safetensors", "model/x.safetensors", "config.json"])
def test_a_name_that_is_no_weight_file_is_refused(name):
    line = _Line(2)
    line.send(Outline("version", [(name, 3)], {name: 100}), 1)
    with pytest.raises(ProtocolError, match="is no file of a model"):
        outline._pass_down(line.world(1), None, {})


def test_an_outline_is_small():
    line = _Line(2)
    line.send(Outline("version", [("config.json", 1 << 40)], {}), 1)
    with pytest.raises(ProtocolError, match="is more than"):
        outline._pass_down(line.world(1), None, {})


def test_another_number_of_bytes_is_noticed():
    line = _Line(2)
    line.send(Outline("version", [("config.json", 5)], {}), 1)
    line.send(Part(b"abcdefgh"), 1)
    with pytest.raises(ProtocolError, match="8 bytes arrived where an outline of 5 was due"):
        outline._pass_down(line.world(1), None, {})


def test_a_large_file_among_the_small_ones_is_named(tmp_path):
    write_tiny_model("llama", tmp_path)
    with (tmp_path / "notes.txt").open("wb") as notes:
        notes.truncate(300 << 20)
    with pytest.raises(ModelError, match=r"notes\.txt alone 300 MiB; move what is none"):
        outline._read(find_model(str(tmp_path)))


def test_a_folder_that_cannot_be_written_is_named(files, tmp_path):
    contents = outline._read(files)
    lengths = [(name, len(data)) for name, data in contents.items()]
    with pytest.raises(ModelError, match="cannot be kept in"):
        outline._unpack(
            "x",
            tmp_path / "gone",
            Outline("version", lengths, {"model.safetensors": 9}),
            contents,
        )


def test_a_config_that_asks_for_code_is_refused(tmp_path):
    config = b'{"model_type": "llama", "model_file": "evil.py"}'
    header = struct.pack("<Q", 2) + b"{}"
    sent = Outline("version", [("config.json", len(config))], {"model.safetensors": len(header)})
    with pytest.raises(ModelError, match="runs no such code"):
        outline._unpack("x", tmp_path, sent, {"config.json": config, "model.safetensors": b"{}"})
