"""Answers on their way: server-sent events that stop when the client does, and work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slipstream.server.config import ServerConfig
from slipstream.server.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any) -> bytes:
    return _encode(value).encode()


def sse(payload: dict[str, Any]) -> bytes:
    """One event. JSON has no raw line break, so no text can end an event early."""
    return b"data: " + to_json(payload) + b"\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when its client leaves or the server stops."""
    task, watcher = asyncio.create_task(work), asyncio.create_task(gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    except asyncio.CancelledError:
        raise ApiError(503, "the server is shutting down", code="shutting_down") from None
    finally:
        await _stop(task, watcher)


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """``chunks`` (whole events), then ``[DONE]``. An error in the middle is an event like OpenAI's.

    ``chunks`` is closed, and with it the requests behind it, as soon as the client disconnects or has not read for
    ``stall_timeout_s``. A stream that is silent for ``keep_alive_s`` carries comments.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], config: ServerConfig) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._config = chunks, config
        self._sent_s = self._blocked_s = 0.0  # when something was last sent; since when a send has been waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writer = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(self._watch(receive, send))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        except asyncio.CancelledError:  # the server stops: say so, in order
            await _stop(writer, watcher)
            over = ApiError(503, "the server is shutting down", code="shutting_down")
            await self._end(send, sse(over.body()))
        finally:
            await _stop(writer, watcher)

    async def _write(self, send: Send) -> None:
        last = b""
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send(send, chunk)
        except ApiError as error:
            last = sse(error.body())
        await self._end(send, last)

    async def _end(self, send: Send, last: bytes) -> None:
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent_s = self._blocked_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._blocked_s = 0.0

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client is gone or stalls; fills silence."""
        clock = asyncio.get_running_loop().time
        self._sent_s = clock()
        patience = min(self._config.keep_alive_s, self._config.stall_timeout_s) / 2
        while True:
            try:
                async with asyncio.timeout(patience):
                    await gone(receive)
                    return
            except TimeoutError:
                if self._blocked_s and clock() - self._blocked_s > self._config.stall_timeout_s:
                    return
                if not self._blocked_s and clock() - self._sent_s >= self._config.keep_alive_s:
                    await self._comment(send)

    async def _comment(self, send: Send) -> None:
        self._sent_s = asyncio.get_running_loop().time()
        async with asyncio.timeout(self._config.stall_timeout_s):
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
