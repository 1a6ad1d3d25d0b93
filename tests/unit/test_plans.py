"""Plans of any kind in any state: what cannot be is a ProtocolError, all else is done.

The plans are valid messages; a model of the state, a few dictionaries, says which of them fit.
"""

import random
from unittest.mock import MagicMock

import pytest

from benchmarks.tiny_models import write_tiny_model
from mlx_dist.config import Dtype
from mlx_dist.engine.leader import Leader
from mlx_dist.engine.program import Rank
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import (
    Close,
    Drop,
    Keep,
    Merge,
    Open,
    Opening,
    Probe,
    Row,
    Sampling,
    Shutdown,
    Step,
    Tokens,
    Vitals,
)
from mlx_dist.model.cache import SlotCaches
from mlx_dist.model.files import find_model
from mlx_dist.model.sampling import Samplers
from mlx_dist.model.stage import Stage
from mlx_dist.model.weights import load_stage

NUM_WALKS, MOST_PLANS = 100, 25


class State:
    """What a rank that has done all plans so far must hold."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.microbatches = {}
        self.lengths = {}
        self.entries = {}

    def takes(self, plan):
        """Whether `plan` fits; if so, it counts as done."""
        match plan:
            case Open(number, sequences):
                return self._open(number, sequences)
            case Step():
                return self._step(plan)
            case Merge(source, target):
                fits = source in self.microbatches and source != target
                # A name that is new takes any.
                if source == target or not fits:
                    return False
                moved = self.microbatches.pop(source)
                self.microbatches.setdefault(target, []).extend(moved)
            case Close(slots):
                if not set(slots) <= self.lengths.keys():
                    return False
                self._close(set(slots))
            case Keep(slot, entry):
                if slot not in self.lengths or entry in self.entries:
                    return False
                self.entries[entry] = self.lengths[slot]
            case Drop(entries):
                if len(set(entries)) < len(entries) or not set(entries) <= self.entries.keys():
                    return False
                for entry in entries:
                    del self.entries[entry]
        return True

    def _open(self, number, sequences):
        slots = [s.slot for s in sequences]
        fits = number not in self.microbatches and slots and len(set(slots)) == len(slots)
        fits = fits and self.lengths.keys().isdisjoint(slots)
        fits = fits and all(
            s.entry is None or 0 < s.num_cached <= self.entries.get(s.entry, 0) for s in sequences
        )
        if fits:
            self.microbatches[number] = slots
            for s in sequences:
                self.lengths[s.slot] = 0 if s.entry is None else s.num_cached
        return fits

    def _step(self, step):
        rows = step.rows
        fits = self.microbatches.get(step.microbatch) == [row.slot for row in rows]
        fits = fits and all(
            row.position == self.lengths[row.slot]
            and row.tokens
            and all(0 <= token < self.vocab_size for token in row.tokens)
            for row in rows
        )
        fits = fits and (not step.sample or len(rows) == 1 or step.shape[1] == 1)
        if fits:
            for row in rows:
                self.lengths[row.slot] += len(row.tokens)
        return fits

    def _close(self, closed):
        for slot in closed:
            del self.lengths[slot]
        for number, slots in list(self.microbatches.items()):
            slots[:] = [slot for slot in slots if slot not in closed]
            if not slots:
                del self.microbatches[number]


class Planner:
    """Plans that fit more often than not."""

    def __init__(self, state, source):
        self.state = state
        self.random = source

    def plan(self):
        state = self.state
        makers = [self.open, Probe, Shutdown]
        if state.microbatches or self.is_odd():
            makers += [self.step] * 4 + [self.close]
        if len(state.microbatches) > 1 or self.is_odd():
            makers += [self.merge] * 2
        if any(state.lengths.values()) or self.is_odd():
            makers += [self.keep] * 2
        if state.entries or self.is_odd():
            makers.append(self.drop)
        return self.random.choice(makers)()

    def is_odd(self):
        return self.random.random() < 0.03

    def number(self, known, most=6):
        if known and not self.is_odd():
            return self.random.choice(list(known))
        return self.random.randrange(-1, most)

    def fresh(self, known):
        return (
            self.number(known)
            if self.is_odd()
            else self.random.choice([n for n in range(20) if n not in known])
        )

    def open(self):
        sequences = []
        used = set(self.state.lengths)
        for _ in range(0 if self.is_odd() else self.random.randint(1, 3)):
            slot = self.fresh(used)
            used.add(slot)
            entry = self.number(self.state.entries) if self.random.random() < 0.3 else None
            most = self.state.entries.get(entry, 2) + self.is_odd()
            num_cached = (
                most if self.random.random() < 0.5 else self.random.randint(1, max(most, 1))
            )
            sequences.append(Opening(slot, Sampling(), entry, num_cached))
        return Open(self.fresh(self.state.microbatches), sequences)

    def step(self):
        number = self.number(self.state.microbatches)
        slots = list(self.state.microbatches.get(number, [0]))
        if self.is_odd():
            self.random.shuffle(slots)
        if self.is_odd():
            slots = slots[1:]
        length = self.random.choice((1, 1, 3))
        rows = [
            Row(
                slot,
                self.state.lengths.get(slot, 0) + (self.random.choice((-1, 1)) * self.is_odd()),
                [self.token() for _ in range(0 if self.is_odd() else length)],
            )
            for slot in slots
        ]
        return Step(number, rows, self.random.random() < 0.5)

    def token(self):
        odd = (-1, self.state.vocab_size, 1 << 31, 1 << 63, -(1 << 63))
        return self.random.choice(odd) if self.random.random() < 0.005 else 5

    def merge(self):
        source = self.number(self.state.microbatches)
        others = self.state.microbatches.keys() - (set() if self.is_odd() else {source})
        return Merge(source, self.number(sorted(others)))

    def close(self):
        return Close([self.number(self.state.lengths) for _ in range(self.random.randint(1, 2))])

    def keep(self):
        seen = [slot for slot, length in self.state.lengths.items() if length]
        return Keep(self.number(seen, most=0) if seen else 99, self.fresh(self.state.entries))

    def drop(self):
        return Drop([self.number(self.state.entries) for _ in range(1 + self.is_odd())])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_model("llama", folder)
    return load_stage(find_model(str(folder)), 0, 8, Dtype.auto, lambda *_: None)


def test_ranks_that_hold_different_things_are_found():
    rank = MagicMock()
    rank.transport.group_sizes = [1, 1]
    alike = Tokens(-1, [], [], [Vitals(0, 1, 8, digest=5)] * 2)
    rank.transport.poll_tokens.side_effect = [alike, alike, None]
    leader = Leader(rank, MagicMock(num_in_flight=1))
    leader.turn()
    assert leader.vitals == alike.vitals
    vitals = [Vitals(0, 1, 8, digest=5), Vitals(0, 1, 8, digest=6)]
    rank.transport.poll_tokens.side_effect = [Tokens(-1, [], [], vitals)]
    with pytest.raises(ProtocolError, match="no longer hold the same sequences"):
        leader.turn()
    assert leader.is_broken


def test_any_plans_are_done_or_are_protocol_errors(loaded):
    stage = Stage(loaded.model, loaded.anatomy, 0, 8)
    source = random.Random(5)
    refused, done = set(), set()
    for _ in range(NUM_WALKS):
        stage.slots = SlotCaches(loaded.model, loaded.anatomy, 0, 8)
        transport = MagicMock(waited_s=0.0, answers=True)
        samplers = Samplers(stage.vocab_size, MagicMock())
        rank = Rank(stage, transport, samplers, MagicMock(), MagicMock(), 0, 0.0)
        state = State(stage.vocab_size)
        planner = Planner(state, source)
        for _ in range(MOST_PLANS):
            plan = planner.plan()
            if state.takes(plan):
                rank.execute(plan)
                done.add(type(plan))
                assert stage.slots.num_slots == len(state.lengths)
                continue
            # The world ends with it.
            with pytest.raises(ProtocolError):
                rank.execute(plan)
            refused.add(type(plan))
            break
    assert refused == {Open, Step, Merge, Close, Keep, Drop}
    assert done == refused | {Probe, Shutdown}
