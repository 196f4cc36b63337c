"""Recorded queries and keys of whole chains: what predictors are compared on, and what ``mlp`` learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slipstream.types import SamplingParams


@dataclass
class QueryTrace:
    """One chain's queries and keys after norm and RoPE, by layer; token ``t`` is at position ``t``.

    q: L tensors [T, Hq, D]; k: L tensors [T, Hk, D]; start: the first position whose query a decode step would make.
    foreseen: as q, each layer's queries as they are foreseen in the layer below; the first layer's are the true ones.
    """

    q: list[Tensor]
    k: list[Tensor]
    start: int
    foreseen: list[Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.q[0])


class _Recorder:
    """What ``SparseBackend.record`` shows prompt tokens to, and the model the residual stream."""

    def __init__(self, num_layers: int, foresight: Any) -> None:
        self.num_tokens, self._foresight = 0, foresight
        self.rows: list[list[tuple[Tensor, ...]]] = [[] for _ in range(num_layers)]
        self._foreseen: list[Tensor] = []

    def observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        foreseen = self._foreseen.pop() if layer else q
        self.rows[layer].append((q.clone(), k.clone(), foreseen.clone()))

    def foresee(self, layer: int, residual: Tensor) -> None:
        if layer + 1 < len(self.rows):
            first = sum(len(q) for q, *_ in self.rows[layer]) - len(residual)
            positions = torch.arange(first, first + len(residual), device=residual.device)
            self._foreseen.append(self._foresight(layer + 1, residual, positions))


def record(llm: Any, ids: Sequence[int], start: int) -> QueryTrace:
    """The trace of a chain that is known: its tokens run through the model as one prompt, so attention is exact.

    llm: an ``LLM`` with a method that selects, whichever (``attention="window"``), and ``prefix_cache=False``: tokens
    that are in the cache would not be seen. ids: prompt and chain; those from ``start`` on count as decoded.
    """
    observe = getattr(llm.engine.backend, "record", None)
    if observe is None or llm.options.prefix_cache:
        raise ValueError("queries are recorded with attention='window' (or another that selects), prefix_cache=False")
    backend = llm.engine.backend
    recorder = _Recorder(llm.spec.num_layers, llm.model.foresight())
    observe(recorder)
    backend.foresee = recorder.foresee
    try:
        llm.generate({"prompt_token_ids": list(ids)}, SamplingParams(temperature=0, max_tokens=1))
    finally:
        observe(None)
        del backend.foresee
    q, k, foreseen = ([torch.cat([row[i] for row in rows]) for rows in recorder.rows] for i in range(3))
    assert len(q[0]) == len(ids), "part of the prompt was not computed"
    return QueryTrace(q, k, start, foreseen)
