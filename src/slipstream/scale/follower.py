"""Any other rank: it runs what rank 0 says, and knows nothing of requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from slipstream.engine.results import Pending
from slipstream.engine.runner import Runner
from slipstream.scale.line import Kind
from slipstream.scale.wire import Mirror

_MOST_AHEAD = 2  # steps in flight, as on rank 0


def follow(runner: Runner, messages: Iterable[list[int]]) -> None:
    """Run the steps that come, until rank 0 closes or the messages end. Results are dropped: rank 0 has the same."""
    mirror = Mirror()
    in_flight: deque[Pending] = deque()
    for kind, *numbers in messages:
        if kind == Kind.CLOSE:
            break
        if kind == Kind.WARMUP:
            runner.warmup()
            continue
        in_flight.append(runner.launch(mirror.read_plan(numbers)))
        if len(in_flight) > _MOST_AHEAD:
            in_flight.popleft().ticket.block()
    for pending in in_flight:  # rank 0 waits for its half of these
        pending.ticket.block()
