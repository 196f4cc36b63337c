"""Where and when work runs: a lane is an ordered place for work, a ticket the promise of one result.

Law: whatever a lane computes is touched only through its ticket. Work given to one lane runs in the order in which it
was given; between lanes there is no order except through tickets. ``InlineLane`` is the definition: any other lane
must give the same results (golden equality 4). This module does not know what its tensors mean.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R", covariant=True)


CAPTURES = threading.RLock()
"""Held while a CUDA graph is captured: torch begins by waiting for the device, which another's capture forbids."""


class Ticket(Protocol[R]):
    """The promise of one result."""

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once. Never blocks."""
        ...

    def wait(self) -> R:
        """The result; orders the caller after the work. An exception of the work is raised here, every time."""
        ...

    def block(self) -> R:
        """Like :meth:`wait`, and the host too may read the result: blocks it until the work is done."""
        ...


class Lane(Protocol):
    """An ordered place where work runs."""

    def submit(self, work: Callable[..., T], *args: Any) -> Ticket[T]: ...

    def close(self) -> None:
        """Finish what was submitted, then stop. Submitting afterwards raises ``RuntimeError``."""
        ...


class _HostTicket(Generic[T]):
    """A result made by host code, here or on another thread."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    def run(self, work: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            self._result = work(*args)
        except BaseException as error:  # noqa: BLE001 - kept, and raised to whoever waits
            self._error = error
        self._ready.set()

    def done(self) -> bool:
        return self._ready.is_set()

    def wait(self) -> T:
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    block = wait


class InlineLane:
    """Runs work at once, in the caller: the synchronous twin of every other lane."""

    def __init__(self) -> None:
        self._closed = False

    def submit(self, work: Callable[..., T], *args: Any) -> Ticket[T]:
        if self._closed:
            raise RuntimeError("this lane is closed")
        ticket: _HostTicket[T] = _HostTicket()
        ticket.run(work, args)
        return ticket

    def close(self) -> None:
        self._closed = True


class ThreadLane:
    """One worker thread that runs work in order."""

    def __init__(self, name: str = "lane") -> None:
        self._jobs: queue.SimpleQueue[tuple[_HostTicket[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            ticket, work, args = job
            ticket.run(work, args)

    def submit(self, work: Callable[..., T], *args: Any) -> Ticket[T]:
        ticket: _HostTicket[T] = _HostTicket()
        with self._lock:
            if self._closed:
                raise RuntimeError("this lane is closed")
            self._jobs.put((ticket, work, args))
        return ticket

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class _StreamTicket(Generic[T]):
    """A result whose device work ends at an event."""

    def __init__(self, result: T, event: torch.cuda.Event) -> None:
        self._result = result
        self._event = event

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> T:
        """Order the *current stream* after the work (no host block), then hand out the result."""
        torch.cuda.current_stream().wait_event(self._event)
        return self._result

    def block(self) -> T:
        """Block the host until the device work is done."""
        self._event.synchronize()
        return self._result


class StreamLane:
    """A CUDA stream beside the current one. Work is launched at once, ordered after what the caller had launched."""

    def __init__(self, device: torch.device | str | None = None, priority: int = 0) -> None:
        self.stream = torch.cuda.Stream(device=device, priority=priority)
        self._closed = False

    def submit(self, work: Callable[..., T], *args: Any) -> _StreamTicket[T]:
        if self._closed:
            raise RuntimeError("this lane is closed")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work(*args)
            event = torch.cuda.Event()
            event.record(self.stream)
        return _StreamTicket(result, event)

    def close(self) -> None:
        self._closed = True
        self.stream.synchronize()


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """What a thread launches within, on a stream of its own, after what the caller has launched so far.

    All threads share a device's default stream: on it the steps of two engines wait for each other.
    """
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


class PeerLane:
    """A CUDA stream of another device, ``far``, and one beside the current one of this device, ``near``.

    Work finds both current: what it copies between the devices waits for no other stream, and no other waits for it.
    The streams join at the end of each piece of work; a ticket is for both. Not for use within a capture.
    """

    def __init__(self, near: torch.device, far: torch.device) -> None:
        self._near, self._far, self._device = torch.cuda.Stream(near), torch.cuda.Stream(far), near
        self._closed = False

    def submit(self, work: Callable[..., T], *args: Any) -> _StreamTicket[T]:
        if self._closed:
            raise RuntimeError("this lane is closed")
        self._near.wait_stream(torch.cuda.current_stream(self._device))
        self._far.wait_stream(self._near)
        with torch.cuda.stream(self._near), torch.cuda.stream(self._far):
            result = work(*args)
        self._near.wait_stream(self._far)
        event = torch.cuda.Event()
        event.record(self._near)
        return _StreamTicket(result, event)

    def close(self) -> None:
        self._closed = True
        self._near.synchronize()
