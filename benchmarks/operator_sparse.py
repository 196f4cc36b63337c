"""What does one layer's attention cost when it chooses its tokens? Score, select, attend and total, against FlashInfer.

One layer of Qwen3-8B's shapes (32 query and 8 KV heads of 128, bf16), one query token per request, random keys. Every
arm is one captured CUDA graph that walks over ``LAYERS`` layers with keys and an index of their own, so that no arm
finds its data in the L2 cache; times are per layer. *total* is the product's own backend: the index grows by the newest
token, a selection is made, the selection is attended. *score*, *select* and *attend* are those ops alone, each captured
likewise; *indexing* is a step in which every request fills a page, which total counts as often as that happens. The
peer is FlashInfer's paged decode on the same pages, the faster of its two kernels. The floor is what the
method must read (summaries, labels of the candidates, chosen K and V) over the read bandwidth measured in the same run.

    PYTHONPATH=src python benchmarks/operator_sparse.py --json benchmarks/results/h200/operator_sparse.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Report, check, time_graph
from shapes import QWEN3_8B

from slipstream.attention.dense import DenseBackend
from slipstream.attention.sparse import DENSE, INDEXING, SPARSE, SparseBackend
from slipstream.build import parse_attention
from slipstream.kernels import ops, reference_select, sparse, triton_logits, triton_peaks
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

LAYERS, PAGE, LONGEST, MOST_REQUESTS = 6, 64, 1 << 17, 8
DEVICE = torch.device("cuda")
SPEC = ModelSpec(
    architecture="Qwen3ForCausalLM",
    num_layers=LAYERS,
    hidden_size=QWEN3_8B["hidden_size"],
    num_heads=QWEN3_8B["num_attention_heads"],
    num_kv_heads=QWEN3_8B["num_key_value_heads"],
    head_dim=QWEN3_8B["head_dim"],
    vocab_size=QWEN3_8B["vocab_size"],
    max_position=LONGEST,
    dtype=torch.bfloat16,
)
POOL_TOKENS = MOST_REQUESTS * LONGEST
TOLERANCE = 0.01


def per_layer_us(work: Callable[[int], Any]) -> float:
    """Microseconds of ``work(layer)``, as one graph over all layers."""

    def all_layers() -> None:
        for layer in range(LAYERS):
            work(layer)

    return 1e3 * time_graph(all_layers, repeats=12, warmup=2).median_ms / LAYERS


def read_bandwidth() -> float:
    """Bytes per second of a reduction over 8 GB."""
    x = torch.empty(2 << 30, dtype=torch.float32, device=DEVICE).normal_()
    return x.numel() * 4 / (time_graph(lambda: x.sum(), repeats=10).median_ms / 1e3)


def make_batch(batch: int, context: int, columns: int, variant: int) -> Batch:
    """A decode step over pages scattered through the pool; tables as wide as a captured step's."""
    pages = torch.randperm(POOL_TOKENS // PAGE, device=DEVICE)[: batch * (context // PAGE)] + 1
    table = torch.zeros((batch, columns), dtype=torch.int32, device=DEVICE)
    table[:, : context // PAGE] = pages.view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(batch, device=DEVICE)
    last = table[:, context // PAGE - 1].long()
    return Batch(
        tokens=rows,
        positions=(lengths - 1).long(),
        slots=last * PAGE + PAGE - 1,
        page_table=table,
        lengths=lengths,
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=DEVICE),
        logit_rows=rows,
        seats=rows + 1,
        lengths_host=[context] * batch,
        query_start_host=list(range(batch + 1)),
        pages_host=[[1]] * batch,
        num_decodes=batch,
        variant=variant,
        graph_key=(batch, variant),
    )


class Peer:
    """FlashInfer's paged decode, planned as its documentation says; the faster of its two kernels."""

    def __init__(self, pool: KVPool) -> None:
        import flashinfer

        self.pool, self.workspace = pool, torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.make = flashinfer.BatchDecodeWithPagedKVCacheWrapper

    def time(self, step: Batch, q: torch.Tensor) -> tuple[float, torch.Tensor]:
        batch, context = step.num_requests, step.lengths_host[0]
        pages = step.page_table[:, : context // PAGE].reshape(-1).contiguous()
        best, out = float("inf"), torch.empty_like(q[0])
        for tensor_cores in (True, False):
            wrapper = self.make(
                self.workspace, "HND", use_cuda_graph=True, use_tensor_cores=tensor_cores,
                paged_kv_indptr_buffer=torch.empty(batch + 1, dtype=torch.int32, device=DEVICE),
                paged_kv_indices_buffer=torch.empty_like(pages),
                paged_kv_last_page_len_buffer=torch.empty(batch, dtype=torch.int32, device=DEVICE),
            )  # fmt: skip
            wrapper.plan(
                torch.arange(batch + 1, dtype=torch.int32) * (context // PAGE), pages,
                torch.full((batch,), PAGE, dtype=torch.int32), SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, PAGE,
                q_data_type=SPEC.dtype, kv_data_type=SPEC.dtype,
            )  # fmt: skip
            run = wrapper.run
            us = per_layer_us(lambda layer, run=run: run(q[layer], (self.pool.k[layer], self.pool.v[layer])))
            if us < best:
                best, out = us, wrapper.run(q[0], (self.pool.k[0], self.pool.v[0]))
        return best, out


class Arm:
    """One method at one budget: its index over the whole pool, and its backend as the engine has it."""

    def __init__(self, pool: KVPool, method: str, budget: int, **options: Any) -> None:
        self.pool = pool
        config = parse_attention({"method": method, "budget": budget, "dense_layers": 0, **options})
        self.config = config.for_model(SPEC)
        self.index = KeyIndex(pool, self.config.index) if self.config.index is not None else None
        if self.index is not None:
            self.fill_index()
        self.selector = self.config.selector(pool, SPEC, self.index)
        self.backend = SparseBackend(
            pool, SPEC, self.index, self.selector, DenseBackend(pool, SPEC), budget, unread=self.config.unread
        )

    def fill_index(self) -> None:
        """As if every page of the pool had been prefilled."""
        table = torch.arange(1, POOL_TOKENS // PAGE + 1, dtype=torch.int32, device=DEVICE).view(MOST_REQUESTS, -1)
        start = torch.arange(MOST_REQUESTS + 1, dtype=torch.int32, device=DEVICE) * LONGEST
        lengths = torch.full((MOST_REQUESTS,), LONGEST, dtype=torch.int32, device=DEVICE)
        for layer in range(LAYERS):
            self.index.extend(layer, self.pool.k[layer], table, start, lengths, LONGEST)

    def check(self, step: Batch, q: torch.Tensor) -> None:
        """The backend's output is softmax attention over a full selection of distinct tokens, the newest in it."""
        self.backend.plan(step)
        out = self.backend.attend(0, q[0])
        indices, counts, _ = self.selector.select(0, q[0])
        expected = min(self.config.budget, self.selector.attended(step.lengths_host[0]))
        check(bool((counts == expected).all()), f"counts {counts.unique().tolist()}, not {expected}")
        check(bool((indices.diff(dim=-1) > 0).all()), "a selection is not ascending")
        check(bool((indices[:, :, -1] == step.lengths_host[0] - 1).all()), "the newest token is not attended")
        host = [x.cpu() for x in (step.page_table, indices, counts)]
        used = step.page_table[:, : step.lengths_host[0] // PAGE].unique().cpu().long()
        place = torch.zeros(POOL_TOKENS // PAGE + 1, dtype=torch.int32)
        place[used] = torch.arange(len(used), dtype=torch.int32)
        k, v = (x[0][used.to(DEVICE)].cpu().float() for x in (self.pool.k, self.pool.v))
        wanted = torch.zeros(q[0].shape)
        reference_select.sparse_attention(
            q[0].cpu().float(), k, v, place[host[0].long()], host[1], host[2], SPEC.scale, wanted
        )
        worst = float((out.cpu().float() - wanted).abs().max())
        check(worst < TOLERANCE, f"attention over the selection differs by {worst:.4f}")

    def times(self, step: Batch, q: torch.Tensor) -> dict[str, float]:
        found = {"plain_us": self.total_us(step, q)}
        if self.index is not None:
            # Every request fills a page, and so has it indexed, once in PAGE steps.
            indexing = replace(step, variant=SPARSE + INDEXING, graph_key=(step.num_requests, SPARSE + INDEXING))
            found["indexing_us"] = self.total_us(indexing, q)
            share = min(1.0, step.num_requests / PAGE)
            found["total_us"] = (1 - share) * found["plain_us"] + share * found["indexing_us"]
        else:
            found["total_us"] = found["plain_us"]
        stages = {"score_us": 0.0, "select_us": per_layer_us(lambda layer: self.selector.select(layer, q[layer]))}
        choices = [self.selector.select(layer, q[layer]) for layer in range(LAYERS)]
        out = torch.empty_like(q[0])

        def attend(layer: int) -> None:
            sparse.sparse_attention(
                q[layer], self.pool.k[layer], self.pool.v[layer], step.page_table, *choices[layer][:2], SPEC.scale, out
            )

        stages["score_us"] = self.score_us(step, q)
        stages["select_us"] -= stages["score_us"]
        stages["attend_us"] = per_layer_us(attend)
        return found | stages

    def total_us(self, step: Batch, q: torch.Tensor) -> float:
        self.backend.plan(step)
        return per_layer_us(lambda layer: self.backend.attend(layer, q[layer]))

    def score_us(self, step: Batch, q: torch.Tensor) -> float:
        """The ops that read the index: block scores, label logits."""
        own, index, total = self.config, self.index, 0.0
        if index is None:
            return total
        if index.parts.kind is not None:
            total += per_layer_us(
                lambda layer: sparse.score_blocks(
                    q[layer],
                    index.summaries(layer),
                    step.page_table,
                    step.lengths,
                    index.parts.kind,
                    getattr(own, "merge", 1),
                    SPEC.scale,
                    "max",
                    1.0,
                    index.parts.block,
                )  # fmt: skip
            )
        if index.parts.num_channels:
            blocks = None
            if hasattr(own, "blocks"):
                most = step.lengths_host[0] // own.block
                shape = (step.num_requests, SPEC.num_kv_heads, min(own.blocks, most))
                chosen = torch.rand((*shape[:2], most), device=DEVICE).argsort(-1)[:, :, : shape[2]].sort(-1).values
                blocks = chosen.int().contiguous()
            size = 1 if blocks is None else own.block
            peak = own.aggregate == "peak"  # as the product scores: with the statistics of a softmax, or without

            def label(layer: int) -> None:
                args = (*index.labels(layer), step.page_table, step.lengths, blocks, size, SPEC.scale)
                if peak and blocks is not None and triton_peaks.suits(*args[1:3], blocks, size):
                    triton_peaks.label_images(q[layer], *args, own.sink, own.recent)
                else:
                    triton_logits.label_logits_and_partials(q[layer], *args, peak)

            total += per_layer_us(label)
        return total

    def floor_bytes(self, step: Batch) -> int:
        """Per layer: summaries of the context, labels of the candidates, K and V of the selection."""
        rows, context = step.num_requests * SPEC.num_kv_heads, step.lengths_host[0]
        row_bytes, total = SPEC.head_dim * 2, 0
        parts = self.config.index
        if parts is not None and parts.kind is not None:
            total += context // parts.block * sparse.NUM_STATS[parts.kind] * row_bytes
        if parts is not None and parts.num_channels:
            candidates = min(context, self.config.blocks * self.config.block) if parts.kind else context
            total += candidates * (parts.num_channels // 2 + 4)
        return rows * (total + self.selector.attended(context) * 2 * row_bytes)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="two_level,quest,double_sparsity")
    parser.add_argument("--contexts", default="8192,32768,65536,98304,131072")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--json", default=None)
    return parser.parse_args()


def main() -> None:
    args = parse()
    report = Report(
        "operator_sparse", notes={"budget": args.budget, "layers": LAYERS, "shape": "32/8 heads of 128, bf16"}
    )
    began = time.perf_counter()
    pool = KVPool(LAYERS, POOL_TOKENS // PAGE + 1, SPEC.num_kv_heads, PAGE, SPEC.head_dim, SPEC.dtype, DEVICE)
    for pages in (pool.k, pool.v):
        for layer in pages:
            layer.normal_()
    peer, bandwidth = Peer(pool), read_bandwidth()
    arms = {method: Arm(pool, method, args.budget) for method in args.methods.split(",")}
    report.notes |= {"read_bytes_per_s": bandwidth, "setup_s": round(time.perf_counter() - began, 1)}
    report.notes["index_bytes_per_token_and_layer"] = {
        name: arm.index.bytes / POOL_TOKENS / LAYERS for name, arm in arms.items() if arm.index is not None
    }
    found: dict[tuple[str, int, int], float] = {}
    for context in map(int, args.contexts.split(",")):
        for batch in map(int, args.batches.split(",")):
            q = torch.randn(LAYERS, batch, SPEC.num_heads, SPEC.head_dim, device=DEVICE, dtype=SPEC.dtype)
            step = make_batch(batch, context, LONGEST // PAGE, SPARSE)
            dense_us, theirs = peer.time(step, q)
            ours = ops.decode_attention(q[0], pool.k[0], pool.v[0], step.page_table, step.lengths, SPEC.scale)
            check(float((ours - theirs).abs().max()) < TOLERANCE, "our dense attention is not FlashInfer's")
            report.point(method="full", batch=batch, context=context, total_us=round(dense_us, 2))
            for name, arm in arms.items():
                arm.check(step, q)
                times = arm.times(step, q)
                found[name, batch, context] = times["total_us"]
                floor = 1e6 * arm.floor_bytes(step) / bandwidth
                report.point(
                    method=name, batch=batch, context=context, **{k: round(v, 2) for k, v in times.items()},
                    floor_us=round(floor, 2), speedup=round(dense_us / times["total_us"], 3),
                )  # fmt: skip
            found["full", batch, context] = dense_us
            report.finish(args.json)
    bars(report, found)
    if "two_level" in arms:
        gate(report, arms["two_level"], pool, min(8192, 8 * args.budget))
    report.finish(args.json)


def bars(report: Report, found: dict[tuple[str, int, int], float]) -> None:
    def ratio(slow: str, batch: int) -> float:
        return found[slow, batch, 98304] / found["two_level", batch, 98304]

    for slow, batch, limit in (
        ("full", 8, 10.0), ("full", 1, 3.0), ("double_sparsity", 1, 1.5), ("double_sparsity", 8, 1.5)
    ):  # fmt: skip
        if {(slow, batch, 98304), ("two_level", batch, 98304)} <= set(found):
            report.bar(f"{slow} / two_level, {batch} x 98304", ratio(slow, batch), limit, ">=")


def gate(report: Report, arm: Arm, pool: KVPool, longest: int) -> None:
    """Below its gate a method is the dense backend and nothing else: dense / ours of the same dense kernel."""
    dense = DenseBackend(pool, SPEC)
    for batch in (1, 8):
        for context in (1024, longest):
            q = torch.randn(LAYERS, batch, SPEC.num_heads, SPEC.head_dim, device=DEVICE, dtype=SPEC.dtype)
            step = replace(make_batch(batch, context, LONGEST // PAGE, DENSE), graph_key=(batch, DENSE))
            dense.plan(step)
            arm.backend.plan(step)
            theirs = per_layer_us(lambda layer, q=q: dense.attend(layer, q[layer]))
            ours = per_layer_us(lambda layer, q=q: arm.backend.attend(layer, q[layer]))
            report.point(method="two_level", batch=batch, context=context, gated=True, total_us=round(ours, 2))
            report.bar(f"dense / two_level below its gate, {batch} x {context}", theirs / ours, 0.97, ">=")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
