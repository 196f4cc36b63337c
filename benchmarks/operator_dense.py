"""What does each op of a dense decode step cost? Microseconds and GB/s on one GPU, at Qwen3-8B's shapes.

Every op runs many times inside one CUDA graph, over buffers that rotate through more memory than the L2 cache holds
where the op reads that much. Attention is compared with FlashInfer on the same pages, and with the reference before
anything is timed. *Glue* is what the norms, RoPE and SiLU add to the matrix products of a layer, measured in place.
A row that fails says so, in the table and in the JSON, and the others go on.

    PYTHONPATH=src python benchmarks/operator_dense.py --json benchmarks/results/h200/operator_dense.json
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from harness import Report, check, time_graph
from shapes import QWEN3_8B
from triton.errors import TritonError

from slipstream.kernels import launch, ops, reference, triton_decode

HIDDEN, INNER, VOCAB = QWEN3_8B["hidden_size"], QWEN3_8B["intermediate_size"], QWEN3_8B["vocab_size"]
NUM_Q, NUM_KV, DIM = QWEN3_8B["num_attention_heads"], QWEN3_8B["num_key_value_heads"], QWEN3_8B["head_dim"]
PAGE, EPS, SCALE = 64, QWEN3_8B["rms_norm_eps"], QWEN3_8B["head_dim"] ** -0.5
QKV = (NUM_Q + 2 * NUM_KV) * DIM
ATTENTION_POINTS = ((1, 1024), (1, 32768), (8, 32768), (32, 1024), (32, 16384))
SWEEP_POINTS = ((1, 1024), (32, 16384))
SWEEP = ((3, 2), (5, 2), (5, 3), (7, 1), (7, 2))  # (pipeline stages, programs per processor)
REPEATS = 48
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, OSError, TritonError)
DEVICE = torch.device("cuda")

options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}


class Rows:
    """Runs rows until the time is used up; each on its own."""

    def __init__(self, report: Report, limit_s: float) -> None:
        self.report, self.end = report, time.perf_counter() + limit_s

    def run(self, name: str, row: Callable[[], dict[str, Any]], **about: Any) -> dict[str, Any]:
        if time.perf_counter() > self.end:
            values: dict[str, Any] = {"error": "left out: no time"}
        else:
            try:
                values = row()
            except FAILURES as error:
                values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.report.point(name=name, **about, **values)
        return values


def microseconds(calls: list[Callable[[], Any]], repeats: int = REPEATS) -> float:
    """Per call, of ``repeats`` rounds through ``calls`` in one graph."""

    def work() -> None:
        for i in range(max(repeats, len(calls))):
            calls[i % len(calls)]()

    return 1e3 * time_graph(work, repeats=7, warmup=2).median_ms / max(repeats, len(calls))


def measured(calls: list[Callable[[], Any]], nbytes: float) -> dict[str, Any]:
    us = microseconds(calls)
    return {"us": us, "gb_per_s": nbytes / us / 1e3}


@contextmanager
def settings(module: Any, **values: Any) -> Iterator[None]:
    """Module constants, for the time of a row."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def rope_inputs(batch: int) -> tuple[Any, ...]:
    pages = torch.zeros((batch + 1, NUM_KV, PAGE, DIM), **options)
    angle = torch.rand((1024, DIM // 2), device=DEVICE)
    weight = torch.randn(DIM, **options)
    index = torch.arange(batch, device=DEVICE)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    return weight, weight, EPS, cos_sin, index, (index + 1) * PAGE, pages, pages.clone()


def elementwise(rows: Rows, batch: int) -> None:
    """The ops around the matrix products."""
    hidden = [torch.randn((batch, HIDDEN), **options) for _ in range(4)]
    gate_up = [torch.randn((batch, 2 * INNER), **options) for _ in range(4)]
    qkv = [torch.randn((batch, QKV), **options) for _ in range(4)]
    weight = torch.randn(HIDDEN, **options)
    rope = rope_inputs(batch)
    calls: dict[str, tuple[list[Callable[[], Any]], int]] = {
        "rms_norm": ([functools.partial(ops.rms_norm, x, weight, EPS) for x in hidden], 4 * HIDDEN),
        "add_rms_norm": ([functools.partial(ops.add_rms_norm, x, hidden[0], weight, EPS) for x in hidden], 8 * HIDDEN),
        "silu_mul": ([functools.partial(ops.silu_mul, x) for x in gate_up], 6 * INNER),
        "qk_norm_rope_store": ([functools.partial(ops.qk_norm_rope_store, x, *rope) for x in qkv], 4 * QKV),
    }
    for name, (work, nbytes) in calls.items():
        rows.run(name, functools.partial(measured, work, batch * nbytes), batch=batch)


def sampling(rows: Rows, batch: int) -> None:
    """Logits like a model's: a few tokens stand out."""
    logits = [torch.randn((batch, VOCAB), **options) * 2.5 for _ in range(3)]
    index = torch.arange(batch, device=DEVICE)

    def row(temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
        full = functools.partial(torch.full, (batch,), device=DEVICE)
        parameters = (full(temperature), full(top_k, dtype=torch.int32), full(top_p), full(0.0), index + 7, index)
        tokens, expected = ops.sample(logits[0], *parameters), reference.sample(logits[0], *parameters)
        agree = float((tokens == expected).float().mean())
        check(agree > 0.9, f"only {agree:.0%} of the tokens are the reference's")
        calls = [functools.partial(ops.sample, x, *parameters) for x in logits]
        return {**measured(calls, 2.0 * batch * VOCAB), "agree": agree}

    for name, args in {"greedy": (0.0, 0, 1.0), "plain": (1.0, 0, 1.0), "top_k_top_p": (0.6, 20, 0.95)}.items():
        rows.run(f"sample_{name}", functools.partial(row, *args), batch=batch)
    rows.run("sample_top_p", functools.partial(row, 1.0, 0, 0.9), batch=batch)


def glue(rows: Rows, batch: int, layers: int = 10) -> None:
    """Microseconds that a layer's four small kernels add between its four matrix products, launched both ways."""
    shapes = ((QKV, HIDDEN), (HIDDEN, NUM_Q * DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER))
    weights = [[torch.randn(shape, **options) * 0.02 for shape in shapes] for _ in range(layers)]
    x, weight, rope = torch.randn((batch, HIDDEN), **options), torch.randn(HIDDEN, **options), rope_inputs(batch)
    inner, attended = torch.randn((batch, INNER), **options), torch.randn((batch, NUM_Q * DIM), **options)

    def products() -> None:
        for qkv, output, gate_up, down in weights:
            F.linear(x, qkv), F.linear(attended, output), F.linear(x, gate_up), F.linear(inner, down)

    def layer_by_layer() -> None:
        normed, residual = x, x
        for qkv, output, gate_up, down in weights:
            q = ops.qk_norm_rope_store(F.linear(normed, qkv), *rope)
            normed, residual = ops.add_rms_norm(F.linear(q.flatten(1), output), residual, weight, EPS)
            mixed = F.linear(ops.silu_mul(F.linear(normed, gate_up)), down)
            normed, residual = ops.add_rms_norm(mixed, residual, weight, EPS)

    def row(programmatic: bool) -> dict[str, Any]:
        with settings(launch, PROGRAMMATIC_LAUNCH=programmatic):
            bare, full = (1e3 * time_graph(work, 11).median_ms / layers for work in (products, layer_by_layer))
        return {"us": full - bare, "products_us": bare, "ratio": full / bare}

    for programmatic in (True, False):
        rows.run("glue_of_a_layer", functools.partial(row, programmatic), batch=batch, programmatic=programmatic)


class Cache:
    """Pages of enough layers to leave the L2 cache behind, and what both kernels need to read them."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        count = -(-context // PAGE)
        self.nbytes = 4.0 * batch * context * NUM_KV * DIM
        self.layers = int(max(2, min(36, 400e6 // self.nbytes)))
        shape = (self.layers, batch * count + 1, NUM_KV, PAGE, DIM)
        self.k, self.v = (torch.empty(shape, **options).normal_() for _ in range(2))
        self.q = torch.randn((batch, NUM_Q, DIM), **options)
        self.table = (torch.randperm(batch * count, device=DEVICE).view(batch, count) + 1).int()
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)

    def expected(self) -> torch.Tensor:
        return reference.decode_attention(self.q, self.k[0], self.v[0], self.table, self.lengths, SCALE)

    def ours(self, layer: int) -> torch.Tensor:
        return ops.decode_attention(self.q, self.k[layer], self.v[layer], self.table, self.lengths, SCALE)

    def flashinfer(self, tensor_cores: bool) -> Callable[[int], torch.Tensor]:
        import flashinfer

        pages = self.table.shape[1]
        device = {"dtype": torch.int32, "device": DEVICE}
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE),
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.zeros(self.batch + 1, **device),
            paged_kv_indices_buffer=torch.zeros(self.batch * pages, **device),
            paged_kv_last_page_len_buffer=torch.zeros(self.batch, **device),
            backend="fa2" if tensor_cores else "auto",
        )
        indptr = torch.arange(self.batch + 1, dtype=torch.int32) * pages
        last = torch.full((self.batch,), (self.context - 1) % PAGE + 1, dtype=torch.int32)
        wrapper.plan(
            indptr, self.table.flatten(), last, NUM_Q, NUM_KV, DIM, PAGE, q_data_type=torch.bfloat16, sm_scale=SCALE
        )
        return lambda layer: wrapper.run(self.q, (self.k[layer], self.v[layer]))

    def time(self, attend: Callable[[int], torch.Tensor]) -> dict[str, Any]:
        error = float((attend(0).float() - self.expected().float()).abs().max())
        check(error < 0.02, f"differs from the reference by {error}")
        calls = [functools.partial(attend, layer) for layer in range(self.layers)]
        us = microseconds(calls, repeats=max(self.layers, min(REPEATS, int(8e9 / self.nbytes))))
        return {"us": us, "gb_per_s": self.nbytes / us / 1e3, "max_difference": error}


def attention(rows: Rows, arm: str, batch: int, context: int, **about: Any) -> float | None:
    def row() -> dict[str, Any]:
        torch.cuda.empty_cache()
        cache = Cache(batch, context)
        attend = cache.ours if arm == "ours" else cache.flashinfer(arm.endswith("tensor_cores"))
        return cache.time(attend)

    found = rows.run("decode_attention", row, arm=arm, batch=batch, context=context, **about)
    return found.get("us")


def prefill(rows: Rows, tokens: int, context: int) -> None:
    """One chunk of ``tokens`` at the end of ``context``."""

    def row() -> dict[str, Any]:
        cache = Cache(1, context)
        q = torch.randn((tokens, NUM_Q, DIM), **options)
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
        args = (q, cache.k[0], cache.v[0], cache.table, starts, cache.lengths, SCALE, tokens)
        error = float((ops.prefill_attention(*args).float() - reference.prefill_attention(*args).float()).abs().max())
        check(error < 0.02, f"differs from the reference by {error}")
        us = microseconds([lambda: ops.prefill_attention(*args)], repeats=4)
        seen = tokens * (context - tokens) + tokens * (tokens + 1) / 2
        return {"us": us, "tflop_per_s": 4 * seen * NUM_Q * DIM / us / 1e6, "max_difference": error}

    rows.run("prefill_attention", row, tokens=tokens, context=context)


def compare(rows: Rows) -> None:
    """Ours beside FlashInfer's better arm at every point; the bar is 85 % of its bandwidth where bandwidth counts."""
    ours = {point: attention(rows, "ours", *point) for point in ATTENTION_POINTS}
    arms = ("flashinfer_tensor_cores", "flashinfer_cuda_cores")
    theirs = {point: [attention(rows, arm, *point) for arm in arms] for point in ATTENTION_POINTS}
    for point, us in ours.items():
        peers = [peer for peer in theirs[point] if peer is not None]
        if us is not None and peers:
            rows.report.bar("FlashInfer time / our time, {} x {}".format(*point), min(peers) / us, 0.85, ">=")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the JSON line here too")
    parser.add_argument("--limit-s", type=float, default=55.0, help="start no row after this many seconds")
    parser.add_argument("--sweep", action="store_true", help="also try other pipelines of decode_attention")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("operator_dense.py measures kernels of an NVIDIA GPU, and torch sees none")
    torch.manual_seed(0)
    report = Report("operator_dense")
    rows = Rows(report, chosen.limit_s)
    for batch in (1, 8, 32, 64):
        elementwise(rows, batch)
    for batch in (1, 32):
        glue(rows, batch)
    for batch in (1, 8, 32, 64):
        sampling(rows, batch)
    for tokens, context in ((2048, 2048), (2048, 16384)):
        prefill(rows, tokens, context)
    if chosen.sweep:
        for stages, programs in SWEEP:
            with settings(triton_decode, STAGES=stages, PROGRAMS_PER_PROCESSOR=programs):
                for point in SWEEP_POINTS:
                    attention(rows, "ours", *point, stages=stages, programs=programs)
    compare(rows)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
