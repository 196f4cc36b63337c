"""The other ranks as rank 0 sees them: processes that are told every step, and watched.

Law: a step that fails on one rank has failed on all, and the engine with it, for the ranks' caches differ from then on.
Whatever ends a rank (an error, a signal, silence) ends the others, and everyone who waits is told which rank and why.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from slipstream.scale.line import READY, Kind, receive_text, send_numbers, send_text

_TICK_S, _CLOSE_S, _REASON_S, _MEET_S = 0.2, 10.0, 2.0, 0.01
_SOURCES = Path(__file__).parent.parent.parent  # where a rank imports this package from


class RankLost(ConnectionError):
    """A rank failed, so the engine is over."""


class Process(Protocol):
    """What is needed of :class:`subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Member(NamedTuple):
    rank: int
    line: socket.socket
    process: Process


def start(command: Sequence[str], rank: int, hello: dict[str, Any]) -> Member:
    """A process that runs ``command`` with the number of its end of the line behind. It outlives no line.

    In a session of its own: Ctrl-C is for rank 0, which then ends the others.
    """
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(filter(None, (str(_SOURCES), os.environ.get("PYTHONPATH"))))
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True,
            stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    send_text(ours, hello)
    return Member(rank, ours, process)


class Company:
    """timeout_s: after which a step counts as failed. abort: called on another thread when a rank is lost."""

    def __init__(self, members: Sequence[Member], timeout_s: float, abort: Callable[[], object]) -> None:
        self._members, self._timeout_s, self._abort = members, timeout_s, abort
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._closed = False
        self._failure: str | None = None
        self._ready: set[int] = set()
        self._deadline: tuple[float, float] | None = None  # when, and how long after the start
        for member in members:
            member.line.settimeout(timeout_s)
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def meet(self) -> None:
        """Wait until every rank has loaded its part, inside of :meth:`waiting`."""
        while len(self._ready) < len(self._members):
            self.check()
            time.sleep(_MEET_S)

    def tell(self, kind: Kind, numbers: Sequence[int] = ()) -> None:
        """Every rank does the same next."""
        for member in self._members:
            send_numbers(member.line, [kind, *numbers])

    @contextmanager
    def waiting(self, timeout_s: float | None = None) -> Iterator[None]:
        """Around what can be done only together: ``RankLost`` when it is not done in time, or fails on any rank."""
        self.check()
        limit = timeout_s or self._timeout_s
        self._deadline = time.monotonic() + limit, limit
        try:
            yield
        except (RuntimeError, MemoryError, TimeoutError, BrokenPipeError, ConnectionResetError) as error:
            self._lost.wait(_REASON_S)  # the other rank may say more than a broken connection does
            self.fail(f"rank 0: {error}")
            raise self._error() from error
        except BaseException:
            self.fail("a step was interrupted on rank 0")
            raise
        finally:
            self._deadline = None

    def check(self) -> None:
        if self._failure is not None:
            raise self._error()

    def fail(self, reason: str) -> None:
        """The first reason counts. Ends every other rank."""
        with self._lock:
            if self._failure is not None or self._closed:
                return
            self._failure = reason
        self._lost.set()
        for member in self._members:
            member.process.kill()
        self.release()

    def close(self) -> None:
        """Let the others end, and wait for it. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with suppress(OSError):  # it is gone already
            self.tell(Kind.CLOSE)
        deadline = time.monotonic() + _CLOSE_S
        for member in self._members:
            try:
                member.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        self._watcher.join()
        for member in self._members:
            member.line.close()
        self._failure = self._failure or "it was closed"

    def release(self) -> threading.Thread:
        """Abort what the device does with the others. On a thread: NCCL waits for every graph that it is part of."""
        releasing = threading.Thread(target=self._abort, name="abort", daemon=True)
        releasing.start()
        return releasing

    def _error(self) -> RankLost:
        return RankLost(f"this engine is over, and needs to be loaded again: {self._failure}")

    def _watch(self) -> None:
        """Until the end: what the others say, that they are gone, and the clock."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(member.line, selectors.EVENT_READ, member)
            while not self._closed and self._failure is None:
                for key, _ in selector.select(_TICK_S):
                    self._listen(key.data)
                deadline = self._deadline
                if deadline is not None and time.monotonic() > deadline[0]:
                    self.fail(f"the ranks were not done within {deadline[1]:g} s")

    def _listen(self, member: Member) -> None:
        """A rank has loaded, or has failed, or is gone."""
        try:
            word = receive_text(member.line)
        except (EOFError, OSError):
            self.fail(_end_of(member))
            return
        if word == READY:
            self._ready.add(member.rank)
        else:
            self.fail(f"rank {member.rank}: {word}")


def _end_of(member: Member) -> str:
    with suppress(subprocess.TimeoutExpired):
        return f"rank {member.rank} ended with exit code {member.process.wait(_REASON_S)}"
    return f"rank {member.rank} hung up"
