"""What does one layer of latent attention cost when it chooses its tokens? Score, select, attend, total.

As ``operator_sparse.py``, with GLM-4.7-Flash's shapes: rows of 512 + 64 columns that are key and value of all 20 heads,
absorbed queries, bf16. Every arm is one captured CUDA graph over ``LAYERS`` layers with rows and an index of their own,
so that none finds its data in the L2 cache; times are per layer. *total* is the product's own backend. The peer is
FlashInfer's MLA decode on the same pages, planned once outside the timing, the faster of its two kernels (fa2, fa3);
our own dense kernel stands beside it, and speed-ups are over the fastest of the three. The floor is what a method must
read (summaries, candidates' labels, chosen rows; all rows for full attention) over the same run's bandwidth.

    PYTHONPATH=src python benchmarks/operator_latent.py --json benchmarks/results/h200/operator_latent.json
    PYTHONPATH=src python benchmarks/operator_latent.py --smoke      # a CPU, tiny shapes: that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from harness import Report, check, time_graph, time_host

from slipstream.attention.dense import DenseBackend
from slipstream.attention.sparse import INDEXING, SPARSE, SparseBackend
from slipstream.build import parse_attention
from slipstream.compare import Method, parse_methods
from slipstream.kernels import reference_index, reference_select, sparse
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec

PAGE = 64
ARCHITECTURE = "Glm4MoeLiteForCausalLM"
TOLERANCE = 0.01
AGREEMENT = 0.99  # of chosen tokens with the definition's: sums in another order decide close calls otherwise
BARS = {98304: 6.0, 131072: 8.0}  # at batch 8


@dataclass(frozen=True)
class Size:
    """What is measured, and where. longest, requests: tokens and requests that the pool has room for."""

    heads: int
    value: int
    rope: int
    layers: int
    longest: int
    requests: int
    dtype: torch.dtype
    device: torch.device

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture=ARCHITECTURE, num_layers=self.layers, hidden_size=2048, num_heads=self.heads, num_kv_heads=1,
            head_dim=self.value + self.rope, vocab_size=1, max_position=self.longest, dtype=self.dtype,
            value_dim=self.value, softmax_scale=256**-0.5,
        )  # fmt: skip

    @property
    def pages(self) -> int:
        return self.requests * self.longest // PAGE


GLM = Size(20, 512, 64, 6, 1 << 17, 8, torch.bfloat16, torch.device("cuda"))
SMOKE = Size(5, 24, 8, 2, 1 << 10, 2, torch.float32, torch.device("cpu"))


class Bench:
    """The rows of all layers and requests, and how work over the layers is timed."""

    def __init__(self, size: Size) -> None:
        self.size, self.spec, self.device = size, size.spec, size.device
        spec = self.spec
        self.pool = KVPool(
            size.layers, size.pages + 1, 1, PAGE, spec.head_dim, spec.dtype, size.device, value_dim=spec.value_dim
        )
        for layer in self.pool.k:
            layer.normal_()

    def us(self, work: Callable[[int], Any]) -> float:
        """Microseconds of ``work(layer)``, as one graph over all layers."""

        def all_layers() -> None:
            for layer in range(self.size.layers):
                work(layer)

        on_gpu = self.device.type == "cuda"
        timing = time_graph(all_layers, repeats=12, warmup=2) if on_gpu else time_host(all_layers, repeats=1)
        return 1e3 * timing.median_ms / self.size.layers

    def read_bandwidth(self) -> float:
        """Bytes per second of a reduction over 8 GB (on a CPU 8 MB)."""
        on_gpu = self.device.type == "cuda"
        x = torch.empty(2 << (30 if on_gpu else 20), dtype=torch.float32, device=self.device).normal_()
        timing = time_graph(lambda: x.sum(), repeats=10) if on_gpu else time_host(lambda: x.sum(), repeats=2)
        return x.numel() * 4 / (timing.median_ms / 1e3)

    def queries(self, batch: int) -> torch.Tensor:
        """[L, B, Hq, D], absorbed."""
        spec = self.spec
        return torch.randn(self.size.layers, batch, spec.num_heads, spec.head_dim, device=self.device, dtype=spec.dtype)

    def step(self, batch: int, context: int) -> Batch:
        """A decode step over pages scattered through the pool; tables as wide as a captured step's."""
        device, columns = self.device, self.size.longest // PAGE
        pages = torch.randperm(self.size.pages, device=device)[: batch * (context // PAGE)] + 1
        table = torch.zeros((batch, columns), dtype=torch.int32, device=device)
        table[:, : context // PAGE] = pages.view(batch, -1)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        rows = torch.arange(batch, device=device)
        return Batch(
            tokens=rows,
            positions=(lengths - 1).long(),
            slots=table[:, context // PAGE - 1].long() * PAGE + PAGE - 1,
            page_table=table,
            lengths=lengths,
            query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
            logit_rows=rows,
            seats=rows + 1,
            lengths_host=[context] * batch,
            query_start_host=list(range(batch + 1)),
            pages_host=[[1]] * batch,
            num_decodes=batch,
            variant=SPARSE,
            graph_key=(batch, SPARSE),
        )

    def exact(self, step: Batch, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Softmax attention of layer 0 over ``tokens`` [B, n], in fp32, spelt out. q: [B, Hq, D] -> [B, Hq, Dv]."""
        pages = step.page_table.long().gather(1, tokens.long() // PAGE)
        rows = self.pool.k[0].view(-1, self.spec.head_dim)[pages * PAGE + tokens.long() % PAGE].float()
        weights = (q.float() @ rows.mT * self.spec.scale).softmax(-1)
        return weights @ rows[..., : self.spec.value_dim]


class Peer:
    """FlashInfer's MLA decode, planned as its documentation says."""

    def __init__(self, bench: Bench) -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        self.bench, self.make = bench, BatchMLAPagedAttentionWrapper
        self.workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=bench.device)

    def times(self, step: Batch, q: torch.Tensor) -> dict[str, tuple[float, torch.Tensor]]:
        """Microseconds and the output of layer 0, by kernel."""
        spec, device, batch, context = self.bench.spec, self.bench.device, step.num_requests, step.lengths_host[0]
        pages = step.page_table[:, : context // PAGE].reshape(-1).contiguous()
        starts, found = torch.arange(batch + 1, dtype=torch.int32, device=device), {}
        for kernel in ("fa2", "fa3"):
            buffers = (torch.empty_like(starts), torch.empty_like(starts), torch.empty_like(pages))
            lengths = torch.empty(batch, dtype=torch.int32, device=device)
            wrapper = self.make(self.workspace, True, *buffers, lengths, backend=kernel)
            wrapper.plan(
                starts, starts * (context // PAGE), pages, step.lengths, spec.num_heads, spec.value_dim,
                spec.head_dim - spec.value_dim, PAGE, False, spec.scale, spec.dtype, spec.dtype,
            )  # fmt: skip

            def run(layer: int, wrapper: Any = wrapper) -> torch.Tensor:
                latent, rotary = self.bench.pool.k[layer, :, 0].tensor_split([spec.value_dim], dim=-1)
                return wrapper.run(*q[layer].tensor_split([spec.value_dim], dim=-1), latent, rotary)

            found[kernel] = (self.bench.us(run), run(0).clone())
        return found


@contextmanager
def by_definition() -> Iterator[None]:
    """Selectors call the plain-torch definitions instead of the kernels."""

    def label_tokens(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, rule = reference_index.label_logits(*args[:9]), (args[5], args[2].shape[1], *args[7:8], *args[9:13])
        if args[12] == "peak":
            logits = reference_select.group_peak(logits, args[2].shape[1])
        return reference_select.top_tokens(logits, args[6], *rule, unread=args[13] if args[13:] else 0)

    with patch.multiple(
        sparse, score_blocks=reference_index.score_blocks, top_blocks=reference_select.top_blocks,
        label_tokens=label_tokens, block_tokens=reference_select.block_tokens,
    ):  # fmt: skip
        yield


class Arm:
    """One method at one budget: its index over the whole pool, and its backend as the engine has it."""

    def __init__(self, bench: Bench, method: Method, options: dict[str, Any]) -> None:
        self.bench, spec, pool = bench, bench.spec, bench.pool
        given = {"dense_layers": 0, **options, **dict(method.options)}
        self.config = parse_attention({"method": method.name, **given}).for_model(spec)
        self.index = KeyIndex(pool, self.config.index)
        self.fill_index()
        self.selector = self.config.selector(pool, spec, self.index)
        dense = DenseBackend(pool, spec)
        self.backend = SparseBackend(pool, spec, self.index, self.selector, dense, 0, unread=self.config.unread)

    def fill_index(self) -> None:
        """As if every page of the pool had been prefilled."""
        size = self.bench.size
        table = torch.arange(1, size.pages + 1, dtype=torch.int32, device=size.device).view(size.requests, -1)
        start = torch.arange(size.requests + 1, dtype=torch.int32, device=size.device) * size.longest
        lengths = torch.full((size.requests,), size.longest, dtype=torch.int32, device=size.device)
        for layer in range(size.layers):
            self.index.extend(layer, self.bench.pool.k[layer], table, start, lengths, size.longest)

    def check(self, step: Batch, q: torch.Tensor) -> float:
        """The backend attends to what the definition chooses. Returns the share that both chose."""
        length, before = step.lengths_host[0], self.backend.stats()["sparse_rows"]
        self.backend.plan(step)
        out = self.backend.attend(0, q[0])
        indices, counts, _ = self.selector.select(0, q[0])
        check(self.backend.stats()["sparse_rows"] == before + step.num_requests, "the backend was dense")
        expected = min(self.config.budget, self.selector.attended(length))
        check(bool((counts == expected).all()), f"counts {counts.unique().tolist()}, not {expected}")
        check(bool((indices.diff(dim=-1) > 0).all()), "a selection is not ascending")
        check(bool((indices[:, :, -1] == length - 1).all()), "the newest token is not attended")
        worst = float((out.float() - self.bench.exact(step, q[0], indices[:, 0])).abs().max())
        check(worst < TOLERANCE, f"attention over the selection differs by {worst:.4f}")
        with by_definition():
            wanted = self.selector.select(0, q[0]).indices
        both = [torch.isin(a, b).float().mean() for a, b in zip(indices[:, 0], wanted[:, 0], strict=True)]
        share = float(torch.stack(both).mean())
        check(share >= AGREEMENT, f"{share:.3f} of the chosen tokens are the definition's")
        return share

    def check_all_tokens(self, step: Batch, q: torch.Tensor) -> None:
        """Within the budget a method is dense attention."""
        self.backend.plan(step)
        found = self.backend.attend(0, q[0]).float()
        everything = torch.arange(step.lengths_host[0], device=q.device).expand(step.num_requests, -1)
        worst = float((found - self.bench.exact(step, q[0], everything)).abs().max())
        check(worst < TOLERANCE, f"with a budget of the context attention differs from dense by {worst:.4f}")

    def times(self, step: Batch, q: torch.Tensor) -> dict[str, float]:
        us, pool, spec = self.bench.us, self.bench.pool, self.bench.spec
        found = {"plain_us": self.total_us(step, q)}
        # Every request fills a page, and so has it indexed, once in PAGE steps; where no step can wait, in every one.
        indexing = replace(step, variant=SPARSE + INDEXING, graph_key=(step.num_requests, SPARSE + INDEXING))
        found["indexing_us"] = self.total_us(indexing, q)
        share = min(1.0, step.num_requests / PAGE) if SPARSE in self.backend.variants else 1.0
        found["total_us"] = (1 - share) * found["plain_us"] + share * found["indexing_us"]
        found |= self.score_us(step, q)
        choose_us = us(lambda layer: self.selector.select(layer, q[layer]))
        found["select_us"] = choose_us - found["score_us"]
        choices = [self.selector.select(layer, q[layer]) for layer in range(self.bench.size.layers)]
        out = q.new_empty((*q.shape[1:-1], spec.value_dim))

        def attend(layer: int) -> None:
            k, v = pool.k[layer], pool.v[layer]
            sparse.sparse_attention(q[layer], k, v, step.page_table, *choices[layer][:2], spec.scale, out)

        return found | {"attend_us": us(attend)}

    def total_us(self, step: Batch, q: torch.Tensor) -> float:
        self.backend.plan(step)
        return self.bench.us(lambda layer: self.backend.attend(layer, q[layer]))

    def score_us(self, step: Batch, q: torch.Tensor) -> dict[str, float]:
        """The ops that read the index, alone: block scores, label logits. Of two_level also the choice of blocks."""
        own, index, found = self.config, self.index, {}
        if index.parts.kind is not None:
            found["block_score_us"] = self.bench.us(
                lambda layer: sparse.score_blocks(
                    q[layer],
                    index.summaries(layer),
                    step.page_table,
                    step.lengths,
                    index.parts.kind,
                    getattr(own, "merge", 1),
                    self.bench.spec.scale,
                    "sum",
                    1.0,
                    index.parts.block,
                )  # fmt: skip
            )
        if index.parts.num_channels:
            blocks, size = None, 1
            if hasattr(self.selector, "blocks"):
                self.backend.plan(step)
                blocks, size = self.selector.blocks(0, q[0]), own.block
                found["top_blocks_us"] = (
                    self.bench.us(lambda layer: self.selector.blocks(layer, q[layer])) - found["block_score_us"]
                )
            found["label_us"] = self.label_us(step, q, blocks, size)
        found["score_us"] = found.get("block_score_us", 0.0) + found.get("label_us", 0.0)
        return found

    def label_us(self, step: Batch, q: torch.Tensor, blocks: torch.Tensor | None, size: int) -> float:
        args = (step.page_table, step.lengths, blocks, size, self.bench.spec.scale)
        if self.bench.device.type == "cpu":
            return self.bench.us(lambda layer: sparse.label_logits(q[layer], *self.index.labels(layer), *args))
        from slipstream.kernels import triton_logits

        peak = self.config.aggregate == "peak"  # as the product scores: with the statistics of a softmax, or without
        more = (peak, 0 if peak else self.config.unread)
        return self.bench.us(
            lambda layer: triton_logits.label_logits_and_partials(q[layer], *self.index.labels(layer), *args, *more)
        )

    def floor_bytes(self, step: Batch) -> int:
        """Per layer: summaries of the context, labels of the candidates, rows of the selection."""
        parts, context, row = self.config.index, step.lengths_host[0], row_bytes(self.bench.spec)
        total = self.selector.attended(context) * row
        if parts.kind is not None:
            total += context // parts.block * sparse.NUM_STATS[parts.kind] * row
        if parts.num_channels:
            candidates = min(context, self.config.blocks * self.config.block) if parts.kind else context
            total += candidates * (parts.num_channels // 2 + 8)  # two groups of scales
        return step.num_requests * total


def row_bytes(spec: ModelSpec) -> int:
    return spec.head_dim * spec.dtype.itemsize


def measure_full(bench: Bench, peer: Peer | None, step: Batch, q: torch.Tensor) -> dict[str, float]:
    """Dense attention by every kernel that there is; they must agree."""
    dense = DenseBackend(bench.pool, bench.spec)
    dense.plan(step)
    ours = dense.attend(0, q[0])
    found = {"triton_us": bench.us(lambda layer: dense.attend(layer, q[layer]))}
    for kernel, (us, out) in (peer.times(step, q) if peer is not None else {}).items():
        check(float((ours - out).abs().max()) < TOLERANCE, f"our dense attention is not FlashInfer's {kernel}")
        found[f"{kernel}_us"] = us
    return {"total_us": min(found.values())} | found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="two_level,two_level:aggregate=peak,quest,double_sparsity")
    parser.add_argument("--contexts", default="98304,131072,65536,32768")
    parser.add_argument("--batches", default="8,4,1")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--warm", action="store_true", help="compile everything, on one layer")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    if args.smoke:
        args.contexts, args.batches, args.budget = "512,1024", "2,1", 128
    return args


def main() -> None:
    args = parse()
    size = SMOKE if args.smoke else replace(GLM, layers=1) if args.warm else GLM
    began, bench = time.perf_counter(), Bench(size)
    shape = f"{size.heads} heads, rows of {size.value} + {size.rope}, {str(size.dtype).removeprefix('torch.')}"
    report = Report("operator_latent", notes={"budget": args.budget, "layers": size.layers, "shape": shape})
    peer, bandwidth = None if args.smoke else Peer(bench), bench.read_bandwidth()
    options = {"budget": args.budget} | ({"recent": 16} if args.smoke else {})
    two = {"blocks": 8} if args.smoke else {}
    arms = {
        method.label: Arm(bench, method, options | (two if method.name == "two_level" else {}))
        for method in parse_methods(args.methods, {})
    }
    report.notes |= {"read_bytes_per_s": bandwidth, "setup_s": round(time.perf_counter() - began, 1)}
    report.notes["index_bytes_per_token_and_layer"] = {
        name: arm.index.bytes / (size.pages * PAGE) / size.layers for name, arm in arms.items()
    }
    for batch in map(int, args.batches.split(",")):
        step, q = bench.step(batch, args.budget), bench.queries(batch)
        for arm in arms.values():
            arm.check_all_tokens(step, q)
    found: dict[tuple[str, int, int], float] = {}
    for context in map(int, args.contexts.split(",")):
        for batch in map(int, args.batches.split(",")):
            q, step = bench.queries(batch), bench.step(batch, context)
            times = measure_full(bench, peer, step, q)
            found["full", batch, context] = dense_us = times["total_us"]
            floor = 1e6 * batch * context * row_bytes(bench.spec) / bandwidth
            report.point(method="full", batch=batch, context=context, **rounded(times), floor_us=round(floor, 2))
            for name, arm in arms.items():
                agreement, times = arm.check(step, q), arm.times(step, q)
                found[name, batch, context] = times["total_us"]
                report.point(
                    method=name, batch=batch, context=context, **rounded(times),
                    floor_us=round(1e6 * arm.floor_bytes(step) / bandwidth, 2),
                    speedup=round(dense_us / times["total_us"], 3), agreement=round(agreement, 4),
                )  # fmt: skip
        if args.json:
            report.finish(args.json)
    for context, limit in BARS.items():
        if {("full", 8, context), ("two_level", 8, context)} <= set(found):
            ratio = found["full", 8, context] / found["two_level", 8, context]
            report.bar(f"fastest full / two_level, 8 x {context}", ratio, limit, ">=")
    report.finish(args.json)


def rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(us, 2) for name, us in times.items()}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
