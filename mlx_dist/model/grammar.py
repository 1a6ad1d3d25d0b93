"""Holds an answer to a grammar, by llguidance. Knows no ranks.

A grammar is a text, so that it can be sent: made of a JSON schema or of tools, checked on the
leader before any other rank hears of it, and matched on the last stage.
"""

# V vocabulary

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from mlx_dist.errors import RequestError
from mlx_dist.model import grammar_trial
from mlx_dist.model.tokenizer import load_tokenizer

Markers = tuple[tuple[int, ...], tuple[int, ...]]

_MOST_BYTES = 128 << 10
_MOST_DEPTH = 64
_MOST_KEYS = 1000
_TRIAL_S = 10.0
_LIMITS: dict[str, Any] = {
    # For objects of up to `_MOST_KEYS` optional properties.
    "max_items_in_row": 4 * _MOST_KEYS + 1000,
    # A state takes 1 to 2 kB, in each sequence.
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# Between the parts of JSON a space or an indented line: a model could go on with more for ever.
_OPTIONS = {"whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,40}"}
_GAP = r"GAP: /[\x20\x0A]{0,2}/"


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """The grammar of JSON that fits `schema`, or of any JSON object.

    Raises RequestError for a schema that is too large; `Grammars.check` finds what else is wrong.
    """
    return _grammar([_schema_part("answer", {"type": "object"} if schema is None else schema)])


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], name: str | None, markers: Markers | None
) -> str:
    """The grammar of calls of `tools`: of one to the tool called `name`, or of one or more to any.

    `markers` are the tokens before and after each call. Raises RequestError for a schema that is
    too large, and for models whose calls are no JSON between markers.
    """
    if markers is None:
        raise RequestError(
            'tool_choice "required" or of one function is not available for this model; use "auto"'
        )
    functions = [tool["function"] for tool in tools]
    wanted = [f for f in functions if name is None or f["name"] == name]
    start, end = map(_token_rule, markers)
    parts = [_schema_part(f"arguments_{i}", _arguments(f)) for i, f in enumerate(wanted)]
    calls = [
        json.dumps('{"name": ' + json.dumps(f["name"]) + ', "arguments": ')
        + f' @arguments_{i} "}}"'
        for i, f in enumerate(wanted)
    ]
    rules = [
        "start: call" if name is not None else "start: call (GAP call)*",
        f"call: {start} GAP ({' | '.join(calls)}) GAP {end}",
        _GAP,
    ]
    return _grammar([{"name": "calls", "lark_grammar": "\n".join(rules)}, *parts])


def after_reasoning(grammar: str, end: tuple[int, ...]) -> str:
    """`grammar` for an answer in the middle of reasoning, which the tokens `end` will end.

    Itself if there are none.
    """
    if not end:
        return grammar
    parts = json.loads(grammar)["grammars"]
    rules = [rf"start: /(.|\n)*/ {_token_rule(end)} GAP @{parts[0]['name']}", _GAP]
    return _grammar([{"name": "reasoning", "lark_grammar": "\n".join(rules)}, *parts])


class Grammars:
    """Compiles grammars for a model's tokenizer, which is read when the first one comes."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        vocab_size: int,
        trust_remote_code: bool = False,
    ) -> None:
        """`vocab_size` is the width of the logits, which may be more than the tokenizer has."""
        self._folder, self._config, self._vocab_size = folder, config, vocab_size
        self._trust_remote_code = trust_remote_code
        self._compiled = lru_cache(maxsize=16)(self._compile)

    def check(self, grammar: str) -> None:
        """Raise RequestError if `grammar` cannot be used with this model."""
        reason = _trial(grammar)
        if not reason:
            matcher = self._compiled(grammar).deep_copy()
            matcher.compute_logit_bias()
            reason = matcher.get_error()
        if reason:
            raise RequestError(f"the JSON schema cannot be used: {reason.splitlines()[0][:300]}")

    def matcher(self, grammar: str) -> Matcher:
        """The beginning of `grammar`, which has been checked."""
        return Matcher(self._compiled(grammar).deep_copy())

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer = load_tokenizer(self._folder, self._config, self._trust_remote_code)
        try:
            backend = copy(tokenizer.backend_tokenizer)
            backend.no_padding()
            backend.no_truncation()
            return LLTokenizer(
                backend.to_str(),
                n_vocab=self._vocab_size,
                eos_token=[t for t in tokenizer.eos_token_ids if t < len(tokenizer)],
            )
        # AttributeError: a tokenizer that is none of the tokenizers library's.
        except (AttributeError, ValueError) as error:
            raise RequestError(
                f"this model's tokenizer does not support response_format: {error}"
            ) from error


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits_1V: mx.array) -> mx.array:
        """The logits with those of tokens that the grammar forbids at minus infinity.

        At the end, and should the grammar grow beyond its limits, only stop tokens are allowed.
        """
        is_allowed_V = mx.array(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)) != 0
        return mx.where(is_allowed_V, logits_1V, mx.array(-mx.inf, logits_1V.dtype))

    def consume(self, token: int) -> None:
        """Go on by `token`."""
        self._matcher.consume_token(token)


@lru_cache(maxsize=64)
def _trial(grammar: str) -> str:
    """What is wrong with the schemas in `grammar`; nothing if they compile in bounded means."""
    task = json.dumps({"limits": _LIMITS, **json.loads(grammar)})
    command = [sys.executable, "-P", grammar_trial.__file__]
    try:
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=_TRIAL_S, check=True
        )
        reason: str = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return "it takes too much to compile; make it simpler"
    return reason


def _grammar(parts: list[dict[str, Any]]) -> str:
    grammar = json.dumps({"grammars": parts})
    if len(grammar) > _MOST_BYTES:
        raise RequestError(f"JSON schemas have {len(grammar)} bytes; the most is {_MOST_BYTES}")
    return grammar


def _token_rule(tokens: tuple[int, ...]) -> str:
    return " ".join(f"<[{token}]>" for token in tokens)


def _arguments(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object, and none unless it says so."""
    schema = function.get("parameters")
    if schema is None:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object"} | dict(schema)


def _schema_part(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    level: list[Any] = [schema]
    for _ in range(_MOST_DEPTH):
        if any(isinstance(node, Mapping) and len(node) > _MOST_KEYS for node in level):
            raise RequestError(f"a JSON schema has an object of more than {_MOST_KEYS} properties")
        level = [child for node in level for child in _children(node)]
    if level:
        raise RequestError(f"a JSON schema is nested more than {_MOST_DEPTH} deep")
    return {"name": name, "json_schema": dict(schema) | {"x-guidance": _OPTIONS}}


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, list) else ()
