"""Greedy and sampled tokens of a model at every cut of its layers over this job's ranks, as JSON.

every_cut.py FABRIC MODEL
"""

import itertools
import json
import sys

from mlx_dist.cluster.blas import preload_blas

preload_blas(1)

from mlx_dist.cluster.world import join
from mlx_dist.config import Dtype, Fabric
from mlx_dist.engine.batching import Batching
from mlx_dist.engine.kv import KvLedger, KvRoom
from mlx_dist.engine.leader import Leader
from mlx_dist.engine.program import Rank
from mlx_dist.engine.scheduler import Scheduler
from mlx_dist.engine.sequence import Request
from mlx_dist.engine.text import Tokenizer
from mlx_dist.engine.transport import Transport
from mlx_dist.messages import Sampling
from mlx_dist.model.files import find_model
from mlx_dist.model.grammar import Grammars
from mlx_dist.model.sampling import Samplers
from mlx_dist.model.stage import Stage
from mlx_dist.model.weights import load_stage

PROMPTS = ("What is a rank?", "Why does a pipeline need more than one microbatch in flight?")
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, top_p=0.95, seed=11, presence_penalty=0.5),
    Sampling(temperature=1.0, top_k=5, min_p=0.05, seed=2),
    Sampling(temperature=1.3, repetition_penalty=1.3, logit_bias={300: 5}, seed=3),
    Sampling(frequency_penalty=0.5),
)


def cuts(num_layers, num_ranks):
    for borders in itertools.combinations(range(1, num_layers), num_ranks - 1):
        yield list(itertools.pairwise((0, *borders, num_layers)))


with join(Fabric(sys.argv[1])) as world:
    files = find_model(sys.argv[2])
    tokenizer = Tokenizer(files.folder, files.config)
    results = {}
    for stages in cuts(files.config["num_hidden_layers"], world.size):
        start, end = stages[world.rank]
        loaded = load_stage(files, start, end, Dtype.auto, lambda _done, _total: None)
        stage = Stage(loaded.model, loaded.anatomy, start, end)
        grammars = Grammars(files.folder, files.config, stage.vocab_size)
        rank = Rank(
            stage=stage,
            transport=Transport(world, [[rank] for rank in range(world.size)]),
            samplers=Samplers(stage.vocab_size, grammars.matcher),
            grammars=grammars,
            kv_room=KvRoom(stage.kv_cost(), 1 << 30),
            weights_bytes=loaded.weights_bytes,
            load_s=0.0,
        )
        if not world.is_leader:
            rank.follow()
            continue
        ledger = KvLedger([rank.kv_room], slack=5)
        leader = Leader(rank, Scheduler(Batching(prefill_chunk=5), ledger, world.size))
        answers = []
        for i, sampling in enumerate(SAMPLINGS):
            tokens = tokenizer.encode_prompt(PROMPTS[i % len(PROMPTS)], None)
            request = Request(tokens, 24, sampling, tokenizer.stop_tokens)
            answers.append([e.token for e in leader.stream(request) if e.token is not None])
        leader.shutdown()
        results[str(stages)] = answers
    if world.is_leader:
        print(json.dumps(results))
