"""Recorded queries and keys of whole chains: what predictors are compared on, and what ``mlp`` learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.types import SamplingParams


@dataclass
class QueryTrace:
    """One chain's queries and keys after norm and RoPE, by layer; token ``t`` is at position ``t``.

    q: L tensors [T, Hq, D]; k: L tensors [T, Hk, D]; start: the first position whose query a decode step would make.
    """

    q: list[Tensor]
    k: list[Tensor]
    start: int

    @property
    def num_tokens(self) -> int:
        return len(self.q[0])


class _Recorder:
    """What ``SparseBackend.record`` shows prompt tokens to, as it does to a calibration."""

    def __init__(self, num_layers: int) -> None:
        self.num_tokens = 0
        self.rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]

    def observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        self.rows[layer].append((q.clone(), k.clone()))


def record(llm: Any, ids: Sequence[int], start: int) -> QueryTrace:
    """The trace of a chain that is known: its tokens run through the model as one prompt, so attention is exact.

    llm: an ``LLM`` with a method that selects, whichever (``attention="window"``), and ``prefix_cache=False``: tokens
    that are in the cache would not be seen. ids: prompt and chain; those from ``start`` on count as decoded.
    """
    observe = getattr(llm.engine.backend, "record", None)
    if observe is None or llm.options.prefix_cache:
        raise ValueError("queries are recorded with attention='window' (or another that selects), prefix_cache=False")
    recorder = _Recorder(llm.spec.num_layers)
    observe(recorder)
    try:
        llm.generate({"prompt_token_ids": list(ids)}, SamplingParams(temperature=0, max_tokens=1))
    finally:
        observe(None)
    q, k = ([torch.cat([row[i] for row in rows]) for rows in recorder.rows] for i in (0, 1))
    assert len(q[0]) == len(ids), "part of the prompt was not computed"
    return QueryTrace(q, k, start)
