"""An event loop whose time is virtual: it jumps to the next timer instead of sleeping. Same work, same order."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Reports what is ready at once, and adds the time that would have been slept to ``slept_s``."""

    slept_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits and no timer is set: the run is stuck")
        self.slept_s += 0.0 if ready else max(0.0, timeout or 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """For simulated models, which ``await asyncio.sleep(seconds)``: an hour of theirs takes a moment."""

    def __init__(self) -> None:
        self._virtual = _NoWaiting()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.slept_s


def run_virtual(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Run to the end on a virtual clock: the result, and the seconds it would have taken."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work), runner.get_loop().time()
