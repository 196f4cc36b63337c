"""Where the work ahead of a step runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from slipstream.overlap import CAPTURES, InlineLane, Lane, PeerLane, StreamLane, ThreadLane


def make_lane(kind: str, device: torch.device, priority: int = 0) -> Lane:
    """priority: of a stream; the step's own has -1, lower numbers go first. ``ValueError`` for a lane that the device
    does not have."""
    on_cuda = device.type == "cuda"
    if kind == "auto":
        kind = "stream" if on_cuda else "inline"
    if kind == "stream" and not on_cuda:
        raise ValueError(f"lane='stream' needs an NVIDIA GPU; this engine runs on {device}: use 'inline' or 'thread'")
    if kind == "thread" and on_cuda:
        raise ValueError("lane='thread' cannot be part of a captured step: use 'stream' on a GPU")
    if kind == "stream":
        return StreamLane(device, priority)
    return ThreadLane("asyncspade") if kind == "thread" else InlineLane()


def inferring(work: Callable[..., Any], *args: Any) -> Any:
    """``work`` without gradients, which is each thread's own setting."""
    with torch.inference_mode():
        return work(*args)


class FarLanes(NamedTuple):
    """Where the three parts of an exchange with another device run: what goes there, its work, what comes back.

    They are three so that the next part of the layers travels while the one before is worked on.
    """

    out: Lane
    work: Lane
    back: Lane

    @classmethod
    def between(cls, near: torch.device, far: torch.device) -> FarLanes:
        if near.type != "cuda":
            return cls(InlineLane(), InlineLane(), InlineLane())
        return cls(PeerLane(near, far), StreamLane(far), PeerLane(near, far))


class Recorded:
    """Work over static tensors of one device: done as it is the first time, recorded the second, and then replayed.

    On CUDA a record is a graph; elsewhere it is the work as it was told the second time, called again. Both keep alive
    what the work made and held. All graphs share a pool of memory, and one stream may replay them.
    """

    def __init__(self, device: torch.device) -> None:
        self._records: dict[Hashable, Callable[[], object] | None] = {}
        self._keep: list[Callable[[], object]] = []
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream, self._beside = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Callable[[], object]) -> None:
        if key not in self._records:
            self._records[key] = None
            work()
            return
        record = self._records[key]
        if record is None:
            record = self._records[key] = self._record(work)
        record()

    def _record(self, work: Callable[[], object]) -> Callable[[], object]:
        self._keep.append(work)
        if not self._is_cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        scope = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        with CAPTURES, scope:
            work()
        return graph.replay

    def in_turns(self, pieces: Sequence[Callable[[], object]]) -> None:
        """Pieces that do not know of each other, on two streams in turns: one fills the gaps that the other leaves."""
        if not self._is_cuda:
            for piece in pieces:
                piece()
            return
        here = torch.cuda.current_stream()
        self._beside.wait_stream(here)
        for number, piece in enumerate(pieces):
            with torch.cuda.stream(self._beside if number % 2 else here):
                piece()
        here.wait_stream(self._beside)
