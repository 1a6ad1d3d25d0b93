"""What the embedded model reads: corpus.txt, its tokenizer, its chat template, its training rows.

Knows nothing of the model that learns it, nor of MLX.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# B sequences, L tokens
CORPUS = Path(__file__).parent / "corpus.txt"
VOCAB_SIZE = 768  # Divides by 2, 3, 4, 6 and 8.
END = "<|end|>"
SPECIAL_TOKENS = [END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REPHRASINGS = (
    "What's {}?",
    "Explain {}",
    "Please explain {}",
    "Could you explain {} to me?",
    "Tell me about {}",
    "Tell me what {} is",
    "Describe {}",
    "What exactly is {}?",
    "Do you know what {} is?",
)
BATCH_TOKENS = 1024
BATCH_SHAPES_BL = ((16, 64), (16, 64), (8, 128), (4, 256))  # Mostly one chat, some long talks.


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts of corpus.txt; a chat is the paraphrases of one question and their answer."""

    chats: list[tuple[list[str], str]]
    statements: list[str]
    system_messages: list[str]

    @property
    def lines(self) -> list[str]:
        chat_lines = [line for questions, answer in self.chats for line in [*questions, answer]]
        return chat_lines + self.statements + self.system_messages


def read_corpus(path: Path = CORPUS) -> Corpus:
    corpus = Corpus([], [], [])
    for block in path.read_text(encoding="ascii").split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        questions = [line[3:] for line in lines if line.startswith("Q: ")]
        texts = {line[0]: line[3:] for line in lines if not line.startswith("Q: ")}
        if questions:
            corpus.chats.append((questions, texts["A"]))
        elif "T" in texts:
            corpus.statements.append(texts["T"])
        elif "S" in texts:
            corpus.system_messages.append(texts["S"])
    return corpus


def build_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte is a token, so no text is unknown to it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    assert bpe.get_vocab_size() == VOCAB_SIZE, "the corpus is too short for this vocabulary"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


class Sampler:
    """Draws rows of packed chats: a row starts with one chat and holds further turns after it."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._plain_texts = corpus.statements + [answer for _, answer in corpus.chats]
        self._deck: list[tuple[str, str]] = []

    def batches(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Endless tokens_BL and weights_BL, one longer than the shapes above for the targets.

        A weight is 1 where the model has to speak and 0 where it listens.
        """
        while True:
            num_rows, num_tokens = self._random.choice(BATCH_SHAPES_BL)
            rows = [self._row(num_tokens + 1) for _ in range(num_rows)]
            tokens_BL, weights_BL = zip(*rows, strict=True)
            yield np.array(tokens_BL, np.int32), np.array(weights_BL, np.int32)

    def _row(self, num_tokens: int) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        weights: list[int] = []
        if self._random.random() < 0.1:
            system_message = self._random.choice(self._corpus.system_messages)
            tokens += self._encode([{"role": "system", "content": system_message}])
            weights += [0] * len(tokens)
        elif self._random.random() < 0.1:
            tokens += self._tokenizer.encode(self._random.choice(self._plain_texts) + END)
            weights += [1] * len(tokens)
        while len(tokens) < num_tokens:
            question, answer = self._draw()
            messages = [{"role": "user", "content": self._vary(question)}]
            prompt = self._encode(messages, add_generation_prompt=True)
            chat = self._encode([*messages, {"role": "assistant", "content": answer}])
            tokens += chat
            weights += [0] * len(prompt) + [1] * (len(chat) - len(prompt))
        return tokens[:num_tokens], weights[:num_tokens]

    def _draw(self) -> tuple[str, str]:
        if not self._deck:
            self._deck = [(q, answer) for qs, answer in self._corpus.chats for q in qs]
            self._random.shuffle(self._deck)
        return self._deck.pop()

    def _vary(self, question: str) -> str:
        """The question as people type it: in other words, in a hurry, in another case."""
        subject = question.removeprefix("What is ").rstrip("?")
        if question.startswith("What is ") and self._random.random() < 0.3:
            question = self._random.choice(REPHRASINGS).format(subject)
        words = question.split()
        if len(words) > 4 and self._random.random() < 0.1:
            del words[self._random.randrange(len(words))]
        question = " ".join(words)
        if self._random.random() < 0.2:
            question = question.rstrip("?.!")
        return question.lower() if self._random.random() < 0.2 else question

    def _encode(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        tokens: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        return tokens
