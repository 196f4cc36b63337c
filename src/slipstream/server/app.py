"""The routes, and the process around them: one socket, one event loop, an orderly end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from slipstream.llm import LLM
from slipstream.server.answer import Answer
from slipstream.server.config import Keys, ServerConfig
from slipstream.server.door import Door
from slipstream.server.errors import ERROR, ApiError, on_http_error, on_invalid
from slipstream.server.logs import log_to_stderr
from slipstream.server.scaled import Scale
from slipstream.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from slipstream.server.service import Service

log = logging.getLogger("slipstream.server")
PAGE = Path(__file__).with_name("page.html")
LAST_WORDS_S = 5.0  # for answers to requests that a shutdown cancels
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": who, "content": {"application/json": {"schema": ERROR}}}
    for status, who in (("4XX", "The client can mend it."), ("5XX", "The server is full, stopping, or has failed."))
}


def create_app(llm: LLM, config: ServerConfig | None = None, scale: Scale | None = None) -> FastAPI:
    """The server as an ASGI application, which drives ``llm`` from now on and closes it at its end.

    scale: test-time scaling over a draft and this model; without it, requests that ask for it are refused.
    """
    service = Service(llm, config or ServerConfig())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        until = time.monotonic() + LAST_WORDS_S
        while service.gate.chains and time.monotonic() < until:
            await asyncio.sleep(0.01)  # who was cancelled just now is still to be told
        await asyncio.to_thread(llm.close)

    app = FastAPI(title="Slipstream", lifespan=lifespan, docs_url=None, redoc_url=None, responses=REFUSALS)
    app.add_middleware(Door, config=service.config, gate=service.gate, metrics=service.metrics)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.state.service = service
    _add_generation(app, Answer(service, scale))
    _add_text(app, service)
    _add_state(app, service)
    return app


def _add_generation(app: FastAPI, answer: Answer) -> None:
    @app.post("/v1/completions", responses=STREAMS)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await answer.completion(body, http)

    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        return await answer.chat(body, http)


def _add_text(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def card() -> dict[str, Any]:
        known = {"id": service.name, "object": "model", "created": created, "owned_by": "slipstream"}
        return known | {"root": service.llm.name, "parent": None, "max_model_len": service.max_model_len}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.prompt is not None:
            (ids,) = await service.encode([body.prompt], body.add_special_tokens)
        else:
            ids = await service.encode_chat(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        found = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
        return found | {"token_strs": [service.token_text(i) for i in ids] if body.return_token_strs else None}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": await service.decode(body.tokens)}


def live_page() -> tuple[str, dict[str, str]]:
    """The page and the headers that it is sent with."""
    page = PAGE.read_text(encoding="utf-8")
    digests = [
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.DOTALL)
    ]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; style-src {allowed}; script-src {allowed}; connect-src 'self'; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    guards = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return page, guards


def _add_state(app: FastAPI, service: Service) -> None:
    page, guards = live_page()
    began = time.monotonic()

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.lost is not None:
            raise ApiError(503, f"the engine is lost, {service.lost}: restart the server", code="engine_lost")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        await health()
        if service.gate.is_full:
            raise ApiError(503, "the queue is full", code="queue_full", headers={"Retry-After": "1"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """What the page shows: the engine's statistics, this server's, and the last certificate of scaling."""
        server = {"queued_chains": service.gate.chains, "queued_tokens": service.gate.tokens}
        clock = {"model": service.name, "uptime_s": time.monotonic() - began, "max_model_len": service.max_model_len}
        return clock | {
            "engine": {name: value if _is_json(value) else str(value) for name, value in service.llm.stats().items()},
            "server": server | service.metrics.medians(),
            "scaling": service.certificate,
        }

    @app.get("/", response_class=HTMLResponse)
    async def live() -> HTMLResponse:
        return HTMLResponse(page, headers=guards)


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))


# -- the process


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket, taken (and the keys read) before a model is loaded: ``OSError`` for a port in use."""
    if config.api_key_file:
        Keys(config.api_key_file)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        sock = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}") from error
    # connections inherit it; asyncio forgets it, and answers to clients that keep a connection then wait 40 ms
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def make_server(llm: LLM, config: ServerConfig, scale: Scale | None = None) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            create_app(llm, config, scale),
            log_config=None,
            http="h11",  # bounds heads; httptools, taken where it is installed, does not
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=config.drain_s,
        )
    )


def cap_caches() -> None:
    """Bound what oneDNN and torch keep per shape of a matrix product on a CPU (1,024 kernels each by default, of about
    0.1 MiB). They read the environment at the first product: call this before a model is loaded."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def serve(llm: LLM, config: ServerConfig, sock: socket.socket, scale: Scale | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; then accept nothing new, let requests end for ``drain_s``, cancel the rest."""
    log_to_stderr(config.log_json)
    llm.engine.warmup()
    if not config.is_loopback and not config.api_key_file:
        log.warning("listening on %s without an API key: whoever reaches this port may use the model", config.host)
    server = make_server(llm, config, scale)
    host, port = sock.getsockname()[:2]
    log.info("serving %s on http://%s:%s", llm.name, f"[{host}]" if ":" in host else host, port)
    server.run(sockets=[sock])
