"""What is kept between starts comes back under the same facts, as what it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mlx_dist.cluster import memo


@dataclass(frozen=True)
class _Times:
    step_s: dict[int, float]


@dataclass(frozen=True)
class _MoreTimes:
    step_s: dict[int, float]
    score_s: tuple[float, ...] = ()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(memo, "cache_folder", lambda: tmp_path)


def test_it_comes_back_under_exactly_the_same_facts():
    times = _Times({1: 0.5})
    memo.keep("step times", {"a": 1, "b": 2}, times)
    assert memo.recall("step times", {"b": 2, "a": 1}, _Times) == times
    assert memo.recall("step times", {"a": 1}, _Times) is None
    assert memo.recall("speeds", {"a": 1, "b": 2}, _Times) is None


def test_what_another_release_measured_less_of_is_measured_anew():
    memo.keep("step times", {}, _Times({1: 0.5}))
    assert memo.recall("step times", {}, _MoreTimes) is None
    memo.keep("step times", {}, _MoreTimes({1: 0.5}, (0.1,)))
    assert memo.recall("step times", {}, _MoreTimes) == _MoreTimes({1: 0.5}, (0.1,))
    assert memo.recall("step times", {}, _Times) == _Times({1: 0.5})
