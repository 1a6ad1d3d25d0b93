"""The prefix index answers what a list of entries would, and its tree keeps nothing it need not."""

import gc
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_dist.engine.prefix import Match, PrefixIndex, _Node

token_lists = st.lists(st.integers(0, 2), max_size=8)


@dataclass(frozen=True)
class Entry:
    """An entry of the naive model."""

    tokens: tuple[int, ...]
    bytes_by_rank: tuple[int, int]
    is_trimmable: bool
    num_pins: int = 0

    def has(self, tokens):
        """Whether the caches of `tokens` can be taken from this entry."""
        if self.is_trimmable:
            return self.tokens[: len(tokens)] == tuple(tokens)
        return self.tokens == tuple(tokens)


class AgainstAList(RuleBasedStateMachine):
    """Any calls in any order. `entries` is the model: least recently used first."""

    def __init__(self):
        super().__init__()
        self.index = PrefixIndex(num_ranks=2)
        self.entries: dict[int, Entry] = {}
        self.next_id = 0

    def touch(self, entry_id):
        self.entries[entry_id] = self.entries.pop(entry_id)

    @rule(
        tokens=token_lists.filter(bool).map(tuple),
        sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
        is_trimmable=st.booleans(),
    )
    def add(self, tokens, sizes, is_trimmable):
        new_id, new = self.next_id, Entry(tokens, sizes, is_trimmable)
        self.next_id += 1
        answer = self.index.add(new_id, tokens, sizes, is_trimmable)
        covering = {
            i
            for i, entry in self.entries.items()
            if entry.has(tokens) and (entry.is_trimmable or entry.num_pins)
        }
        if covering:
            assert answer == [new_id]
            touched = list(self.index._entries)[-1]  # any of them may be
            assert touched in covering
            self.touch(touched)
            return
        covered = {i for i, entry in self.entries.items() if new.has(entry.tokens)}
        redundant = {i for i in covered if not self.entries[i].num_pins}
        assert len(answer) == len(redundant)
        assert set(answer) == redundant
        for i in redundant:
            del self.entries[i]
        self.entries[new_id] = new

    @rule(tokens=token_lists, most=st.integers(0, 9))
    def match(self, tokens, most):
        prefixes = [tokens[:length] for length in range(1, min(most, len(tokens)) + 1)]
        lengths = [len(p) for p in prefixes if any(e.has(p) for e in self.entries.values())]
        found = self.index.match(tokens, most)
        if not lengths:
            assert found is None
        else:
            assert found.length == max(lengths)
            assert self.entries[found.entry_id].has(tokens[: found.length])
            self.touch(found.entry_id)

    @rule(tokens=token_lists)
    def covers(self, tokens):
        assert self.index.covers(tokens) == any(e.has(tokens) for e in self.entries.values())

    @rule()
    def evict(self):
        expected = next((i for i, entry in self.entries.items() if not entry.num_pins), None)
        assert self.index.evict() == expected
        self.entries.pop(expected, None)

    @rule()
    def clear(self):
        expected = [i for i, entry in self.entries.items() if not entry.num_pins]
        assert self.index.clear() == expected
        for i in expected:
            del self.entries[i]

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def pin(self, data):
        self.index.pin(self.change_pins(data, list(self.entries), 1))

    @precondition(lambda self: any(entry.num_pins for entry in self.entries.values()))
    @rule(data=st.data())
    def unpin(self, data):
        pinned = [i for i, entry in self.entries.items() if entry.num_pins]
        self.index.unpin(self.change_pins(data, pinned, -1))

    def change_pins(self, data, entry_ids, change):
        i = data.draw(st.sampled_from(entry_ids))
        self.entries[i] = replace(self.entries[i], num_pins=self.entries[i].num_pins + change)
        return i

    @invariant()
    def numbers_agree(self):
        assert self.index.num_entries == len(self.entries)
        assert list(self.index._entries) == list(self.entries)
        sizes = [entry.bytes_by_rank for entry in self.entries.values()]
        assert self.index.bytes_by_rank == tuple(map(sum, zip((0, 0), *sizes, strict=True)))

    @invariant()
    def the_tree_is_compressed(self):
        found, nodes = {}, [((), self.index._root)]
        while nodes:
            above, node = nodes.pop()
            tokens = above + node.edge
            assert node.end == len(tokens)
            assert node.parent is None or node.edge
            assert node.parent is None or node.entry_id is not None or len(node.children) > 1
            if node.entry_id is not None:
                found[node.entry_id] = tokens
            if node.trimmable_id is not None:
                assert self.entries[node.trimmable_id].is_trimmable
                assert self.entries[node.trimmable_id].has(tokens)
            else:
                assert not any(e.is_trimmable and e.has(tokens) for e in self.entries.values())
            for first, child in node.children.items():
                assert first == child.edge[0]
                assert child.parent is node
                nodes.append((tokens, child))
        assert found == {i: entry.tokens for i, entry in self.entries.items()}


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_the_second_turn_of_a_chat_prefills_only_what_is_new():
    index = PrefixIndex(num_ranks=3)
    first = tuple(range(50))
    assert index.add(1, first, (10, 20, 30), is_trimmable=True) == []
    second = (*first, 7, 8, 9)
    assert index.match(second, most=len(second) - 1) == Match(1, 50)
    assert index.add(2, second, (11, 21, 31), is_trimmable=True) == [1]
    assert index.bytes_by_rank == (11, 21, 31)


def test_an_untrimmable_snapshot_serves_only_as_a_whole():
    index = PrefixIndex(num_ranks=1)
    index.add(1, (1, 2, 3), (5,), is_trimmable=False)
    index.add(2, (1, 2, 3, 4, 5), (5,), is_trimmable=False)
    assert index.match((1, 2, 3, 4, 9), most=4) == Match(1, 3)
    assert index.match((1, 2, 3, 4, 5), most=4) == Match(1, 3)
    assert index.match((1, 2, 3, 4, 5, 6), most=5) == Match(2, 5)
    assert index.match((1, 2), most=2) is None


def test_a_pinned_entry_stays_whatever_comes():
    index = PrefixIndex(num_ranks=1)
    index.add(1, (1, 2), (5,), is_trimmable=True)
    index.pin(1)
    index.pin(1)
    assert index.add(2, (1, 2, 3), (6,), is_trimmable=True) == []
    index.unpin(1)
    assert index.evict() == 2
    assert index.clear() == []
    index.unpin(1)
    assert index.clear() == [1]


def test_unpinning_more_often_than_pinning_is_a_mistake():
    index = PrefixIndex(num_ranks=1)
    index.add(1, (1, 2), (5,), is_trimmable=True)
    with pytest.raises(AssertionError):
        index.unpin(1)


def _num_nodes():
    return sum(isinstance(found, _Node) for found in gc.get_objects())


def test_a_tree_of_thousands_of_levels_needs_no_recursion_and_no_collector():
    gc.collect()
    index, tokens, num_levels = PrefixIndex(num_ranks=1), tuple(range(2400)), 1200
    num_before = _num_nodes()
    gc.disable()
    try:
        for i in range(num_levels):
            assert index.add(i, tokens[: 2 * i + 2], (1,), is_trimmable=False) == []
        assert index.match(tokens, most=2399) == Match(1198, 2398)
        assert _num_nodes() == num_before + num_levels
        assert index.add(num_levels, (*tokens, 1), (1,), is_trimmable=True) == [*range(num_levels)]
        assert _num_nodes() == num_before + 1
        assert index.clear() == [num_levels]
        assert _num_nodes() == num_before
    finally:
        gc.enable()


def test_long_prompts_that_part_late():
    index, tokens = PrefixIndex(num_ranks=1), tuple(range(100_000))
    for i in range(20):
        assert index.add(i, (*tokens[: -1 - i], -1), (1,), is_trimmable=True) == []
    for i in range(20):
        assert index.match(tokens[: -1 - i], most=100_000).length == min(99_999, 99_999 - i)
    assert index.covers(tokens[:-1])
    assert not index.covers(tokens)
    assert len(index.clear()) == 20
    assert not index._root.children
