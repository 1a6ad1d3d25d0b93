"""Between text and tokens, on the leader. Knows tokenizers; knows no arrays and no ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_dist.errors import ModelError, RequestError

# Where the families' configs say how many positions they were made for.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


class Tokenizer:
    """A model's tokenizer with its chat template, checked against the model."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Raises ModelError if the files are missing or damaged."""
        try:
            self._tokenizer = load_tokenizer(folder, {"trust_remote_code": False})
            self._max_id = max(self._tokenizer.get_vocab().values(), default=-1)
        # The tokenizers library raises plain Exception for a damaged file.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the tokenizer in {folder} does not load: {reason}; "
                "copy tokenizer.json and tokenizer_config.json again"
            ) from error
        text_config = config.get("text_config") or config
        self.context_tokens: int | None = next(
            (text_config[key] for key in _CONTEXT_KEYS if text_config.get(key)), None
        )

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset(self._tokenizer.eos_token_ids)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ModelError if a token can come out that the model has no embedding for."""
        if self._max_id >= vocab_size:
            raise ModelError(
                f"the tokenizer knows ids up to {self._max_id} and the model has {vocab_size}; "
                "it belongs to another model"
            )

    def encode_prompt(self, prompt: str, chat: bool | None) -> tuple[int, ...]:
        """The tokens of `prompt`, as a user's message in the chat template if `chat`.

        None means chat where the model has a template. Raises RequestError if the prompt is
        empty, too long for the model, or to be a chat without a template.
        """
        has_template = bool(self._tokenizer.has_chat_template)
        if chat and not has_template:
            raise RequestError("the model has no chat template; use --raw")
        if not prompt:
            raise RequestError("the prompt is empty; give --prompt some text")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise RequestError("the prompt is not UTF-8 text; convert it first")
        if chat is not False and has_template:
            messages = [{"role": "user", "content": prompt}]
            try:
                tokens = self._tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
            except jinja2.TemplateError as error:
                raise RequestError(
                    f"the model's chat template refuses the prompt: {error}; use --raw"
                ) from None
        else:
            tokens = self._tokenizer.encode(prompt)
        if not tokens:
            raise RequestError("the prompt has no tokens; give --prompt some text")
        if self.context_tokens is not None and len(tokens) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens and the model takes "
                f"{self.context_tokens} with the answer; shorten it"
            )
        return tuple(tokens)

    def limit(self, prompt: tuple[int, ...], max_tokens: int) -> int:
        """`max_tokens`, or what the model's context leaves of it."""
        if self.context_tokens is None:
            return max_tokens
        return min(max_tokens, self.context_tokens - len(prompt))

    def text_stream(self, stop: tuple[str, ...]) -> TextStream:
        return TextStream(self._tokenizer.detokenizer, stop)


class TextStream:
    """Turns tokens into text as they come, up to the first of the `stop` strings.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, detokenizer: Any, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._detokenizer.reset()
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        self._detokenizer.add_token(token)
        return self._release(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The text that was still held back."""
        self._detokenizer.finalize()
        text = self._release(self._detokenizer.last_segment)
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = self._held[: min(found)]
        num_held = 0 if self.is_stopped else self._num_ambiguous()
        released = self._held[: len(self._held) - num_held]
        self._held = self._held[len(released) :]
        return released

    def _num_ambiguous(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
