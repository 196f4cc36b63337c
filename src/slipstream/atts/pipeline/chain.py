"""One reasoning chain: its tokens as both models read them, its past from the log, its place at the barriers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.atts.backends import Backend
from slipstream.atts.events import Event, Failed

DRAFT, TARGET = 0, 1
_STRETCH = 8  # tokens decoded again before new ones, so that their text does not depend on the cut
_HALF = "\ufffd"


class Context:
    """What has been written, as token ids of the draft and of the target, and as text.

    With one vocabulary both are one list. With two, what one writes is encoded anew for the other - only the new text,
    behind what is there - and the first tokens of half a character at the end of a turn are given back (a model
    writes them again).
    """

    def __init__(self, backends: Sequence[Backend], prompts: Sequence[Sequence[int]]) -> None:
        self._backends = backends
        self.shared = backends[DRAFT].vocabulary == backends[TARGET].vocabulary
        first = list(prompts[DRAFT])
        self.ids = [first, first if self.shared else list(prompts[TARGET])]
        self._settled = [len(ids) for ids in self.ids]  # tokens whose text is in ``text``
        self._begin = list(self._settled)
        self.text = ""

    @property
    def length(self) -> int:
        return max(len(ids) for ids in self.ids)

    async def push(self, side: int, ids: Sequence[int]) -> None:
        """``side`` has written ``ids``."""
        own, backend = self.ids[side], self._backends[side]
        start = self._settled[side]
        own += ids
        stretch = max(self._begin[side], start - _STRETCH)
        before = await backend.decode(own[stretch:start])
        now, end = await backend.decode(own[stretch:]), len(own)
        if not self.shared:
            while now.endswith(_HALF) and end > start and len(own) - end < 4:
                end -= 1
                now = await backend.decode(own[stretch:end])
            del own[end:]
        if now.endswith(_HALF) and self.shared:
            return
        self._settled[side] = len(own)
        piece = now[len(before) :]
        self.text += piece
        if self.shared:
            self._settled[1 - side] = len(own)
        elif piece:
            self.ids[1 - side] += await self._backends[1 - side].encode(piece)
            self._settled[1 - side] = len(self.ids[1 - side])

    def mark(self) -> tuple[int, ...]:
        """Where we are, for :meth:`reset`; entry ``side`` is the length in tokens."""
        return (*map(len, self.ids), *self._settled, len(self.text))

    def reset(self, mark: tuple[int, ...]) -> None:
        """Forget what was written since."""
        for side in (DRAFT, TARGET):
            del self.ids[side][mark[side] :]
        self._settled, self.text = list(mark[2:4]), self.text[: mark[4]]


class Gate:
    """The barrier of the synchronous twin: nobody goes on before everybody who is left has arrived."""

    def __init__(self, parties: int) -> None:
        self._parties, self._waiting = parties, 0
        self._opened: asyncio.Future[None] | None = None

    async def arrive(self) -> None:
        self._waiting += 1
        if self._opened is None:
            self._opened = asyncio.get_running_loop().create_future()
        opened = self._opened
        self._open_if_complete()
        try:
            await asyncio.shield(opened)
        except asyncio.CancelledError:
            self._waiting -= not opened.done()
            raise

    def leave(self) -> None:
        self._parties -= 1
        self._open_if_complete()

    def _open_if_complete(self) -> None:
        if self._opened is not None and self._waiting >= self._parties:
            self._opened.set_result(None)
            self._opened, self._waiting = None, 0


class Together:
    """Whoever comes waits until ``size`` do, or until ``is_over()``: asked when somebody comes, and by :meth:`look`."""

    def __init__(self, size: int, is_over: Callable[[], bool]) -> None:
        self._size, self._is_over = size, is_over
        self._waiting: list[asyncio.Future[None]] = []

    async def join(self) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self.look()
        try:
            await place
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    def look(self) -> None:
        if len(self._waiting) >= self._size or self._is_over():
            let, self._waiting = self._waiting, []
            for place in let:
                if not place.done():
                    place.set_result(None)


@dataclass(eq=False)
class Chain:
    """One sample of one question. past: what the log knows of it, by (turn, kind), or (turn, stage) for failures."""

    question: str
    sample: int
    context: Context | None = None
    turn: int = 0
    tests: int = 0
    gate: Gate | None = None
    task: asyncio.Task[Any] | None = None
    past: dict[tuple[int, str], Any] = field(default_factory=dict)

    def remember(self, event: Event) -> None:
        self.past[event.turn, event.stage if isinstance(event, Failed) else event.kind] = event

    def recall(self, what: str) -> Any:
        """The event of this turn that an earlier session put on record; None when there is none."""
        return self.past.pop((self.turn, what), None)

    def seed(self, run_seed: int, stage: str, attempt: int = 0) -> int:
        """Of the text that is written now: the same in every schedule, session and order."""
        words = f"{run_seed}/{self.question}/{self.sample}/{self.turn}/{stage}/{attempt}"
        return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())


def repeated_share(ids: Sequence[int], ngram: int) -> float:
    """Share of a turn's n-grams that it held before: near 1 in a repetition loop."""
    grams = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if ngram and grams else 0.0
