"""Decode timings of an ``LLM``: random prompts of one length, then steps in which every chain decodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.attention import crossover
from slipstream.attention.sparse import SparseBackend
from slipstream.build import method_of, parse_attention
from slipstream.engine.request import Request
from slipstream.llm import LLM
from slipstream.selection.selector import Budgeted
from slipstream.selection.two_level import TwoLevel
from slipstream.types import SamplingParams

CROSSOVER_RATIO = 1.12  # how close a bisection comes
LONGEST = {"cpu": 4096, "cuda": 131072}


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


def decode_times(
    llm: LLM, batch: int, context: int, steps: int, *, seed: int = 0, warmup: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
) -> DecodeTimes:  # fmt: skip
    """Time ``steps`` decode steps of ``batch`` chains, the first of them at ``context`` tokens of KV.

    prompts: at least ``batch`` of ``context`` tokens, cut to what is needed; by default random ones. Every step decodes
    all chains: this is asserted. The requests are cancelled at the end and their pages freed.
    """
    engine, before = llm.engine, llm.engine.stats()
    times, host = [], []
    with decoding(llm, batch, context, steps, seed=seed, warmup=warmup, prompts=prompts) as prefill_s:
        last = time.perf_counter()
        for _ in range(steps):
            news = engine.step()
            now = time.perf_counter()
            assert sum(event.delta is not None for event in news) == batch, "a chain did not decode in a timed step"
            times.append(now - last)
            host.append(engine.stats()["host_ms_last"])
            last = now
    return DecodeTimes(times, host, prefill_s, int(engine.stats()["graph_replays"] - before["graph_replays"]))


@contextmanager
def decoding(
    llm: LLM, batch: int, context: int, steps: int, *, seed: int = 0, warmup: int = 8,
    prompts: Sequence[Sequence[int]] | None = None,
) -> Iterator[float]:  # fmt: skip
    """``batch`` chains of which the next ``steps`` engine steps decode a token each; the prefill's seconds.

    They have ``context`` tokens of KV in the first of these steps. At the end they are cancelled and their pages freed.
    """
    engine = llm.engine
    # one token comes from the prefill, `warmup` steps follow untimed
    prompt_length = max(1, context - warmup - 1)
    # chains that are prefilled first decode while the others are prefilled, at most one token per prefill step
    ahead = batch * (2 + prompt_length // llm.options.max_batch_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=ahead + warmup + steps + 4, ignore_eos=True)
    if prompts is None:
        prompts = random_prompts(llm.spec.vocab_size, batch, prompt_length, seed)
    requests = [Request(prompt[:prompt_length], params) for prompt in prompts[:batch]]
    start = time.perf_counter()
    try:
        for request in requests:
            engine.add(request)
        begun: set[Request] = set()
        while len(begun) < batch:
            news = engine.step()
            begun |= {event.request for event in news if event.delta is not None}
            for event in news:
                if event.request.error is not None:
                    raise event.request.error
        prefill_s = time.perf_counter() - start
        for _ in range(warmup):
            engine.step()
        yield prefill_s
    finally:
        for request in requests:
            engine.cancel(request.request_id)
        while engine.has_work():
            engine.step()


def decode_grid(llm: LLM, batches: Sequence[int], contexts: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """One row per point: TPOT percentiles in ms, tokens/s, host time per step. Points that cannot fit are refused."""
    rows = []
    for context in contexts:
        for batch in batches:
            if context + steps + 16 > llm.spec.max_position:
                raise ValueError(
                    f"context {context} and {steps} steps do not fit max_model_len {llm.spec.max_position}"
                )
            if batch > llm.engine.config.max_num_seqs:  # with KV on the host, what the device has room for
                raise ValueError(f"batch {batch} exceeds max_num_seqs {llm.engine.config.max_num_seqs}")
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


def offload_rows(
    make: Callable[[str | dict[str, Any]], LLM], options: Mapping[str, Any], batch: int, context: int, steps: int
) -> list[dict[str, Any]]:
    """Full attention, two_level, and asynctls with KV on the host: at one batch, and the last at its largest.

    make: an ``LLM`` with this attention. options: of asynctls. Per step: blocks that were missing, MiB to the device.
    """
    both = {name: value for name, value in options.items() if name in {f.name for f in fields(TwoLevel)}}
    arms: dict[str, str | dict[str, Any]] = {
        "full": "full", "two_level": {"method": "two_level", **both},
        "asynctls": {"method": "asynctls", **options, "offload": True},
    }  # fmt: skip
    rows = []
    for name, attention in arms.items():
        llm = make(attention)
        tokens = context + steps + 2 * llm.memory.page_size
        most = min(llm.engine.config.max_num_seqs, llm.memory.num_tokens // tokens)
        for size in dict.fromkeys((batch, most) if name == "asynctls" else (batch,)):
            if not 0 < size <= most:
                rows.append({"method": name, "batch": size, "context": context, "note": f"only {most} fit"})
                continue
            before = llm.stats()
            times = decode_times(llm, size, context, steps)
            after = llm.stats()
            counts = {key: after[key] - before[key] for key in after if key.startswith(("asynctls_", "sparse_steps"))}
            if name != "full" and counts["sparse_steps"] < steps:
                raise ValueError(f"{name} attends to all of {context} tokens: lower --budget, or raise --context")
            row = {
                "method": name, "batch": size, "context": context, "tpot_ms": times.tpot_ms,
                "tokens_per_s": 1e3 * size / times.tpot_ms, "prefill_s": times.prefill_s,
            }  # fmt: skip
            if name == "asynctls":
                row["turnover"] = after["asynctls_turnover"]
                row["misses_per_step"] = counts["asynctls_misses"] / counts["sparse_steps"]
                row["mib_in"], row["mib_out"] = (counts[f"asynctls_bytes_{way}"] / 2**20 for way in ("in", "out"))
                row["exposed_s"] = counts["asynctls_exposed_s"]
            rows.append(row)
        llm.close()
    return rows


def find_crossover(
    llm: LLM,
    batch: int,
    longest: int | None,
    steps: int,
    rows: list[dict[str, Any]],
    progress: Callable[[str], object] = lambda text: None,
) -> int | None:
    """The context length from which on a step of ``batch`` chains is faster sparse than dense; None up to ``longest``.

    Contexts double from twice the budget, then bisect; both ways run in one engine, whose gate is moved, over the same
    prompts, whose KV is reused. A row per point is added to ``rows``: the first quartile of the steps' times in ms, for
    noise only adds, and their ratio. Raises ``ValueError`` for a method without a gate and a length that does not fit.
    """
    backend = llm.engine.backend
    if not isinstance(backend, SparseBackend):
        raise ValueError("bench crossover needs a method that has min_context, e.g. --attention two_level")
    low = budget = _budget(llm)
    longest = _longest(llm, batch, longest, steps, 2 * budget)
    prompts = random_prompts(llm.spec.vocab_size, batch, longest, 0)

    def is_faster(context: int) -> bool:
        progress(f"batch {batch}, context {context}")
        times: dict[str, list[float]] = {"dense_ms": [], "sparse_ms": []}
        for _ in range(2):  # in turns: another process on the machine must not decide
            for name, gate in (("dense_ms", llm.spec.max_position), ("sparse_ms", budget)):
                backend.gate = gate
                before = llm.stats()["sparse_steps"]
                times[name] += decode_times(llm, batch, context, -(-steps // 2), warmup=4, prompts=prompts).steps_s
                assert (llm.stats()["sparse_steps"] > before) == (gate == budget), f"{name} was not what it says"
        ms = {name: 1e3 * statistics.quantiles(taken, n=4)[0] for name, taken in times.items()}
        rows.append({"batch": batch, "context": context, **ms, "speedup": ms["dense_ms"] / ms["sparse_ms"]})
        return ms["sparse_ms"] <= ms["dense_ms"]

    own_gate = backend.gate
    try:
        high = 2 * budget
        while not is_faster(high):
            if high == longest:
                return None
            low, high = high, min(2 * high, longest)
        while high > CROSSOVER_RATIO * low:
            middle = round((low * high) ** 0.5)
            low, high = (low, middle) if is_faster(middle) else (middle, high)
        return high
    finally:
        backend.gate = own_gate


def _longest(llm: LLM, batch: int, longest: int | None, steps: int, least: int) -> int:
    """The longest context to try: what was asked for, or what fits the engine and is reasonable on its device."""
    room = 2 * steps + 3 * llm.options.page_size
    fits = min(llm.spec.max_position, llm.memory.num_tokens // batch) - room
    chosen = min(LONGEST[llm.device.type], fits) if longest is None else longest
    if chosen > fits:
        raise ValueError(f"--longest {chosen} x batch {batch} does not fit: {fits} tokens do ({llm.memory})")
    if chosen < least:
        raise ValueError(f"contexts up to {chosen} are too short for this budget: at least {least} are needed")
    return chosen


def store_crossover(llm: LLM, tokens: int) -> Path:
    """Make ``tokens`` the default ``min_context`` of this method, budget and model shape on this machine."""
    method = method_of(parse_attention(llm.options.attention))
    return crossover.store(llm.device, llm.spec, method, _budget(llm), tokens)


def _budget(llm: LLM) -> int:
    config = parse_attention(llm.options.attention)
    assert isinstance(config, Budgeted), "a gated method has a budget"
    return config.budget
