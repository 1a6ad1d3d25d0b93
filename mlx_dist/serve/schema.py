"""What /openapi.json says beyond the types: this server's limits, and its answers.

A request that fits the schema is one that the server takes, and one that does not is refused, so
that clients and testers can rely on either. Four things are said in words only: that choices are
prompts times `n`, that max_tokens is max_completion_tokens, that a function which must be called is
among the tools, and which JSON schemas and chats the model takes. Knows no routes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mlx_dist.params import LIMITS, MOST_BIAS
from mlx_dist.serve.failures import STATUSES
from mlx_dist.serve.replies import ChatChoice, ChatPart, TextChoice, UsageReply
from mlx_dist.serve.settings import HttpConfig

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

Schema = dict[str, Any]
_NULL: Schema = {"type": "null"}
_ANY: Schema = {"type": "object"}
_TEXT: Schema = {"type": "string"}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_RETRY_AFTER: Schema = {"description": "seconds", "required": True, "schema": {"type": "string"}}
_CHOICES = {"/v1/chat/completions": (ChatChoice, ChatPart), "/v1/completions": (TextChoice,) * 2}


def describe(app: FastAPI, llm: LLM, config: HttpConfig) -> None:
    """Let `app` answer /openapi.json with all of this; it is made when it is asked for first."""

    def openapi() -> Schema:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            shapes = described["components"]["schemas"]
            _tell_limits(shapes, llm, config)
            _tell_answers(described)
            [name] = described["paths"]["/v1/models/{name}"]["get"]["parameters"]
            name["schema"] = {"enum": _names(llm)}
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _tell_limits(shapes: dict[str, Schema], llm: LLM, config: HttpConfig) -> None:
    for name in ("ChatRequest", "CompletionRequest"):
        shape = shapes[name]
        fields = shape["properties"]
        fields["model"] = {"enum": _names(llm)}
        for field, (least, most) in LIMITS.items():
            kind = "integer" if field in ("seed", "top_k") else "number"
            fields[field] = _or_null({"type": kind, "minimum": least, "maximum": most})
        fields["seed"]["anyOf"][0]["minimum"] = -(1 << 63)
        fields["temperature"]["anyOf"].insert(0, {"const": 0})
        fields["n"] = _or_null({"type": "integer", "minimum": 1, "maximum": config.max_choices})
        stop = _TEXT | {"minLength": 1}
        stops = {"type": "array", "items": stop, "maxItems": config.max_stops}
        fields["stop"] = _or_null(stop, stops)
        fields["logit_bias"]["anyOf"][0] |= {
            "propertyNames": {"pattern": f"^({_below(llm.vocab_size)})$"},
            "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
        }
        logprobs = {"type": "integer", "minimum": 0, "maximum": config.max_logprobs}
        is_chat = name == "ChatRequest"
        fields["top_logprobs" if is_chat else "logprobs"] = _or_null(logprobs)
        shape["allOf"] = [_when({"stream_options": _ANY}, {"stream": {"const": True}})]
    _tell_prompts(shapes["CompletionRequest"]["properties"], llm, config)
    _tell_chat(shapes, llm, config)


def _names(llm: LLM) -> list[str]:
    return sorted({llm.name, llm.name.rpartition("/")[2]})


def _tell_prompts(fields: dict[str, Schema], llm: LLM, config: HttpConfig) -> None:
    token = {"type": "integer", "minimum": 0, "maximum": llm.vocab_size - 1}
    text = _TEXT | {"minLength": 1}
    tokens = {"type": "array", "items": token, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": config.max_choices}
    fields["prompt"] = {
        "anyOf": [text, tokens, several | {"items": text}, several | {"items": tokens}]
    }


def _tell_chat(shapes: dict[str, Schema], llm: LLM, config: HttpConfig) -> None:
    chat = shapes["ChatRequest"]
    fields = chat["properties"]
    arguments = fields["chat_template_kwargs"]["anyOf"][0]
    [(pattern, _)] = arguments.pop("patternProperties").items()
    arguments["propertyNames"] = {"pattern": pattern}
    arguments["additionalProperties"] = {"type": ["string", "number", "boolean", "null"]}
    fields["tools"]["anyOf"][0]["maxItems"] = config.max_tools if llm.tokenizer.has_tools else 0
    some = {"type": "array", "minItems": 1}
    forced = {
        "anyOf": [
            {"const": "required"},
            _having("type", {"enum": ["required", "function"]}),
        ]
    }
    off = {"anyOf": [{"const": "none"}, _having("type", {"const": "none"})]}
    formatted = _having("type", {"enum": ["json_object", "json_schema"]})
    strict = {"contains": _having("function", _having("strict", {"const": True}))}
    chat["allOf"] += [
        _when({"top_logprobs": {"type": "integer"}}, {"logprobs": {"const": True}}),
        _when({"tool_choice": forced}, {"tools": some}),
        _when({"tools": some, "response_format": formatted}, {"tool_choice": off}),
        _when({"tools": some | strict}, {"tool_choice": {"anyOf": [forced, off]}}),
    ]
    fields["tool_choice"] = _or_null(
        {"enum": ["none", "auto", "required"]}, {"$ref": "#/components/schemas/ToolChoice"}
    )
    _split(shapes, "ToolChoice", "function", {"function"})
    _split(shapes, "ResponseFormat", "json_schema", {"json_schema"})
    _tell_messages(shapes)


def _split(shapes: dict[str, Schema], name: str, field: str, types: set[str]) -> None:
    """Say of a shape that it has `field` exactly when its `type` is one of `types`."""
    shape = shapes[name]
    kinds = shape["properties"]["type"]
    wanted = shape["properties"][field]["anyOf"][0]
    others = [kind for kind in kinds["enum"] if kind not in types]
    common = {key: shape[key] for key in ("type", "additionalProperties")}
    shapes[name] = {
        "title": name,
        "anyOf": [
            common
            | {
                "required": ["type", field],
                "properties": {"type": {"enum": sorted(types)}, field: wanted},
            },
            common | {"required": ["type"], "properties": {"type": {"enum": others}, field: _NULL}},
        ],
    }


def _tell_messages(shapes: dict[str, Schema]) -> None:
    """A message has the fields of its role."""
    shape = shapes["Message"]
    fields = shape["properties"]
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": _TEXT},
        "additionalProperties": False,
    }
    content = {"anyOf": [_TEXT, {"type": "array", "items": part}]}
    no_calls = _or_null({"type": "array", "maxItems": 0})
    calls = fields["tool_calls"]["anyOf"][0]
    shapes["FunctionCall"]["properties"]["arguments"] |= {
        "contentMediaType": "application/json",
        "contentSchema": _ANY,
    }
    roles = ["system", "developer", "user"]
    plain = fields | {
        "role": {"enum": roles},
        "content": content,
        "tool_calls": no_calls,
        "tool_call_id": _NULL,
        "reasoning_content": _NULL,
    }
    tool = plain | {"role": {"const": "tool"}, "tool_call_id": _TEXT}
    assistant = plain | {
        "role": {"const": "assistant"},
        "tool_calls": _or_null(calls),
        "reasoning_content": fields["reasoning_content"],
    }
    caller = assistant | {"content": _or_null(content), "tool_calls": calls | {"minItems": 1}}
    shapes["Message"] = {
        "title": "Message",
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "properties": properties,
                "required": ["role", *required],
            }
            for properties, required in (
                (plain, ["content"]),
                (tool, ["content", "tool_call_id"]),
                (assistant, ["content"]),
                (caller, ["tool_calls"]),
            )
        ],
    }


def _tell_answers(described: Schema) -> None:
    shapes = described["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        shapes.pop(unused, None)
    shapes["Error"] = _ERROR
    kinds = {kind for pair in _CHOICES.values() for kind in pair}
    _, replies = msgspec.json.schema_components(
        [*kinds, UsageReply], ref_template="#/components/schemas/Reply{name}"
    )
    shapes |= {f"Reply{name}": reply for name, reply in replies.items()}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            answers = operation["responses"]
            answers.pop("422", None)
            answers |= {str(status): _failure(status) for status in _statuses(path, method)}
            if path in _CHOICES:
                whole, part = _CHOICES[path]
                answers["200"] = {
                    "description": "The answer, or with `stream` its events as they come",
                    "content": {
                        "application/json": {"schema": _answer(whole.__name__)},
                        "text/event-stream": {"itemSchema": _event(part.__name__)},
                    },
                }


def _statuses(path: str, method: str) -> Iterable[int]:
    if method == "post":
        return (status for status in STATUSES if status != 404 or path in _CHOICES)
    found = {401, 403, 405, 431, 500, 503}
    return found | {404} if "{" in path else found


def _failure(status: int) -> Schema:
    failure: Schema = {
        "description": STATUSES[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    if status in (429, 503):
        failure["headers"] = {"Retry-After": _RETRY_AFTER}
    return failure


def _answer(choice: str) -> Schema:
    fields: dict[str, Schema] = {
        "id": _TEXT,
        "object": _TEXT,
        "created": {"type": "integer"},
        "model": _TEXT,
        "choices": {"type": "array", "items": {"$ref": f"#/components/schemas/Reply{choice}"}},
        "usage": {"$ref": "#/components/schemas/ReplyUsageReply"},
    }
    return {"type": "object", "required": list(fields), "properties": fields}


def _event(choice: str) -> Schema:
    """Of a server-sent event: a part of the answer, an error, or the mark of the end."""
    part = _answer(choice)
    part["required"].remove("usage")
    part["properties"]["usage"] = _or_null(part["properties"]["usage"])
    data = {"anyOf": [part, {"$ref": "#/components/schemas/Error"}]}
    encoded = _TEXT | {"contentMediaType": "application/json", "contentSchema": data}
    end = {"const": "[DONE]"}
    return {"type": "object", "properties": {"data": {"anyOf": [end, encoded]}}}


def _or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, _NULL]}


def _having(field: str, schema: Schema) -> Schema:
    return {"type": "object", "required": [field], "properties": {field: schema}}


def _when(condition: dict[str, Schema], consequence: dict[str, Schema]) -> Schema:
    """That objects with fields as in `condition` have those of `consequence`."""
    return {
        "if": {"properties": condition, "required": list(condition)},
        "then": {"properties": consequence, "required": list(consequence)},
    }


def _below(limit: int) -> str:
    """A regular expression of the whole numbers from 0 to `limit` - 1, without leading zeros."""
    digits = str(limit)
    shorter = rf"[1-9][0-9]{{0,{len(digits) - 2}}}|" if len(digits) > 1 else ""
    alternatives = []
    for place, digit in enumerate(digits):
        least = 1 if place == 0 and len(digits) > 1 else 0
        if int(digit) > least:
            rest = len(digits) - place - 1
            tail = f"[0-9]{{{rest}}}" if rest else ""
            alternatives.append(f"{digits[:place]}[{least}-{int(digit) - 1}]{tail}")
    zero = "0|" if len(digits) > 1 else ""
    return zero + shorter + "|".join(alternatives)
