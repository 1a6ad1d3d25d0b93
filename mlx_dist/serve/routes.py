"""The routes: OpenAI's, and those that say how the server is. Knows no sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import mlx_dist
from mlx_dist.serve.body import json_route
from mlx_dist.serve.failures import add_handlers, not_ready
from mlx_dist.serve.guard import Guard, Turnstile
from mlx_dist.serve.jobs import Job, chat_job, check_grammar, check_model, completion_job
from mlx_dist.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest
from mlx_dist.serve.replies import ChatWriter, TextWriter
from mlx_dist.serve.schema import describe
from mlx_dist.serve.settings import CHAT_PATH, COMPLETION_PATH, GENERATION_PATHS, HttpConfig
from mlx_dist.serve.streaming import Answer, Shim

if TYPE_CHECKING:
    from mlx_dist.serve.llm import LLM

R = TypeVar("R", bound=GenerationRequest)
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(shim: Shim) -> FastAPI:
    """The whole shim as an ASGI application."""
    config = shim.config

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        shim.desk.open()
        yield

    middleware = [
        Middleware(Guard, config=config, metrics=shim.metrics),
        Middleware(Turnstile, paths=GENERATION_PATHS, check=lambda: shim.llm.check_room(1)),
    ]
    if config.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
        )
        middleware.insert(0, cors)
    app = FastAPI(
        title="mlx-dist",
        version=mlx_dist.__version__,
        lifespan=lifespan,
        middleware=middleware,
        redirect_slashes=False,
        # Their pages load scripts from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = json_route(config.max_json_depth)
    _add_generation(app, shim)
    _add_status(app, shim)
    add_handlers(app)
    describe(app, shim.llm, config)
    return app


def _add_generation(app: FastAPI, shim: Shim) -> None:
    # A thread each, so that no prompt waits for a grammar; and no more, as the cores are the
    # model's.
    encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
    checker = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def job_of(make: Callable[[LLM, HttpConfig, R, float], Job], request: R) -> Job:
        loop, arrived_s = asyncio.get_running_loop(), time.monotonic()
        making = loop.run_in_executor(encoder, make, shim.llm, shim.config, request, arrived_s)
        job = await shim.desk.unless_closed(making)
        if job.params.sampling.grammar is not None:
            checking = loop.run_in_executor(checker, check_grammar, shim.llm, job)
            await shim.desk.unless_closed(checking)
        return job

    @app.post(CHAT_PATH)
    async def chat(request: ChatRequest) -> Response:
        return Answer(shim, await job_of(chat_job, request), ChatWriter)

    @app.post(COMPLETION_PATH)
    async def complete(request: CompletionRequest) -> Response:
        return Answer(shim, await job_of(completion_job, request), TextWriter)


def _add_status(app: FastAPI, shim: Shim) -> None:
    llm = shim.llm
    model = {
        "id": llm.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "mlx-dist",
        "max_model_len": llm.tokenizer.context_tokens,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        check_model(llm, name)
        return _json(model)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        stats = llm.stats()
        if stats.is_draining:
            raise not_ready("the server is draining")
        # Written so that NaN is not ready.
        if not stats.last_step_age_s < shim.config.ready_age_s:
            raise not_ready(f"no step has ended for {stats.last_step_age_s:.1f} s")
        return _json({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(shim.metrics.text(), media_type=_METRICS_TYPE)

    @app.get("/cluster")
    async def cluster() -> Response:
        stats = msgspec.to_builtins(llm.stats())
        return _json({"model": llm.name, "ranks": stats.pop("ranks"), "stats": stats})


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
