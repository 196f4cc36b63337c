"""Decode timings of an ``LLM``: random prompts of one length, then steps in which every chain decodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.engine.request import Request
from slipstream.llm import LLM
from slipstream.types import SamplingParams


@dataclass(frozen=True)
class DecodeTimes:
    """Seconds between consecutive decode steps, the host's work in each (ms), and the prefill before them."""

    steps_s: list[float]
    host_ms: list[float]
    prefill_s: float
    graph_replays: int

    @property
    def tpot_ms(self) -> float:
        return 1e3 * statistics.median(self.steps_s)


def random_prompts(vocab_size: int, batch: int, length: int, seed: int) -> list[list[int]]:
    """``batch`` prompts that share nothing, so that no KV is reused between them."""
    rng = np.random.default_rng([seed, batch, length])
    return [rng.integers(0, vocab_size, length).tolist() for _ in range(batch)]


def decode_times(llm: LLM, batch: int, context: int, steps: int, *, seed: int = 0, warmup: int = 8) -> DecodeTimes:
    """Time ``steps`` decode steps of ``batch`` chains, the first of them at ``context`` tokens of KV.

    Every step decodes all chains: this is asserted. The requests are cancelled at the end and their pages freed.
    """
    engine = llm.engine
    # one token comes from the prefill, `warmup` steps follow untimed
    prompt_length = max(1, context - warmup - 1)
    # chains that are prefilled first decode while the others are prefilled, at most one token per prefill step
    ahead = batch * (2 + prompt_length // llm.options.max_batch_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=ahead + warmup + steps + 4, ignore_eos=True)
    prompts = random_prompts(llm.spec.vocab_size, batch, prompt_length, seed)
    requests = [Request(prompt, params) for prompt in prompts]
    before = engine.stats()
    start = time.perf_counter()
    try:
        for request in requests:
            engine.add(request)
        begun: set[Request] = set()
        while len(begun) < batch:
            begun |= {event.request for event in engine.step() if event.delta is not None}
        prefill_s = time.perf_counter() - start
        for _ in range(warmup):
            engine.step()
        times, host = [], []
        last = time.perf_counter()
        for _ in range(steps):
            news = engine.step()
            now = time.perf_counter()
            assert sum(event.delta is not None for event in news) == batch, "a chain did not decode in a timed step"
            times.append(now - last)
            host.append(engine.stats()["host_ms_last"])
            last = now
    finally:
        for request in requests:
            engine.cancel(request.request_id)
        while engine.has_work():
            engine.step()
    return DecodeTimes(times, host, prefill_s, int(engine.stats()["graph_replays"] - before["graph_replays"]))


def decode_grid(llm: LLM, batches: Sequence[int], contexts: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """One row per point: TPOT percentiles in ms, tokens/s, host time per step. Points that cannot fit are refused."""
    rows = []
    for context in contexts:
        for batch in batches:
            if context + steps + 16 > llm.spec.max_position:
                raise ValueError(
                    f"context {context} and {steps} steps do not fit max_model_len {llm.spec.max_position}"
                )
            if batch > llm.options.max_num_seqs:
                raise ValueError(f"batch {batch} exceeds max_num_seqs {llm.options.max_num_seqs}")
            if batch * (context + steps + 2 * llm.options.page_size) > llm.memory.num_tokens:
                raise ValueError(f"batch {batch} x context {context} does not fit the KV cache: {llm.memory}")
            found = decode_times(llm, batch, context, steps)
            ordered = sorted(found.steps_s)
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "tpot_p50_ms": 1e3 * statistics.median(ordered),
                    "tpot_p99_ms": 1e3 * ordered[round(0.99 * (len(ordered) - 1))],
                    "tokens_per_s": batch / statistics.median(ordered),
                    "host_ms": statistics.median(found.host_ms),
                    "prefill_s": found.prefill_s,
                }
            )
    return rows
