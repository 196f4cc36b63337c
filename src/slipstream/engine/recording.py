"""A step as CUDA graphs: one, or several with what the host does between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from slipstream.overlap import CAPTURES

_ERRORS = "thread_local"  # a capture is broken by what its own thread does, not by others


class Recording:
    """What is launched within ``with`` is captured. :meth:`between` (``Batch.between``) cuts the capture in two.

    parts: what to call, in order, for each run of the step: replays of graphs, and the host's work between them. All
    graphs share a memory pool, so what one of them leaves for a later one stays where it is while Python refers to it.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream | None) -> None:
        self.parts: list[Callable[[], object]] = []
        self._pool = pool
        self._scope = torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, stream=stream, capture_error_mode=_ERRORS)

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(CAPTURES)
            stack.enter_context(self._scope)
            self._leave = stack.pop_all().__exit__

    def __exit__(self, *error: Any) -> None:
        self._leave(*error)
        self.parts.append(self._scope.cuda_graph.replay)

    def between(self, work: Callable[[], object]) -> None:
        """``work`` is not called now. Whatever was forked from the captured stream must have joined it."""
        self._scope.cuda_graph.capture_end()
        self.parts += [self._scope.cuda_graph.replay, work]
        self._scope.cuda_graph = torch.cuda.CUDAGraph()
        self._scope.cuda_graph.capture_begin(pool=self._pool, capture_error_mode=_ERRORS)
