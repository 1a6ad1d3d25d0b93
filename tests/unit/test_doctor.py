"""What the doctor makes of the ranks' answers, and of what one rank finds."""

import hashlib
from dataclasses import replace

import pytest

from mlx_dist.cluster.world import alone
from mlx_dist.display import Level
from mlx_dist.doctor import fit, prompts
from mlx_dist.doctor.findings import (
    Answer,
    Finding,
    ask,
    differences,
    errors,
    on_each,
)
from mlx_dist.engine.sequence import Event
from mlx_dist.errors import ModelError
from mlx_dist.messages import Identity, Logprobs, Outcome


class Gathered:
    """A control plane on which the other ranks have answered already."""

    def __init__(self, *others):
        self.others = others

    def all_gather(self, message):
        return [message, *self.others]


def world_of(*hosts, answers=()):
    world = alone()
    return replace(world, size=len(hosts), hosts=hosts, control=Gathered(*answers))


def test_differences_name_ranks():
    world = world_of("a", "b", "c")
    answers = [
        Answer(0, {"mlx": "1", "model": "x"}),
        Answer(1, {"mlx": "2", "model": "x"}),
        Answer(2, {"mlx": "1"}),
    ]
    assert differences(world, answers) == ["mlx is 1 on rank 0 (a), rank 2 (c), 2 on rank 1 (b)"]
    assert differences(world, answers[::2]) == []


def test_an_error_that_all_have_is_said_once():
    world = world_of("a", "b")
    wrong = [Answer(0, {}, "no file"), Answer(1, {}, "no file")]
    assert errors(world, wrong) == ["no file"]
    assert errors(world, [Answer(0, {}), wrong[1]]) == ["rank 1 (b): no file"]


def test_a_rank_that_fails_answers_all_the_same():
    def part():
        raise ModelError("no file")

    answers = ask(world_of("a", "b", answers=[Identity("b", {"x": "1"})]), part)
    assert answers == [Answer(0, {}, "no file"), Answer(1, {"x": "1"})]
    answers = ask(world_of("a", "b", answers=[Outcome("no disk")]), lambda: {"x": "1"})
    assert answers == [Answer(0, {"x": "1"}), Answer(1, {}, "no disk")]


def test_the_worst_finding_counts():
    fine = Finding(Level.ok, "disk", "large")
    other = Identity("b", {"level": "warn", "found": "small", "remedy": "buy one"})
    found = on_each(world_of("a", "b", answers=[other]), fine)
    assert found == Finding(Level.warn, "disk", "small on rank 1 (b)", "buy one")
    worse = Finding(Level.fail, "disk", "gone", "look for it")
    found = on_each(world_of("a", "b", answers=[other]), worse)
    assert found == Finding(Level.fail, "disk", "gone on rank 0 (a)", "look for it")
    assert on_each(alone(), fine) == fine


def events(*pairs):
    return [Event(0, 9, 0, token, Logprobs(logprob, [])) for token, logprob in pairs]


OWN = events((1, -0.5), (2, -0.25), (3, -1.0))


@pytest.mark.parametrize(
    ("answered", "are_alike", "level", "words"),
    [
        (OWN, True, Level.ok, "as one process does"),
        (events((1, -0.5), (2, -0.251), (3, -1.0)), True, Level.ok, "within 0.001 of"),
        (events((1, -0.5), (2, -0.75), (3, -1.0)), False, Level.fail, "differ by 0.5"),
        (events((1, -0.5), (2, float("nan")), (3, -1.0)), True, Level.fail, "differ by inf"),
        (events((1, -0.5), (7, -0.25), (3, -1.0)), True, Level.fail, "from the 2. token"),
        (events((1, -0.5), (7, -0.25), (3, -1.0)), False, Level.warn, "from the 2. token"),
        (OWN[:1], True, Level.fail, "from the 2. token"),
    ],
    ids=["equal", "rounding", "unlikely", "nan", "other", "other chip", "shorter"],
)
def test_answers_are_compared(answered, are_alike, level, words):
    finding = prompts.compare("short prompt", "3 tokens", answered, OWN, are_alike)
    assert finding.level is level
    assert words in finding.found
    assert bool(finding.remedy) == (level is not Level.ok)


@pytest.mark.parametrize(
    ("answered", "level", "words"),
    [
        (events((1, -0.5), (7, -0.26), (9, -3.0)), Level.ok, "a near tie at the 2. token"),
        (events((1, -0.5), (7, -0.75), (3, -1.0)), Level.fail, "from the 2. token"),
        (events((1, -0.9), (7, -0.25), (3, -1.0)), Level.fail, "from the 2. token"),
        ([], Level.fail, "from the 1. token"),
    ],
    ids=["near tie", "other", "unlikely before", "none"],
)
def test_a_group_may_decide_a_near_tie_otherwise(answered, level, words):
    finding = prompts.compare("short prompt", "3 tokens", answered, OWN, True, adds_up=True)
    assert finding.level is level
    assert words in finding.found


def test_a_damaged_file_of_the_hubs_cache_is_known_without_another(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    digest = hashlib.sha256(b"weights").hexdigest()
    link = tmp_path / "model.safetensors"
    link.symlink_to(blobs / digest)
    (blobs / digest).write_bytes(b"weights")
    fit._check_blob(link, digest)
    with pytest.raises(ModelError, match=f"remove {blobs / digest} and download"):
        fit._check_blob(link, hashlib.sha256(b"wrights").hexdigest())
