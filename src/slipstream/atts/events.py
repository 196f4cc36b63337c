"""What happens in a run, as typed events; and the append-only log from which a killed run goes on."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened to a chain. at_s: seconds since the run began, over all its sessions.

    wait_s, busy_s, where there are such: seconds that the chain waited for its turn, and that the work then took.
    """

    question: str
    sample: int
    turn: int
    at_s: float
    kind: ClassVar[str] = "event"

    def line(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"kind": self.kind} | fields)


@dataclass(frozen=True, kw_only=True)
class Drafted(Event):
    """The draft wrote a turn. logprob: sum over its tokens; entropy: their mean; None where not asked for."""

    kind = "drafted"
    ids: list[int]
    tokens: int
    finish: str
    logprob: float | None = None
    entropy: float | None = None
    wait_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Looped(Event):
    """The turn repeats itself; it is tested with an infinite score. repeated: share of its n-grams seen before."""

    kind = "looped"
    repeated: float


@dataclass(frozen=True, kw_only=True)
class Decided(Event):
    """A test. nll: the score (whatever score was configured), higher is more doubtful."""

    kind = "decided"
    number: int
    nll: float
    alpha: float
    p: float
    threshold: float
    rejected: bool
    scored: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limited(Event):
    """A rejected turn that the target does not take over: ``capacity`` (too many wait) or ``budget`` (it is spent)."""

    kind = "limited"
    reason: str


@dataclass(frozen=True, kw_only=True)
class TakenOver(Event):
    """The target wrote. retried: its first attempt was empty; tokens 0: so was the second."""

    kind = "taken_over"
    ids: list[int]
    tokens: int
    finish: str
    retried: bool = False
    wait_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """A stage (draft, score, take-over, text, log) failed for good. policy: what is done instead."""

    kind = "failed"
    stage: str
    what: str
    policy: str


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """A chain is over. reason: answer, stopped (ended without one), turns, tokens, settled, failed."""

    kind = "ended"
    reason: str
    answer: str | None = None
    correct: bool | None = None
    tests: int = 0


KINDS: dict[str, type[Event]] = {cls.kind: cls for cls in (Drafted, Looped, Decided, Limited, TakenOver, Failed, Ended)}


_BEGINNING = b'{"kind": "run"'


class LogFailed(OSError):
    """The log cannot be written (a full disk, say). The run stops: nothing is decided that is not on record."""


class Log:
    """JSON lines: a header that names the run, then its events in the order in which they happened.

    A line is handed to the operating system before what it says is acted on, so that a killed process loses nothing
    that was acted on; it is forced to the disk at most every ``fsync_s`` seconds, so that a machine that dies loses no
    more than that. A last line that was half written is dropped.

    path: None keeps nothing. header: what must be equal for a run to go on. Raises ``ValueError`` for a log that is
    there although ``resume`` is False, that belongs to another run, that another process writes to, or that has a line
    which is no event.
    """

    def __init__(
        self, path: str | Path | None, header: Mapping[str, Any], resume: bool = False, fsync_s: float = 1.0
    ) -> None:
        self.history: list[Event] = []
        self._fsync_s, self._synced = fsync_s, time.monotonic()
        self._file: int | None = None
        self._failed = False
        if path is None:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._size = self._taken_up(path, self._file, json.loads(json.dumps(dict(header))), resume)
            os.ftruncate(self._file, self._size)
            if not self._size:
                self._write(json.dumps({"kind": "run"} | dict(header)))
        except BaseException:
            os.close(self._file)
            raise

    def _taken_up(self, path: Path, file: int, header: dict[str, Any], resume: bool) -> int:
        """Bytes of a log that is there, read; it is this process' own while it lives."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is written by a run that goes on: wait for it, or choose another log") from None
        with open(file, "rb", closefd=False) as opened:  # closing another descriptor would give up the lock
            written = opened.read()
        if written and not resume:
            raise ValueError(f"{path} holds a run already: --resume goes on with it, or choose another log")
        return self._read(path, written, header) if written else 0

    def _read(self, path: Path, written: bytes, header: dict[str, Any]) -> int:
        whole = written[: written.rfind(b"\n") + 1]
        if not whole and not _BEGINNING.startswith(written[: len(_BEGINNING)]):
            raise ValueError(f"{path}, line 1: not the header of a run")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                kind = row.pop("kind")
                if number > 1:
                    self.history.append(KINDS[kind](**row))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not an event of a run ({error})") from None
            if number == 1:
                differ = [name for name in header | row if header.get(name) != row.get(name)]
                if kind != "run" or differ:
                    raise ValueError(
                        f"{path} belongs to another run: {', '.join(differ) or 'its header'} differ(s); "
                        "resume with the same settings, or choose another log"
                    )
        return len(whole)

    def append(self, event: Event) -> None:
        """Put an event on record. Raises :class:`LogFailed`; the log then ends with the event before, for good."""
        if self._failed:
            raise LogFailed("the log could not be written before")
        self._write(event.line())

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        line = memoryview(text.encode() + b"\n")
        try:
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            if time.monotonic() - self._synced >= self._fsync_s:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            self._failed = True
            os.ftruncate(self._file, self._size)
            raise LogFailed(error.errno, f"the log cannot be written: {error.strerror}") from error
        self._size += len(line)

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
