"""The engine's asynchronous face: one worker thread steps it, any number of event loops wait for its tokens."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from slipstream.engine.engine import Engine
from slipstream.engine.request import Event, Request, StopCheck
from slipstream.overlap import ThreadLane
from slipstream.types import Completion, Delta, SamplingParams


@dataclass
class _Listener:
    """Who waits for a request: news go into ``inbox`` on ``loop``; only its end when ``wants_all`` is False."""

    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[Event | BaseException]
    wants_all: bool


class AsyncEngine:
    """A :class:`slipstream.types.Generator` over one engine, which belongs to the worker thread until :meth:`close`.

    make_stop_check: builds the check for ``params.stop`` (the engine knows no text); without it they are refused.
    Requests may come from several event loops. Leaving a stream early, or cancelling the task that awaits, cancels the
    request.
    """

    def __init__(self, engine: Engine, make_stop_check: Callable[[SamplingParams], StopCheck] | None = None) -> None:
        self._engine, self._make_stop_check = engine, make_stop_check
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the listeners, and of why there are no more
        self._listeners: dict[str, _Listener] = {}
        self._over: BaseException | None = None
        self._lane = ThreadLane("engine")
        self._lane.submit(self._serve)

    # -- the protocol

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncIterator[Delta]:
        """New tokens as they come, of all chains. A bad request raises ``ValueError`` here, before the first token."""
        request = self._request(prompt_ids, params, request_id)
        self._check(request)
        return self._deltas(request)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> list[Completion]:
        """``params.n`` finished chains."""
        return (await self.run(self._request(prompt_ids, params, request_id))).completions

    async def score(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> list[float]:
        """Natural-log probability of every token of the continuation; prefix KV is reused."""
        return (await self.run(Request.to_score(prompt_ids, continuation_ids))).scores

    async def extend(self, ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None) -> Completion:
        """Continue one chain exactly where ``ids`` ends."""
        if params.n != 1:
            raise ValueError(f"extend continues one chain, but n = {params.n}: use generate")
        return (await self.generate(ids, params, request_id=request_id))[0]

    def cancel(self, request_id: str) -> bool:
        """Stop a request; whoever awaits it gets what there is, with finish reason "abort"."""
        with self._lock:
            known = request_id in self._listeners
        if known:
            self._jobs.put(lambda: self._engine.cancel(request_id))
        return known

    # -- requests as such, for rooms that know text

    async def run(self, request: Request) -> Request:
        """Serve a request to its end."""
        async for event in self._events(request, wants_all=False):
            assert event.finished
        return request

    def events(self, request: Request) -> AsyncIterator[Event]:
        """All news of a request, its end the last. A bad request raises ``ValueError`` here."""
        self._check(request)
        return self._events(request, wants_all=True)

    def stats(self) -> dict[str, float]:
        return self._engine.stats()

    def close(self) -> None:
        """Stop the worker; whoever still waits gets ``RuntimeError``. Closing twice is fine."""
        self._jobs.put(None)
        self._lane.close()

    # -- the waiting side

    def _request(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None) -> Request:
        request = Request(prompt_ids, params)
        if request_id is not None:
            request.request_id = request_id
        if params.stop and self._make_stop_check is not None:
            request.stop_check = self._make_stop_check(params)
        return request

    def _check(self, request: Request) -> None:
        self._engine.check(request)
        if request.params.stop and request.stop_check is None:
            raise ValueError(f"stop strings {request.params.stop} need text: this engine was given no make_stop_check")

    async def _deltas(self, request: Request) -> AsyncIterator[Delta]:
        events = self._events(request, wants_all=True)
        try:
            async for event in events:
                if event.delta is not None:
                    yield event.delta
        finally:
            await events.aclose()

    async def _events(self, request: Request, wants_all: bool) -> AsyncGenerator[Event, None]:
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue(), wants_all)
        self._submit(request, listener)
        try:
            while True:
                news = await listener.inbox.get()
                if isinstance(news, BaseException):
                    raise RuntimeError(f"request {request.request_id!r} was lost: {news}") from news
                if request.error is not None:
                    raise RuntimeError(
                        f"request {request.request_id!r} died in a step: {request.error}"
                    ) from request.error
                yield news
                if news.finished:
                    return
        finally:
            with self._lock:
                unfinished = self._listeners.get(request.request_id) is listener
                if unfinished:
                    del self._listeners[request.request_id]
            if unfinished:
                self._jobs.put(lambda: self._engine.cancel(request.request_id))

    def _submit(self, request: Request, listener: _Listener) -> None:
        self._check(request)
        with self._lock:
            if self._over is not None:
                raise RuntimeError(f"the engine is not running: {self._over}") from self._over
            if request.request_id in self._listeners:
                raise ValueError(f"request id {request.request_id!r} is in use: wait for its end or choose another")
            self._listeners[request.request_id] = listener
        self._jobs.put(lambda: self._engine.add(request))

    # -- the worker

    def _serve(self) -> None:
        try:
            while self._take_jobs():
                if self._engine.has_work():
                    self._deliver(self._engine.step())
            self._end(RuntimeError("the engine was closed"))
            self._engine.cancel_all()
        except BaseException as error:
            self._end(error)
            raise

    def _take_jobs(self) -> bool:
        """Do what was asked for; sleep when there is nothing else to do. False: it was to stop."""
        wait = not self._engine.has_work()
        while wait or not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                return False
            job()
            wait = False
        return True

    def _deliver(self, events: Sequence[Event]) -> None:
        """Wake each event loop once, with all its news."""
        bundles: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Event]]] = {}
        with self._lock:
            for event in events:
                listener = self._listeners.get(event.request.request_id)
                if listener is None:
                    continue
                if event.finished:
                    del self._listeners[event.request.request_id]
                if event.finished or listener.wants_all:
                    bundles.setdefault(listener.loop, []).append((listener, event))
        for loop, bundle in bundles.items():
            self._post(loop, bundle)

    def _post(self, loop: asyncio.AbstractEventLoop, bundle: Sequence[tuple[_Listener, Event | BaseException]]) -> None:
        try:
            loop.call_soon_threadsafe(_put_all, bundle)
        except RuntimeError:  # the loop is closed: nobody will ever ask
            for _, news in bundle:
                if isinstance(news, Event):
                    self._engine.cancel(news.request.request_id)

    def _end(self, reason: BaseException) -> None:
        """No more steps: tell everybody who waits why."""
        with self._lock:
            self._over = reason
            listeners = list(self._listeners.values())
            self._listeners.clear()
        for listener in listeners:
            self._post(listener.loop, [(listener, reason)])


def _put_all(bundle: Sequence[tuple[_Listener, Event | BaseException]]) -> None:
    for listener, news in bundle:
        listener.inbox.put_nowait(news)
