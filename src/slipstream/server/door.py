"""What every request passes first: its id, who may ask, how much may wait, how long a body may take."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream.server.config import Keys, ServerConfig
from slipstream.server.errors import ApiError
from slipstream.server.metrics import Metrics

log = logging.getLogger("slipstream.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(eq=False)
class Call:
    """One HTTP request on its way, for the log and for what has to be given back at its end.

    chains, tokens: what it holds of the queue. facts: what the routes add to its log line.
    """

    request_id: str
    began_s: float = field(default_factory=time.perf_counter)
    status: int = 0
    chains: int = 0
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Gate:
    """The bounded queue: chains and prompt tokens that run or wait. Belongs to the event loop, needs no lock."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.chains = self.tokens = 0
        self._mean_s = 1.0

    @property
    def is_full(self) -> bool:
        return self.chains >= self._config.max_queue or self.tokens >= self._config.max_queue_tokens

    def hold(self, call: Call, chains: int, tokens: int) -> None:
        """Take room until :meth:`release`. 503 when there is none now, 400 when there never will be."""
        most, most_tokens = self._config.max_queue, self._config.max_queue_tokens
        if chains > most or tokens > most_tokens:
            raise ApiError(
                400, f"{chains} chains of {tokens} prompt tokens in all exceed the queue of {most} and {most_tokens}"
            )
        if self.chains + chains > most or self.tokens + tokens > most_tokens:
            wait = max(1, min(60, round(self._mean_s)))
            raise ApiError(
                503, "the server is full: try again later", code="queue_full", headers={"Retry-After": str(wait)}
            )
        call.chains, call.tokens = chains, tokens
        self.chains += chains
        self.tokens += tokens

    def release(self, call: Call) -> None:
        if call.chains:
            self._mean_s += 0.1 * (time.perf_counter() - call.began_s - self._mean_s)
        self.chains -= call.chains
        self.tokens -= call.tokens
        call.chains = call.tokens = 0


class Door:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, config: ServerConfig, gate: Gate, metrics: Metrics) -> None:
        self._app, self._config, self._gate, self._metrics = app, config, gate, metrics
        self._keys = Keys(config.api_key_file) if config.api_key_file else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        call = Call(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["slipstream.call"] = call
        tag = (b"x-request-id", call.request_id.encode())

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", []), tag]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._app(scope, self._bounded(receive), tagged)
            else:
                await refusal.response()(scope, receive, tagged)
        except Exception:  # noqa: BLE001 - the last place that can answer; the log has the traceback
            log.exception("request %s failed", call.request_id)
            if call.status:
                raise  # the response is half out: closing the connection is all that is left
            error = ApiError(500, f"internal error; the log knows more under request id {call.request_id}")
            await error.response()(scope, receive, tagged)
        finally:
            self._gate.release(call)
            self._tell(call, scope)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        if scope["path"] == "/health":
            return None
        if self._keys is not None:
            if not self._keys.accept(_key_of(headers.get("authorization", ""))):
                scheme = "Basic" if scope["path"] == "/" else "Bearer"  # a browser asks for a password then
                return ApiError(
                    401, "the API key is missing or wrong", code="invalid_api_key",
                    headers={"WWW-Authenticate": f'{scheme} realm="slipstream"'},
                )  # fmt: skip
        elif self._config.is_loopback and not self._is_local(headers.get("host", "")):
            # a page elsewhere may point a name of its own at this machine, and then read our answers
            return ApiError(403, "this server answers to local host names only; set --host or --api-key-file")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._config.max_body_bytes:
            return self._too_long()
        return None

    def _is_local(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host)
        return name in ("localhost", "[::1]", self._config.host) or re.fullmatch(r"127(\.\d+){3}", name) is not None

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body exceeds this server's limit of {self._config.max_body_bytes} bytes")

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` for a body that has to be short enough and to arrive in time; afterwards as it is."""
        size, is_over = 0, False
        deadline = asyncio.get_running_loop().time() + self._config.body_timeout_s

        async def bounded() -> Message:
            nonlocal size, is_over
            if is_over:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            is_over = not message.get("more_body", False)
            if size > self._config.max_body_bytes:
                raise self._too_long()
            return message

        return bounded

    def _tell(self, call: Call, scope: Scope) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = call.status or 499  # nobody was there any more
        self._metrics.http.labels(route, str(status)).inc()
        quiet = route in ("/health", "/ready", "/metrics", "/stats") and status == 200
        facts = {
            "request_id": call.request_id, "method": scope["method"], "path": scope["path"], "status": status,
            "seconds": round(time.perf_counter() - call.began_s, 6), **call.facts,
        }  # fmt: skip
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"facts": facts})


def _key_of(authorization: str) -> str:
    """The key of ``Bearer KEY``, or the password of ``Basic``, which is what a browser sends."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""
