"""Rank 0's index of the prefixes whose KV caches every rank keeps, for prompts that begin alike.

Owns which entry can serve which tokens, what the entries cost on each rank, and which of them goes
first. Knows tokens and bytes; knows no arrays, no network and no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, count
from operator import ne


@dataclass(frozen=True, slots=True)
class Match:
    """The first `length` tokens of `entry_id` can be reused."""

    entry_id: int
    length: int


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens that no entry ends or branches within.

    `end` counts the tokens from the root to the end of `edge`. `entry_id` is the entry that ends
    there, `trimmable_id` a trimmable entry that ends there or below: if there is one, that of the
    node itself or of one of its children.
    """

    edge: tuple[int, ...]
    end: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)  # by the first token of their edge
    entry_id: int | None = None
    trimmable_id: int | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    node: _Node
    bytes_by_rank: tuple[int, ...]
    is_trimmable: bool
    num_pins: int = 0


class PrefixIndex:
    """A radix tree over tokens. Looking up costs as much as reading the tokens.

    An entry stands for the caches of exactly its tokens. Any shorter prefix can be cut out of a
    trimmable entry; another is of use only as a whole. A pinned entry never leaves the index: a
    plan that copies it has not been passed down yet.
    """

    def __init__(self, num_ranks: int) -> None:
        self._root = _Node((), 0, None)
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._bytes_by_rank = (0,) * num_ranks

    @property
    def num_entries(self) -> int:
        """How many entries the ranks keep."""
        return len(self._entries)

    @property
    def bytes_by_rank(self) -> tuple[int, ...]:
        """What all entries together cost on each rank."""
        return self._bytes_by_rank

    def add(
        self,
        entry_id: int,
        tokens: tuple[int, ...],
        bytes_by_rank: tuple[int, ...],
        is_trimmable: bool,
    ) -> list[int]:
        """Take in an entry as the most recently used; answer the ids that the ranks can drop.

        These are the entries that the new one makes redundant: an equal one and, if the new one
        is trimmable, all that are a prefix of it. They are no longer in the index. Or it is
        `entry_id` alone, which then was not taken in: a trimmable entry has all of its tokens,
        or an equal one is pinned. That entry counts as used.
        """
        assert tokens and entry_id not in self._entries
        path = self._path(tokens)
        keeper_id = self._keeper(path, len(tokens))
        if keeper_id is not None:
            self._entries.move_to_end(keeper_id)
            return [entry_id]
        least = 1 if is_trimmable else len(tokens)
        ending = [node.entry_id for node, length in path if least <= length == node.end]
        redundant = [i for i in ending if i is not None and not self._entries[i].num_pins]
        for redundant_id in redundant:
            self._remove(redundant_id)
        self._insert(entry_id, _Entry(self._node_at(tokens), bytes_by_rank, is_trimmable))
        return redundant

    def match(self, tokens: Sequence[int], most: int) -> Match | None:
        """The entry that saves most of `tokens[:most]`, which then counts as used.

        None if there is no entry that saves a token.
        """
        assert most >= 0
        best = None
        for node, length in self._path(tokens[:most])[1:]:
            if length == node.end and node.entry_id is not None:
                best = Match(node.entry_id, length)
            elif node.trimmable_id is not None:
                best = Match(node.trimmable_id, length)
        if best:
            self._entries.move_to_end(best.entry_id)
        return best

    def covers(self, tokens: Sequence[int]) -> bool:
        """Whether a trimmable entry has all of `tokens`, or any entry is equal to them."""
        node, length = self._path(tokens)[-1]
        if length < len(tokens):
            return False
        return node.trimmable_id is not None or (length == node.end and node.entry_id is not None)

    def evict(self) -> int | None:
        """Remove the least recently used entry; None if there is none that is not pinned."""
        for entry_id, entry in self._entries.items():
            if not entry.num_pins:
                self._remove(entry_id)
                return entry_id
        return None

    def clear(self) -> list[int]:
        """Remove all entries that are not pinned and answer their ids."""
        return list(iter(self.evict, None))

    def pin(self, entry_id: int) -> None:
        """Keep the entry until it has been unpinned as often as pinned."""
        self._pin(entry_id, 1)

    def unpin(self, entry_id: int) -> None:
        """Take back one `pin`."""
        self._pin(entry_id, -1)

    def _pin(self, entry_id: int, change: int) -> None:
        entry = self._entries[entry_id]
        assert entry.num_pins + change >= 0
        self._entries[entry_id] = replace(entry, num_pins=entry.num_pins + change)

    def _path(self, tokens: Sequence[int]) -> list[tuple[_Node, int]]:
        """The root and the nodes along `tokens`, each with how many tokens agree up to its end.

        Only at the last one can these be fewer than its end.
        """
        node, length = self._root, 0
        path = [(node, length)]
        while length == node.end and length < len(tokens) and tokens[length] in node.children:
            node = node.children[tokens[length]]
            length += _num_common(node.edge, tokens[length : node.end])
            path.append((node, length))
        return path

    def _keeper(self, path: list[tuple[_Node, int]], num_tokens: int) -> int | None:
        """The entry that makes a new one of `num_tokens` along `path` redundant."""
        node, length = path[-1]
        if length < num_tokens:
            return None
        if node.trimmable_id is None and node.entry_id is not None and length == node.end:
            return node.entry_id if self._entries[node.entry_id].num_pins else None
        return node.trimmable_id

    def _node_at(self, tokens: tuple[int, ...]) -> _Node:
        """The node that ends where `tokens` do, made if there is none."""
        node, length = self._path(tokens)[-1]
        if length < node.end:
            node = _split(node, length)
        if length < len(tokens):
            leaf = _Node(tokens[length:], len(tokens), node)
            node.children[tokens[length]] = leaf
            node = leaf
        return node

    def _insert(self, entry_id: int, entry: _Entry) -> None:
        self._entries[entry_id] = entry
        self._count(entry, 1)
        entry.node.entry_id = entry_id
        node: _Node | None = entry.node
        while node and entry.is_trimmable:
            node.trimmable_id = entry_id
            node = node.parent

    def _remove(self, entry_id: int) -> None:
        entry = self._entries.pop(entry_id)
        self._count(entry, -1)
        entry.node.entry_id = None
        node: _Node | None = entry.node
        while node and node.trimmable_id == entry_id:
            node.trimmable_id = self._trimmable_at(node)
            node = node.parent
        parent = entry.node.parent
        assert parent is not None
        _tidy(entry.node)
        _tidy(parent)  # may have lost the one of two children

    def _trimmable_at(self, node: _Node) -> int | None:
        if node.entry_id is not None and self._entries[node.entry_id].is_trimmable:
            return node.entry_id
        found = (child.trimmable_id for child in node.children.values())
        return next((entry_id for entry_id in found if entry_id is not None), None)

    def _count(self, entry: _Entry, sign: int) -> None:
        pairs = zip(self._bytes_by_rank, entry.bytes_by_rank, strict=True)
        self._bytes_by_rank = tuple(total + sign * num_bytes for total, num_bytes in pairs)


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix, found without a loop in Python."""
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))


def _split(node: _Node, end: int) -> _Node:
    """Cut the edge of `node` so that a new node above it ends at `end`; answer that one."""
    assert node.parent is not None
    cut = end - node.parent.end
    upper = _Node(node.edge[:cut], end, node.parent, trimmable_id=node.trimmable_id)
    node.parent.children[node.edge[0]] = upper
    node.edge, node.parent = node.edge[cut:], upper
    upper.children[node.edge[0]] = node
    return upper


def _tidy(node: _Node) -> None:
    """Take out `node` if no entry ends and no two children part there. The root stays."""
    if node.parent is None or node.entry_id is not None or len(node.children) > 1:
        return
    siblings, first = node.parent.children, node.edge[0]
    if node.children:
        [child] = node.children.values()
        child.edge, child.parent = node.edge + child.edge, node.parent
        siblings[first] = child
    else:
        del siblings[first]
