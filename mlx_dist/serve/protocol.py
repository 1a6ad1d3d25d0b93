"""What requests look like: OpenAI's shapes, strict in names, types and ranges.

A field that is not declared is refused, and so is one that is declared as `None` unless it is null:
that is how OpenAI's fields that are not supported are refused by name. `user`, `safety_identifier`,
`prompt_cache_key` and `metadata` say nothing about the answer; they are taken and have no effect.
Ranges that the engine sets and limits that flags set are in `jobs.py`, as is what fields mean
together.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Role = Literal["system", "developer", "user", "assistant", "tool"]
Prompt = str | list[int]
_MOST_TEMPLATE_ARGUMENTS = 32
# More than anyone needs; what is longer is not looked at.
_MOST_MESSAGES = 10_000
_MOST_OTHERS = 1024
Few = Field(max_length=_MOST_OTHERS, fail_fast=True)


def _text_of(content: Any) -> Any:
    """The text of a list of text parts, one after the other, as chat templates join them."""
    if not isinstance(content, list):
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not is_text or part["type"] != "text" or not isinstance(part["text"], str):
            raise ValueError('has a part that is not {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in content)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts_of(value: Any) -> list[Prompt]:
    """A prompt or a list of prompts as a list of prompts."""
    prompts = value if isinstance(value, list) and not _is_tokens(value) else [value]
    if len(prompts) > _MOST_OTHERS:
        raise ValueError(f"has {len(prompts)} prompts, of at most {_MOST_OTHERS}")
    are_texts = all(isinstance(prompt, str) for prompt in prompts)
    if not prompts or not (are_texts or all(map(_is_tokens, prompts))):
        raise ValueError("is no string, list of strings, list of token ids or list of such lists")
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _bias_by_id(biases: Any) -> Any:
    if not isinstance(biases, dict):
        return biases
    if wrong := next((key for key in biases if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key)), None):
        raise ValueError(f"has the key {wrong[:20]!r}; keys are token ids")
    return {int(key): bias for key, bias in biases.items()}


def _template_arguments(arguments: Any) -> Any:
    if not isinstance(arguments, dict):
        return arguments
    if any(isinstance(value, dict | list) for value in arguments.values()):
        raise ValueError("has a value that is no string, number, boolean or null")
    return arguments


def _choice_object(choice: Any) -> Any:
    return {"type": choice} if isinstance(choice, str) else choice


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("is no boolean")
    return value


# A literal would take 0 for False and True for 1, for they are equal.
Off = Annotated[Literal[False], BeforeValidator(_boolean)]
One = Annotated[int, Field(ge=1, le=1)]


class Shape(BaseModel):
    """Base of all shapes: nothing converted, nothing unknown, nothing changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Shape):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class GenerationRequest(Shape):
    """What both kinds of generation take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: (
        Annotated[dict[int, float], Field(max_length=_MOST_OTHERS), BeforeValidator(_bias_by_id)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: Annotated[list[str], Few, BeforeValidator(_listed)] | None = None

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts_of)]
    logprobs: Annotated[int, Field(ge=0)] | None = None

    best_of: One | None = None
    echo: Off | None = None
    suffix: None = None


class FunctionCall(Shape):
    name: str
    arguments: str


class CalledTool(Shape):
    """A call that an assistant's message of the past has made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Shape):
    role: Role
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Few] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        is_assistant = self.role == "assistant"
        if self.content is None and not (is_assistant and self.tool_calls):
            raise ValueError(f"content is missing, which role {self.role} needs")
        if not is_assistant and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("tool_calls and reasoning_content belong to role assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to role tool, which needs it")
        return self


class Function(Shape):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function


class FunctionName(Shape):
    name: str


class ToolChoice(Shape):
    """Which tools may or must be called; `function` names the one that must."""

    type: Literal["none", "auto", "required", "function"]
    function: FunctionName | None = None

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise ValueError('names a function exactly when its type is "function"')
        return self


class JsonSchema(Shape):
    """A schema that the answer will follow, whether `strict` asks for that or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('has a json_schema exactly when its type is "json_schema"')
        return self


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions.

    `chat_template_kwargs` are handed to the model's chat template, as in
    {"enable_thinking": false}.
    """

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[Tool], Few] | None = None
    tool_choice: Annotated[ToolChoice, BeforeValidator(_choice_object)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[a-z_]{1,64}$")], Any],
            Field(max_length=_MOST_TEMPLATE_ARGUMENTS),
            BeforeValidator(_template_arguments),
        ]
        | None
    ) = None

    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    web_search_options: None = None
