"""From a request to what the engine is asked for: limits, tokens, grammar, sampling.

Runs in a thread of its own, one request after the other: long prompts take long to encode, and
the streams must not wait for them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_dist.errors import RequestError
from mlx_dist.messages import Sampling
from mlx_dist.model.grammar import after_reasoning, json_grammar, tool_grammar
from mlx_dist.params import Params
from mlx_dist.serve.failures import ApiError, blaming
from mlx_dist.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, Prompt
from mlx_dist.serve.relayed import Relayed, TokensByChoice
from mlx_dist.serve.settings import HttpConfig

if TYPE_CHECKING:
    from mlx_dist.engine.text import ChatPrompt
    from mlx_dist.serve.llm import LLM

# What OpenAI documents for requests that do not say.
_COMPLETION_MAX_TOKENS = 16
_TEMPERATURE = 1.0
# No text has so many characters a token; one that would is not encoded, which takes seconds a MB.
_MOST_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Job:
    """What the engine is asked for by one request. Choice i answers prompt i // n.

    `max_calls` is the number of tool calls that an answer ends after, or None for all. Where the
    request had no seed, `is_seeded` is false. `tokens_so_far` are those that each choice has
    already, if it was begun elsewhere.
    """

    prompts: tuple[ChatPrompt | tuple[int, ...], ...]
    n: int
    params: Params
    tools: list[dict[str, Any]] | None
    is_streamed: bool
    includes_usage: bool
    max_calls: int | None
    arrived_s: float
    is_seeded: bool = True
    tokens_so_far: TokensByChoice = ()

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def relayed(self, relayed: Relayed) -> Job:
        """This job as a relay wants it."""
        params = self.params
        if not self.is_seeded:
            sampling = msgspec.structs.replace(params.sampling, seed=relayed.seed)
            params = replace(params, sampling=sampling)
        return replace(self, params=params, is_seeded=True, tokens_so_far=relayed.tokens)

    def tokens_of(self, index: int) -> tuple[int, ...]:
        """The tokens that a choice has already."""
        return tuple(self.tokens_so_far[index]) if index < len(self.tokens_so_far) else ()

    def params_of(self, index: int) -> Params:
        """The choices of a prompt have seeds that follow one another."""
        sampling = self.params.sampling
        seed = (sampling.seed + index % self.n) % (1 << 64)
        return Params(
            max_tokens=self.params.max_tokens,
            sampling=msgspec.structs.replace(sampling, seed=seed),
            stop=self.params.stop,
        )


def chat_job(llm: LLM, config: HttpConfig, request: ChatRequest, arrived_s: float) -> Job:
    """Raises ApiError or MlxDistError if the request cannot be served."""
    _check_common(llm, config, request, num_prompts=1)
    num_logprobs = request.top_logprobs
    if request.logprobs:
        num_logprobs = num_logprobs or 0
    elif num_logprobs is not None:
        raise _refused("top_logprobs", "needs logprobs: true")
    _check_most("top_logprobs", num_logprobs or 0, config.max_logprobs)
    tools = _tools(llm, config, request)
    grammar = _grammar(llm, request, tools)
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    num_characters = sum(len(message.content or "") for message in request.messages)
    _check_size(llm, "messages", num_characters + len(msgspec.json.encode(tools or ())))
    with blaming("messages"):
        prompt = llm.tokenizer.encode_chat(messages, tools, request.chat_template_kwargs)
    _check_prompt(config, len(prompt.tokens))
    if grammar is not None:
        grammar = after_reasoning(grammar, llm.tokenizer.open_reasoning(prompt.tokens))
    return _job(
        request,
        (prompt,),
        _params(request, _max_tokens(request), num_logprobs, grammar),
        arrived_s,
        tools=tools,
        max_calls=1 if request.parallel_tool_calls is False else None,
    )


def check_grammar(llm: LLM, job: Job) -> None:
    """Raises ApiError if the grammar that `job` has cannot be used; this can take seconds."""
    grammar = job.params.sampling.grammar
    assert grammar is not None
    with blaming("response_format" if job.tools is None else "tools"):
        llm.grammars.check(grammar)


def completion_job(
    llm: LLM, config: HttpConfig, request: CompletionRequest, arrived_s: float
) -> Job:
    """Raises ApiError or MlxDistError if the request cannot be served."""
    _check_common(llm, config, request, num_prompts=len(request.prompt))
    _check_most("logprobs", request.logprobs or 0, config.max_logprobs)

    def encode(prompt: Prompt) -> tuple[int, ...]:
        _check_size(llm, "prompt", len(prompt))
        with blaming("prompt"):
            tokens = llm.tokenizer.encode_text(prompt) if isinstance(prompt, str) else tuple(prompt)
        _check_prompt(config, len(tokens))
        return tokens

    max_tokens = request.max_tokens or _COMPLETION_MAX_TOKENS
    params = _params(request, max_tokens, request.logprobs, grammar=None)
    return _job(request, tuple(map(encode, request.prompt)), params, arrived_s)


def _job(
    request: GenerationRequest,
    prompts: tuple[ChatPrompt | tuple[int, ...], ...],
    params: Params,
    arrived_s: float,
    tools: list[dict[str, Any]] | None = None,
    max_calls: int | None = None,
) -> Job:
    options = request.stream_options
    return Job(
        prompts=prompts,
        n=request.n or 1,
        params=params,
        tools=tools,
        is_streamed=bool(request.stream),
        includes_usage=options is not None and bool(options.include_usage),
        max_calls=max_calls,
        arrived_s=arrived_s,
        is_seeded=request.seed is not None,
    )


def check_model(llm: LLM, name: str) -> None:
    """Raise ApiError if `name` is another model; the name after the last slash will do."""
    if name not in (llm.name, llm.name.rpartition("/")[2]):
        message = f"there is no model {name[:100]!r} here; GET /v1/models has {llm.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _check_common(
    llm: LLM, config: HttpConfig, request: GenerationRequest, num_prompts: int
) -> None:
    check_model(llm, request.model)
    num_choices = (request.n or 1) * num_prompts
    _check_most("n" if request.n else "prompt", num_choices, config.max_choices)
    _check_most("stop", len(request.stop or ()), config.max_stops)
    if request.stream_options is not None and not request.stream:
        raise _refused("stream_options", "needs stream: true")


def _check_prompt(config: HttpConfig, num_tokens: int) -> None:
    most = config.max_prompt_tokens
    if most is not None and num_tokens > most:
        message = f"the prompt has {num_tokens} tokens; the server takes {most}"
        raise ApiError(413, message, code="context_length_exceeded")


def _check_size(llm: LLM, param: str, num_characters: int) -> None:
    context = llm.tokenizer.context_tokens
    if context is not None and num_characters > context * _MOST_CHARACTERS:
        message = f"{param}: {num_characters} characters cannot fit the model's {context} tokens"
        raise ApiError(413, message, param=param, code="context_length_exceeded")


def _check_most(param: str, value: int, most: int) -> None:
    if value > most:
        raise _refused(param, f"is {value} of at most {most}")


def _refused(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param} {reason}", param=param, code="invalid_value")


def _params(
    request: GenerationRequest,
    max_tokens: int | None,
    num_logprobs: int | None,
    grammar: str | None,
) -> Params:
    off = Sampling()

    def or_off(name: str) -> Any:
        value = getattr(request, name)
        return getattr(off, name) if value is None else value

    sampling = Sampling(
        temperature=_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=or_off("top_p"),
        top_k=or_off("top_k"),
        min_p=or_off("min_p"),
        repetition_penalty=or_off("repetition_penalty"),
        presence_penalty=or_off("presence_penalty"),
        frequency_penalty=or_off("frequency_penalty"),
        logit_bias=or_off("logit_bias"),
        seed=secrets.randbits(63) if request.seed is None else request.seed % (1 << 64),
        grammar=grammar,
        num_logprobs=num_logprobs,
    )
    return _checked(Params(max_tokens, sampling, tuple(request.stop or ())))


def _checked(params: Params) -> Params:
    """`params`, if they are what a sampler takes; an error names the one that is not."""
    wrong = []

    def spell(name: str) -> str:
        wrong.append(name)
        return name

    try:
        params.check(spell)
    except RequestError as error:
        raise ApiError(400, str(error), param=wrong[-1], code="invalid_value") from None
    return params


def _max_tokens(request: ChatRequest) -> int | None:
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise _refused("max_tokens", "is not max_completion_tokens, its newer name; give one")
    return both.pop() if both else None


def _tools(llm: LLM, config: HttpConfig, request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that may be called, as JSON objects."""
    choice = request.tool_choice
    if not request.tools:
        if choice is not None and choice.type in ("required", "function"):
            raise _refused("tool_choice", "asks for a call, and there are no tools")
        return None
    _check_most("tools", len(request.tools), config.max_tools)
    if not llm.tokenizer.has_tools:
        raise _refused("tools", "are not known to this model's chat template")
    if choice is not None and choice.type == "none":
        return None
    if choice is None or choice.type == "auto":
        _check_not_strict(request)
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def _check_not_strict(request: ChatRequest) -> None:
    for index, tool in enumerate(request.tools or ()):
        if tool.function.strict:
            raise _refused(
                f"tools[{index}].function.strict",
                'needs a tool_choice of "required" or one function; others are not held to schemas',
            )


def _grammar(llm: LLM, request: ChatRequest, tools: list[dict[str, Any]] | None) -> str | None:
    """What the answer must follow: the response format, or a call that is asked for."""
    choice, wanted = request.tool_choice, request.response_format
    if wanted is not None and wanted.type != "text":
        if tools is not None:
            raise _refused("response_format", 'goes with tools only if tool_choice is "none"')
        with blaming("response_format"):
            return json_grammar(wanted.json_schema.schema_ if wanted.json_schema else None)
    if tools is None or choice is None or choice.type == "auto":
        return None
    name = choice.function.name if choice.function is not None else None
    if name is not None and all(tool["function"]["name"] != name for tool in tools):
        raise _refused("tool_choice", f"names {name[:64]!r}, which is not among the tools")
    with blaming("tools"):
        return tool_grammar(tools, name, llm.tokenizer.call_markers)
