"""The engine's asynchronous face: one worker thread steps it, any number of event loops wait for its tokens."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

from slipstream.engine.engine import Engine
from slipstream.engine.request import Event, Request, StopCheck
from slipstream.overlap import ThreadLane, own_stream
from slipstream.types import Completion, Delta, SamplingParams

News = Event | BaseException


class _Listener:
    """Who waits, on ``loop``, for some requests: all their news, or only their ends.

    The engine's thread puts news in; the rest happens on the loop, which is not woken for what a listener that rests
    will find anyway. Law: whoever puts looks at ``_rests`` last, whoever waits looks at the news last.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wants_all: bool) -> None:
        self.loop, self.wants_all = loop, wants_all
        self._news: deque[News] = deque()
        self._has_end = self._rests = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, news: News) -> bool:
        """Keep news; whether :meth:`wake` has to be called on the loop."""
        self._news.append(news)
        if isinstance(news, BaseException) or news.finished:
            self._has_end = True
        return self._has_end or not self._rests

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[News]:
        """Everything since the last time; waits for the first."""
        while not self._news:
            self._waiter = self.loop.create_future()
            await self._waiter
        self._has_end = False
        return [self._news.popleft() for _ in range(len(self._news))]

    async def rest(self, seconds: float) -> None:
        """Let news gather for at most so long; an end is not waited with."""
        if seconds <= 0:
            return
        self._waiter, self._rests = self.loop.create_future(), True
        # on one grid for all who rest as long: they wake in one round of the loop instead of in one each
        timer = self.loop.call_at((self.loop.time() // seconds + 1) * seconds, self.wake)
        try:
            if not self._has_end:
                await self._waiter
        finally:
            self._rests = False
            timer.cancel()


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
        self._own_stream = own_stream(engine.device)
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
        async with aclosing(self._events([request], wants_all=False)) as bundles:
            async for events in bundles:
                assert all(event.finished for event in events)
        return request

    def events(
        self, *requests: Request, pause_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """All news of some requests, in bundles of what has come since the last one was taken; their ends are the last.

        pause_s: asked after each bundle how long news may gather before the next; ends are told at once.
        A bad request raises ``ValueError`` here, one that dies ``RuntimeError`` in the loop; the others die with it.
        """
        for request in requests:
            self._check(request)
        return self._events(requests, True, pause_s)

    @property
    def failure(self) -> BaseException | None:
        """What killed the worker: every request fails from then on. None while it lives, and after :meth:`close`."""
        return None if isinstance(self._over, _Closed) else self._over

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
        async with aclosing(self._events([request], wants_all=True)) as bundles:
            async for events in bundles:
                for event in events:
                    if event.delta is not None:
                        yield event.delta

    async def _events(
        self, requests: Sequence[Request], wants_all: bool, pause_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        listener, left = _Listener(asyncio.get_running_loop(), wants_all), len(requests)
        try:
            for request in requests:
                self._submit(request, listener)
            while left:
                events, error = _until_error(await listener.take())
                if events:
                    yield events
                if error is not None:
                    raise error
                left -= sum(event.finished for event in events)
                if pause_s is not None and left:
                    await listener.rest(pause_s())
        finally:
            for request in requests:
                self._leave(request.request_id, listener)

    def _leave(self, request_id: str, listener: _Listener) -> None:
        """Whoever listened is gone: cancel the request, unless it is over."""
        with self._lock:
            unfinished = self._listeners.get(request_id) is listener
            if unfinished:
                del self._listeners[request_id]
        if unfinished:
            self._jobs.put(lambda: self._engine.cancel(request_id))

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
            with self._own_stream:
                while self._take_jobs():
                    if self._engine.has_work():
                        self._deliver(self._engine.step())
                self._end(_Closed("the engine was closed"))
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
        """Hand the news over, and wake each event loop on which somebody waits for them, once."""
        bundles: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, News]]] = {}
        with self._lock:
            for event in events:
                listener = self._listeners.get(event.request.request_id)
                if listener is None:
                    continue
                if event.finished:
                    del self._listeners[event.request.request_id]
                if (event.finished or listener.wants_all) and listener.put(event):
                    bundles.setdefault(listener.loop, []).append((listener, event))
        for loop, bundle in bundles.items():
            self._post(loop, bundle)

    def _post(self, loop: asyncio.AbstractEventLoop, bundle: Sequence[tuple[_Listener, News]]) -> None:
        try:
            loop.call_soon_threadsafe(_wake_all, bundle)
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
            listener.put(reason)
            self._post(listener.loop, [(listener, reason)])


class _Closed(RuntimeError):
    """The end that was asked for."""


def _wake_all(bundle: Sequence[tuple[_Listener, News]]) -> None:
    for listener, _ in bundle:
        listener.wake()


def _until_error(news: Sequence[News]) -> tuple[list[Event], RuntimeError | None]:
    """The events before the first request that is lost, and what is to be said of that one."""
    events: list[Event] = []
    for item in news:
        if isinstance(item, BaseException):
            error = RuntimeError(f"the request was lost: {item}")
            error.__cause__ = item
            return events, error
        if item.request.error is not None:
            error = RuntimeError(f"request {item.request.request_id!r} died in a step: {item.request.error}")
            error.__cause__ = item.request.error
            return events, error
        events.append(item)
    return events, None
