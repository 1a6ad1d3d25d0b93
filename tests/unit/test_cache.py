"""Sequences that share caches get the logits that each gets alone, whatever else goes on."""

import random

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from benchmarks.batches import Batches
from benchmarks.tiny_models import write_tiny_model
from mlx_dist.config import Dtype
from mlx_dist.demo import MODEL_DIR
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.errors import ProtocolError
from mlx_dist.messages import Row, Step
from mlx_dist.model.files import find_model
from mlx_dist.model.stage import Stage
from mlx_dist.model.verdicts import UNBATCHED, UNPADDED
from mlx_dist.model.weights import load_stage

MOST_TOKENS = 12  # of a step, beyond the tiny models' window of 8
# A family for each kind of cache. With stages of one layer kind only, too.
FAMILIES = {
    "llama": (8,),  # KVCache
    "gemma3_text": (1, 8),  # RotatingKVCache, KVCache
    "qwen3_next": (2, 8),  # ArraysCache, KVCache
    "falcon_h1": (4, 8),  # CacheList of both
    "longcat_flash": (8,),  # CacheList of two KVCache
    "mamba": (4, 8),  # ArraysCache
    "nemotron-nas": (1, 8),  # KVCache, some of which stay empty
}


def stages_of(folder, cut, **proven):
    files = find_model(str(folder))
    stages = []
    for start, end in zip((0, *cut), cut, strict=False):
        loaded = load_stage(files, start, end, Dtype.auto, lambda *_: None)
        stages.append(Stage(loaded.model, loaded.anatomy, start, end, **proven))
    return stages


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_model("llama", folder)
    return folder


class Walk:
    """Operations in random order, as many as a scheduler could think of."""

    def __init__(self, model, stages, seed):
        self.batches = Batches(model, stages, seed)
        self.stages = stages
        self.ledger = KvLedger([KvRoom(s.kv_cost(), 0) for s in stages], slack=MOST_TOKENS)
        self.random = random.Random(seed)
        self.numbers = iter(range(1, 1000))
        self.pads = stages[0].slots.can_pad

    def go(self, num_operations):
        operations = [self.open] * 3 + [self.step] * 2 + [self.decode] * 6
        operations += [self.merge] * 3 + [self.close] * 2 + [self.keep, self.keep, self.drop]
        for _ in range(num_operations):
            self.random.choice(operations)()
            self.check_held()
        self.batches.close([s for slots in self.batches.slots_of.values() for s in slots])
        self.batches.drop(list(self.batches.entries))
        self.batches.check_empty()

    def open(self):
        if self.batches.num_slots > 8:
            return
        count = self.random.randint(1, 4)
        number = next(self.numbers)
        self.batches.open(
            number,
            [next(self.numbers) for _ in range(count)],
            [self.source() for _ in range(count)],
        )
        # Some have nothing to prefill.
        if self.random.random() < 0.8:
            self.batches.step(number, self.lengths(count))

    def source(self):
        if not self.batches.entries or self.random.random() < 0.5:
            return None
        entry, tokens = self.random.choice(list(self.batches.entries.items()))
        may_trim = len(tokens) < self.stages[0].slots.trim_limit
        return entry, self.random.randint(1, len(tokens)) if may_trim else len(tokens)

    def lengths(self, count):
        lengths = [self.random.randint(1, MOST_TOKENS) for _ in range(count)]
        return lengths if self.pads else [lengths[0]] * count

    def step(self):
        if number := self.microbatch():
            self.batches.step(number, self.lengths(len(self.batches.slots_of[number])))

    def decode(self):
        if number := self.microbatch():
            self.batches.decode(number, 1)

    def merge(self):
        source, target = self.microbatch(), self.microbatch()
        if source != target:
            self.batches.merge(source, target)

    def close(self):
        if number := self.microbatch():
            slots = self.batches.slots_of[number]
            self.batches.close(self.random.sample(slots, self.random.randint(1, len(slots))))

    def keep(self):
        if (number := self.microbatch()) and len(self.batches.entries) < 4:
            slot = self.random.choice(self.batches.slots_of[number])
            if self.batches.length(slot):
                self.batches.keep(slot, next(self.numbers))

    def drop(self):
        if self.batches.entries:
            self.batches.drop([self.random.choice(list(self.batches.entries))])

    def microbatch(self):
        return self.random.choice(list(self.batches.slots_of) or [None])

    def check_held(self):
        """Caches hold no more than the leader counts."""
        lengths = [[self.batches.length(s) for s in m] for m in self.batches.slots_of.values()]
        reserved = self.ledger.reserved_bytes(lengths)
        kept = [self.ledger.bytes_of(len(tokens)) for tokens in self.batches.entries.values()]
        for i, stage in enumerate(self.stages):
            assert stage.slots.num_slots == self.batches.num_slots
            assert stage.slots.kv_bytes <= reserved[i] + sum(cost[i] for cost in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_operations_leave_each_sequence_its_logits(family, tmp_path):
    write_tiny_model(family, tmp_path)
    stages = stages_of(tmp_path, FAMILIES[family], pads=family not in UNPADDED)
    Walk(load_model(tmp_path)[0], stages, seed=1).go(60)


def test_any_operations_leave_the_embedded_model_its_logits():
    Walk(load_model(MODEL_DIR)[0], stages_of(MODEL_DIR, (3, 6)), seed=2).go(60)


def test_the_families_here_are_batched():
    assert not UNBATCHED.keys() & FAMILIES


def test_a_sequence_may_leave_before_any_has_seen_a_token(llama):
    batches = Batches(load_model(llama)[0], stages_of(llama, (4, 8)))
    batches.open(0, [0, 1, 2])
    batches.close([1])
    batches.close([0])
    batches.step(0, [5])
    batches.open(1, [3, 4])
    batches.merge(1, 0)
    batches.decode(0, 1)


def test_several_tokens_may_follow_once_a_shared_window_has_turned(tmp_path):
    write_tiny_model("gemma3_text", tmp_path)
    batches = Batches(load_model(tmp_path)[0], stages_of(tmp_path, (8,)))
    for slot, length in enumerate((17, 3)):
        batches.open(slot, [slot])
        batches.step(slot, [length])
    batches.merge(1, 0)
    batches.decode(0, 2)
    batches.step(0, [2, 5])
    batches.decode(0, 2)


def test_an_entry_holds_no_memory_but_its_own(tmp_path):
    write_tiny_model("mamba", tmp_path)
    [stage] = stages_of(tmp_path, (8,))
    stage.slots.open(0, range(64), [None] * 64)
    mx.eval(stage.forward(Step(0, [Row(slot, 0, [1, 2, 3]) for slot in range(64)]), None))
    mx.eval(stage.slots.states(0))
    held_bytes = stage.slots.kv_bytes
    stage.slots.keep(5, 0)
    before_bytes = mx.get_active_memory()
    stage.slots.close(range(64))
    assert before_bytes - mx.get_active_memory() > 0.9 * held_bytes
    assert 0 < stage.slots.kv_bytes <= held_bytes / 64


def test_the_first_part_of_an_entry_takes_no_memory_for_the_rest(llama):
    [stage] = stages_of(llama, (8,))
    cost = stage.kv_cost()
    stage.slots.open(0, [0], [None])
    mx.eval(stage.forward(Step(0, [Row(0, 0, [1] * 300)]), None), stage.slots.states(0))
    stage.slots.keep(0, 0)
    stage.slots.close([0])
    assert stage.slots.kv_bytes == cost.bytes_for(300)
    stage.slots.open(0, [0], [(0, 4)])
    assert stage.slots.kv_bytes == cost.bytes_for(300) + cost.bytes_for(4)


def test_padding_that_all_rows_have_is_dropped(llama):
    [stage] = stages_of(llama, (8,))
    cost = stage.kv_cost()
    stage.slots.open(0, [0], [None])
    mx.eval(stage.forward(Step(0, [Row(0, 0, [1] * 300)]), None), stage.slots.states(0))
    stage.slots.keep(0, 0)
    stage.slots.open(1, [1, 2], [(0, 300), (0, 1)])
    stage.forward(Step(1, [Row(1, 300, [1]), Row(2, 1, [1] * 300)]), None)
    stage.slots.close([0])
    stage.slots.drop([0])
    assert stage.slots.kv_bytes <= 2 * cost.bytes_for(301 + 256)


def test_sequences_that_join_and_leave_are_copied_without_room_to_grow(llama):
    [stage] = stages_of(llama, (8,))
    cost = stage.kv_cost()
    for microbatch, slots in ((0, [0, 1]), (1, [2, 3])):
        stage.slots.open(microbatch, slots, [None, None])
        mx.eval(stage.forward(Step(microbatch, [Row(slot, 0, [1] * 5) for slot in slots]), None))
    stage.slots.merge(1, 0)
    stage.slots.close([1])
    assert stage.slots.kv_bytes == 3 * cost.bytes_for(5)
    stage.forward(Step(0, [Row(slot, 5, [1]) for slot in (0, 2, 3)], sample=True), None)
    assert stage.slots.kv_bytes == 3 * cost.bytes_for(5 + 32)


MISUSES = {
    "a microbatch opened twice": lambda slots: slots.open(0, [9], [None]),
    "a slot opened twice": lambda slots: slots.open(1, [0], [None]),
    "a slot opened twice at once": lambda slots: slots.open(1, [8, 8], [None, None]),
    "an entry that is not there": lambda slots: slots.open(1, [9], [(7, 3)]),
    "more than is kept": lambda slots: slots.open(1, [9], [(0, 4)]),
    "nothing of what is kept": lambda slots: slots.open(1, [9], [(0, 0)]),
    "a merge of no microbatch": lambda slots: slots.merge(5, 0),
    "a merge with itself": lambda slots: slots.merge(0, 0),
    "a slot closed that is not open": lambda slots: slots.close([0, 7]),
    "a slot kept that is not open": lambda slots: slots.keep(7, 1),
    "an entry kept twice": lambda slots: slots.keep(0, 0),
    "an entry dropped that is not there": lambda slots: slots.drop([1]),
    "other slots than the microbatch's": lambda slots: slots.of(0, [1, 0]),
    "no such microbatch": lambda slots: slots.states(4),
    "a row without tokens": lambda slots: slots.pad(0, [0, 1]),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_an_error(llama, misuse):
    [stage] = stages_of(llama, (8,))
    stage.slots.open(0, [0, 1], [None, None])
    stage.forward(Step(0, [Row(0, 0, [1, 2, 3]), Row(1, 0, [4])]), None)
    stage.slots.keep(0, 0)
    with pytest.raises(ProtocolError):
        MISUSES[misuse](stage.slots)


def test_a_family_that_is_not_batched_runs_one_sequence_a_microbatch(llama):
    [stage] = stages_of(llama, (8,), batches=False)
    assert not stage.slots.can_batch and not stage.slots.can_pad
    stage.slots.open(0, [0], [None])
    stage.slots.open(1, [1], [None])
    for misuse in (
        lambda: stage.slots.open(2, [2, 3], [None, None]),
        lambda: stage.slots.merge(0, 1),
        lambda: stage.slots.keep(0, 0),
    ):
        with pytest.raises(ProtocolError):
            misuse()
    stage.slots.merge(0, 2)
    assert stage.slots.num_slots == 2


def test_a_family_that_is_not_padded_takes_equal_lengths_only(llama):
    [stage] = stages_of(llama, (8,), pads=False)
    stage.slots.open(0, [0, 1], [None, None])
    with pytest.raises(ProtocolError):
        stage.forward(Step(0, [Row(0, 0, [1, 2, 3]), Row(1, 0, [4])]), None)
    stage.forward(Step(0, [Row(0, 0, [1, 2, 3]), Row(1, 0, [4, 5, 6])]), None)
