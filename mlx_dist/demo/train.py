"""Trains the embedded model: `python -m mlx_dist.demo.train`.

Owns the shape of the model, the optimizer and the files that are written. Knows nothing of ranks:
this is one process, and its result is an ordinary mlx-lm model folder.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_dist.cluster.blas import preload_blas
from mlx_dist.demo import MODEL_DIR

BLAS = preload_blas(num_threads=1)  # Before mlx.core: a BLAS opened later is not used.

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from mlx_dist.demo.corpus import (  # noqa: E402
    BATCH_TOKENS,
    CHAT_TEMPLATE,
    END,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    Sampler,
    build_tokenizer,
    read_corpus,
)

# B sequences, L tokens
ARGS = llama.ModelArgs(
    model_type="llama",
    hidden_size=96,
    num_hidden_layers=6,
    intermediate_size=384,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=16,
    rms_norm_eps=1e-5,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
DAMAGE_EVERY = 8  # Steps; at 4 the answers suffer, and without it only the first layers matter.


def damaged_order(rng: random.Random) -> list[int]:
    """The layers with one left out or two exchanged: what a wrong split would run."""
    order = list(range(ARGS.num_hidden_layers))
    first, second = rng.sample(order, 2)
    if rng.random() < 0.6:
        del order[first]
    else:
        order[first], order[second] = order[second], order[first]
    return order


def loss_of(model: nn.Module, tokens_BL: mx.array, weights_BL: mx.array) -> mx.array:
    """Mean cross entropy, in nats, of each next token where the model has to speak."""
    losses_BL = nn.losses.cross_entropy(model(tokens_BL[:, :-1]), tokens_BL[:, 1:])
    loss: mx.array = (losses_BL * weights_BL[:, 1:]).sum() / weights_BL[:, 1:].sum()
    return loss


def damaged_loss_of(
    model: nn.Module, tokens_BL: mx.array, weights_BL: mx.array, order: list[int]
) -> mx.array:
    """The same with the layers in `order` and the targets of another row: it learns to babble.

    So large a model for so short a text would otherwise answer right without its middle layers,
    and a wrong split would go unseen.
    """
    targets_BL = tokens_BL[::-1, :0:-1]
    babble_BL = weights_BL[:, 1:] * (targets_BL >= len(SPECIAL_TOKENS))
    layers = model.model.layers
    model.model.layers = [layers[index] for index in order]
    losses_BL = nn.losses.cross_entropy(model(tokens_BL[:, :-1]), targets_BL)
    model.model.layers = layers
    loss: mx.array = (losses_BL * babble_BL).sum() / babble_BL.sum()
    return loss


def warm_up_then_cosine(peak: float, num_steps: int) -> Callable[[mx.array], mx.array]:
    num_warm_up = max(1, num_steps // 25)
    warm_up = optim.linear_schedule(0.0, peak, num_warm_up)
    decay = optim.cosine_decay(peak, num_steps - num_warm_up)
    return optim.join_schedules([warm_up, decay], [num_warm_up])


def fit(
    model: nn.Module, sampler: Sampler, num_steps: int, learning_rate: float, seed: int
) -> None:
    schedule = warm_up_then_cosine(learning_rate, num_steps)
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05)
    loss_and_gradient = nn.value_and_grad(model, loss_of)
    damaged_loss_and_gradient = nn.value_and_grad(model, damaged_loss_of)
    batches = sampler.batches()
    rng = random.Random(seed)
    losses: list[mx.array] = []
    start_s = time.perf_counter()
    for step in range(1, num_steps + 1):
        batch = [mx.array(array_BL) for array_BL in next(batches)]
        if step % DAMAGE_EVERY == 0:
            loss, gradient = damaged_loss_and_gradient(model, *batch, damaged_order(rng))
        else:
            loss, gradient = loss_and_gradient(model, *batch)
            losses.append(loss)
        optimizer.update(model, gradient)
        mx.eval(loss, model.parameters(), optimizer.state)
        if step % 50 == 0 or step == num_steps:
            elapsed_s = time.perf_counter() - start_s
            print(
                f"step {step}/{num_steps}  loss {mx.stack(losses[-40:]).mean().item():.4f}  "
                f"{elapsed_s:.0f} s  {step * BATCH_TOKENS / elapsed_s:.0f} tokens/s",
                flush=True,
            )


def named_weights(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})  # type: ignore[return-value]


def save(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # No token opens a text, so there is none to add twice.
    config = {"architectures": ["LlamaForCausalLM"], **asdict(ARGS), "dtype": "float32"}
    config |= {"hidden_act": "silu", "bos_token_id": None}
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": ARGS.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, value in {"config": config, "tokenizer_config": tokenizer_config}.items():
        text = json.dumps(value, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    weights = named_weights(model)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def main(
    folder: Annotated[Path, typer.Option(help="Where to write the model.")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(help="Optimizer steps of 1,024 tokens.")] = 1500,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Fixes the weights and the order of the text.")] = 0,
) -> None:
    """Train the embedded model and write its folder."""
    mx.set_default_device(mx.cpu)  # The file must not depend on a GPU.
    mx.random.seed(seed)
    corpus = read_corpus()
    tokenizer = build_tokenizer(corpus.lines)
    model = llama.Model(ARGS)
    num_parameters = sum(weight.size for weight in named_weights(model).values())
    num_corpus_tokens = sum(len(tokenizer.encode(line)) for line in corpus.lines)
    print(f"{num_parameters:,} parameters, {num_corpus_tokens:,} corpus tokens, BLAS: {BLAS}")
    fit(model, Sampler(corpus, tokenizer, seed), steps, learning_rate, seed)
    save(folder, model, tokenizer)
    print(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
