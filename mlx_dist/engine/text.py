"""Between text and tokens, on the leader. Knows tokenizers; knows no arrays and no ranks.

What a message says is text, always: `<|im_end|>` written by a user becomes the characters of it
and never the token that ends a message. A text given without a chat template is taken as it is,
control tokens and all, as its writer is the one who writes the template.
"""

from __future__ import annotations

import inspect
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tool_parsers import json_tools
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlx_dist.engine.allowance import bounded
from mlx_dist.engine.patience import Patience
from mlx_dist.engine.reader import Reader
from mlx_dist.engine.template import check_in_use
from mlx_dist.errors import ModelError, PromptTooLongError, RequestError
from mlx_dist.model.blueprint import context_tokens
from mlx_dist.model.tokenizer import load_tokenizer

Objects = Sequence[Mapping[str, Any]]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a template's variables may not be called: what renders it has its own use for these.
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "conversations",
    "messages",
}
# What byte-level tokenizers write for each byte.
_BYTES = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as tokens, up to where the assistant's answer begins.

    `borders` are numbers of tokens after which another request may go on differently: one with
    the same system message, one with the same messages before the user's last, and the next turn
    of this chat. Ascending, and less than the number of tokens.
    """

    tokens: tuple[int, ...]
    borders: tuple[int, ...]


class Tokenizer:
    """A model's tokenizer with its chat template, checked against the model."""

    def __init__(
        self, folder: Path, config: dict[str, Any], trust_remote_code: bool = False
    ) -> None:
        """Raises ModelError if the files are missing or damaged."""
        check_in_use()
        self._tokenizer = load_tokenizer(folder, config, trust_remote_code)
        self._patience = Patience()
        self._max_id = max(self._tokenizer.get_vocab().values(), default=-1)
        self.context_tokens = context_tokens(config)
        self.stop_tokens = frozenset(self._tokenizer.eos_token_ids)
        self.has_chat_template = bool(self._tokenizer.has_chat_template)
        self.has_tools = self.has_chat_template and bool(self._tokenizer.has_tool_calling)
        self.has_reasoning = self.has_chat_template and bool(self._tokenizer.has_thinking)
        # A few families have Python of mlx-lm's in the place of a template.
        self._has_jinja = "chat_template_type" not in self._tokenizer.init_kwargs
        self._added_tokens = frozenset(self._tokenizer.added_tokens_decoder)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))

    @property
    def call_markers(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The tokens before and after a tool call, of models that write it as JSON between them."""
        if not self.has_tools or self._tokenizer.tool_parser is not json_tools.parse_tool_call:
            return None
        return self._tokenizer.tool_call_start_tokens, self._tokenizer.tool_call_end_tokens

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ModelError if a token can come out that the model has no embedding for."""
        if self._max_id >= vocab_size:
            raise ModelError(
                f"the tokenizer knows ids up to {self._max_id} and the model has {vocab_size}; "
                "it belongs to another model"
            )

    def encode_prompt(self, prompt: str, chat: bool | None) -> tuple[int, ...]:
        """`prompt` as a user's message if `chat`, or as it is if not.

        None means chat where the model has a template. Raises as `encode_text`.
        """
        if not prompt:
            raise RequestError("the prompt is empty; give --prompt some text")
        if chat or (chat is None and self.has_chat_template):
            return self.encode_chat([{"role": "user", "content": prompt}]).tokens
        return self.encode_text(prompt)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """`text` as it is. Raises RequestError if it is no text or none, PromptTooLongError."""
        _check_utf8("the prompt", text)
        encode = self._tokenizer.encode
        return self._checked(self._patience.do("the model's tokenizer", lambda: encode(text)))

    def encode_chat(
        self,
        messages: Objects,
        tools: Objects | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """OpenAI's messages in the model's template, to be answered by the assistant.

        `template_args` are variables of the template, such as `enable_thinking`. Raises
        RequestError for what is no message or what the template refuses, PromptTooLongError.
        """
        if not self.has_chat_template:
            raise RequestError("the model has no chat template; use --raw")
        if not messages:
            raise RequestError("messages is empty; give it a message of role user")
        if tools and not self.has_tools:
            raise RequestError("the model's chat template takes no tools; leave tools out")
        if reserved := sorted(_RESERVED.intersection(template_args or ())):
            raise RequestError(f"{reserved[0]} is no variable of a chat template; leave it out")
        has_developer = not self._has_jinja or "developer" in str(self._tokenizer.chat_template)
        plain = [self._plain(i, m, has_developer) for i, m in enumerate(messages)]
        variables = dict(template_args or {}) | {"tools": list(tools) if tools else None}
        # This drops U+F0000 and U+F0001, with which transformers marks such text on its way.
        safely = {"sanitize_control_tokens": True} if self._has_jinja else {}

        def encode() -> ChatPrompt:
            with bounded():
                rendered = self._rendered(plain, variables, add_generation_prompt=True, **safely)
                tokens = self._checked(rendered)
                return ChatPrompt(tokens, self._borders(tokens, plain, variables))

        return self._patience.do("the model's tokenizer", encode)

    def open_reasoning(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that end the reasoning which `prompt` has begun; none if it has not."""
        tokenizer = self._tokenizer
        if not self.has_reasoning:
            return ()
        if tokenizer.rfind_think_start(prompt) <= tokenizer.rfind_think_end(prompt):
            return ()
        end: tuple[int, ...] = tokenizer.think_end_tokens
        return end

    def limit(self, prompt: tuple[int, ...], max_tokens: int) -> int:
        """`max_tokens`, or what the model's context leaves of it."""
        if self.context_tokens is None:
            return max_tokens
        return min(max_tokens, self.context_tokens - len(prompt))

    def reader(
        self,
        stop: tuple[str, ...],
        *,
        tools: Objects | None = None,
        is_chat: bool = False,
        prompt: tuple[int, ...] = (),
    ) -> Reader:
        """What makes text, reasoning and tool calls of the tokens that follow `prompt`.

        Without `is_chat` all is text; without `tools` a call is text too.
        """
        if not is_chat:
            return Reader.of_text(self._tokenizer, stop, prompt)
        in_reasoning = bool(self.open_reasoning(prompt))
        return Reader.of_chat(self._tokenizer, stop, tools, in_reasoning)

    def token_text(self, token: int) -> str:
        """The text of one token; U+FFFD in the place of what is not a whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; none for an id that the tokenizer has not."""
        if token > self._max_id:
            return b""
        text = self._tokenizer.convert_ids_to_tokens(token) or ""
        if token in self._added_tokens:
            return text.encode()
        if self._is_byte_level:
            return b"".join(_BYTES.get(character, character.encode()) for character in text)
        # SentencePiece: a byte as <0x0A>, a space as U+2581.
        if len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()

    def _checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if not tokens:
            raise RequestError("the prompt has no tokens; give it some text")
        if self.context_tokens is not None and len(tokens) >= self.context_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens and the model takes "
                f"{self.context_tokens} with the answer; shorten it"
            )
        return tuple(tokens)

    def _rendered(self, messages: Objects, variables: dict[str, Any], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, **options, **variables)
        # A template is a program of the model's: it can fail in any way that Python can.
        except Exception as error:
            raise RequestError(
                f"the model's chat template refuses the prompt: {str(error)[:300]}; use --raw"
            ) from None

    def _borders(
        self, tokens: tuple[int, ...], messages: Objects, variables: dict[str, Any]
    ) -> tuple[int, ...]:
        text = self._rendered(messages, variables, add_generation_prompt=True, tokenize=False)
        borders = set()
        for start in _starts(messages, has_head=bool(variables["tools"])):
            try:
                other = self._rendered(start, variables, tokenize=False)
            except RequestError:
                continue
            num_shared = _num_shared(text, other)
            borders.add(self._num_before(tokens, text[:num_shared], text[num_shared:]))
        return tuple(sorted(borders - {0, len(tokens)}))

    def _num_before(self, tokens: tuple[int, ...], head: str, tail: str) -> int:
        """How many of `tokens` are those of `head`, by either of both; 0 if none end there."""
        # The shorter first, for most of the time goes into encoding.
        for part in sorted((head, tail), key=len):
            encoded = tuple(self._tokenizer.encode(part, add_special_tokens=False))
            num_before = len(encoded) if part is head else len(tokens) - len(encoded)
            if encoded == (tokens[:num_before] if part is head else tokens[num_before:]):
                return num_before
        return 0

    def _plain(self, index: int, message: Mapping[str, Any], has_developer: bool) -> dict[str, Any]:
        """A message as templates expect it: its content a string, its calls' arguments objects."""
        role = message.get("role")
        if role not in _ROLES:
            raise RequestError(f"messages[{index}].role is {role!r}; use one of {_ROLES}")
        if role == "developer" and not has_developer:
            role = "system"
        plain = dict(message) | {"role": role, "content": _content(index, message.get("content"))}
        if role == "assistant" and self.has_reasoning:
            # Some clients send the reasoning back as they got it from other servers.
            reasoning, end, rest = plain["content"].rpartition(self._tokenizer.think_end)
            if end:
                reasoning = reasoning.rpartition(self._tokenizer.think_start)[2].strip("\n")
                plain |= {"reasoning_content": reasoning, "content": rest.lstrip("\n")}
        if calls := message.get("tool_calls"):
            plain["tool_calls"] = [
                _plain_call(f"messages[{index}].tool_calls[{i}]", call, self._has_jinja)
                for i, call in enumerate(calls)
            ]
        return plain


def _starts(messages: Objects, has_head: bool) -> list[list[Mapping[str, Any]]]:
    """Chats that begin as `messages` do, up to each border. `has_head`: something precedes them."""
    roles = [message["role"] for message in messages]
    num_system = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=0)
    ends = {num_system, last_user} - (set() if has_head else {0})
    # What no message begins with, so that no more than what comes before is equal.
    other = {"role": "user", "content": "\ufffd"}
    return [*([*messages[:end], other] for end in ends), list(messages)]


def _num_shared(text: str, other: str) -> int:
    """How many characters both begin with."""
    lengths = range(1, len(other) + 1)
    return bisect_left(lengths, True, key=lambda n: not text.startswith(other[:n]))


def _content(index: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        _check_utf8(f"messages[{index}].content", content)
        return content
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        return _content(index, "".join(part["text"] for part in parts))
    raise RequestError(f"messages[{index}].content is not text; other content is not supported")


def _check_utf8(name: str, text: str) -> None:
    """Raise RequestError if `text` has half a surrogate pair, as JSON and file names can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not UTF-8 text; convert it first") from None


def _plain_call(name: str, call: Mapping[str, Any], as_object: bool) -> dict[str, Any]:
    """`call` with its arguments as an object, or as JSON text if not `as_object`."""
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (TypeError, ValueError, LookupError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{name}.function.arguments is no JSON object; send what was answered")
    function["arguments"] = arguments if as_object else json.dumps(arguments, ensure_ascii=False)
    return dict(call) | {"function": function}
