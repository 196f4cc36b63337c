"""What does KV on the host cost, and what does the room buy? AsyncTLS with a capped device against what fits there.

Arms, in one process, over contexts that were not prefilled (``contexts.py``): full attention at its largest batch under
the cap; the same batch as AsyncTLS with all KV moved every step (computed from the measured bandwidth); two_level
without offload at its largest batch under the cap, and at AsyncTLS's batch without one; AsyncTLS with offload at
two_level's batch and at its own largest. Blocks are walked, not scored for: every step keeps a given share of the last
step's (scores are computed and thrown away), so locality is the same for two_level and AsyncTLS, and known.

    PYTHONPATH=src python benchmarks/offload.py --json benchmarks/results/h200/offload.json
    PYTHONPATH=src python benchmarks/offload.py --smoke        # a CPU, tiny shapes: that it runs, no bar means anything
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import numpy as np
import torch
from contexts import fill_pool, remember
from harness import Report, check, time_host
from shapes import QWEN3_8B, SHAPES

from slipstream import LLM
from slipstream.benchmark import decode_times, random_prompts
from slipstream.kernels import residency
from slipstream.kvcache.plan import parse_bytes

TINY = QWEN3_8B | {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float32",
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "eos_token_id": 63,
}  # fmt: skip
ROUNDS = 512
PAGE = 64


class Walk:
    """Stands in for a selector's first level: sets of blocks that change by a given share in every step."""

    def __init__(self, selector: Any, context: int, overlap: float, device: torch.device, seed: int = 0) -> None:
        self._scored = getattr(selector.blocks, "_scored", selector.blocks)
        self._selector, config = selector, selector._config
        num, most = config.blocks - 3, context // config.block - 3  # without the first and the newest two
        rng, rounds = np.random.default_rng(seed), []
        current = rng.choice(np.arange(1, most), num, replace=False)
        for _ in range(ROUNDS):
            fresh = round((1 - overlap) * config.blocks)
            left = np.setdiff1d(np.arange(1, most), current)
            current = np.concatenate((rng.permutation(current)[fresh:], rng.choice(left, fresh, replace=False)))
            rounds.append(np.sort(current))
        self._rounds = torch.tensor(np.stack(rounds), dtype=torch.int32, device=device)
        self._step, self._size = torch.zeros(1, dtype=torch.int64, device=device), config.block
        selector.blocks = self

    def __call__(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        scored = self._scored(layer, query)
        lengths, (requests, num_kv, width) = self._selector._lengths, scored.shape
        if width < self._rounds.shape[1] + 3:  # a rehearsal, or a prompt: nothing to walk over
            return scored
        if layer == 0:
            self._step += 1
        at = (self._step + 37 * torch.arange(requests, device=query.device)) % ROUNDS
        newest = (lengths.view(-1, 1) - 1) // self._size
        rows = torch.cat((torch.zeros_like(newest), self._rounds[at], newest - 1, newest), dim=1).int()
        rows = torch.where(lengths.view(-1, 1) > self._size * width, rows, scored[:, 0])
        return rows.unsqueeze(1).expand(-1, num_kv, -1).contiguous()


class Arms:
    def __init__(self, args: argparse.Namespace, report: Report, shape: str) -> None:
        self.args, self.report, self.shape = args, report, shape
        self.config = TINY if args.smoke else SHAPES[shape]
        self.method = {"budget": 32, "blocks": 8, "block": 8, "channels": 8, "recent": 8} if args.smoke else {}

    def load(self, attention: Any, context: int, most: int, memory: str | None) -> LLM:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return LLM(
            self.config | {"max_position_embeddings": max(context + 512, 1024)}, load_format="dummy", page_size=PAGE,
            attention=attention, max_num_seqs=most, kv_memory=memory, max_model_len=context + 512,
            device="cpu" if self.args.smoke else "cuda",
        )  # fmt: skip

    def measure(self, llm: LLM, batch: int, context: int, overlap: float | None, **note: Any) -> dict[str, Any]:
        selector = getattr(llm.engine.backend, "selector", None)
        if overlap is not None:
            Walk(selector, context, overlap, llm.device)
        prompts = random_prompts(llm.spec.vocab_size, batch, context, seed=batch)
        remember(llm, prompts)
        before = llm.stats()
        began = time.perf_counter()
        times = decode_times(llm, batch, context, self.args.steps, prompts=prompts)
        after = llm.stats()
        counts = {key: value - before.get(key, 0) for key, value in after.items() if not isinstance(value, str)}
        check(selector is None or counts["sparse_steps"] >= self.args.steps, "an arm was not sparse")
        row = {"shape": self.shape, **note, "batch": batch, "context": context, "overlap": overlap}
        row |= {"tpot_ms": times.tpot_ms, "tokens_per_s": 1e3 * batch / times.tpot_ms, "ttft_s": times.prefill_s}
        if "asynctls_misses" in after:
            row["turnover"] = counts["asynctls_turned"] / max(1, counts["asynctls_compared"])
            row["step_bytes"] = counts["asynctls_prefetched"] / counts["sparse_steps"] * self.block_bytes(llm)
            row["urgent"] = counts["asynctls_urgent"]
            blocks = selector._config.blocks
            wanted = round((1 - (overlap or 0)) * blocks) / blocks
            check(overlap is None or abs(row["turnover"] - wanted) < 0.03, "the walk is not what it should be")
        if torch.cuda.is_available():
            row["peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["host_gib"] = llm.pool.bytes / 2**30 if llm.pool.k.device.type == "cpu" else 0.0
        row["wall_s"] = time.perf_counter() - began
        self.report.point(**row)
        return row

    def block_bytes(self, llm: LLM) -> int:
        spec, block = llm.spec, llm.engine.backend.selector._config.block
        return 2 * block * spec.head_dim * spec.dtype.itemsize

    def run(self, context: int, cap: str | None, bandwidth: float) -> None:
        args, tokens = self.args, context + self.args.steps + 2 * PAGE
        note = {"cap": cap}
        most = args.most
        llm = self.load("full", context, most, cap)
        fits = min(most, llm.memory.num_tokens // tokens)
        full = None
        if fits:
            fill_pool(llm)
            full = self.measure(llm, fits, context, None, method="full", **note)
        per_token = llm.spec.kv_bytes_per_token()
        llm.close()
        del llm  # before the next one asks how much memory is free
        two = {"method": "two_level", "min_context": 0, **self.method}
        tls = {
            "method": "asynctls", "offload": True, "candidates": args.candidates, "min_context": 0, **self.method,
            "host_kv": args.host, **({"gpu_kv": cap} if cap else {}),
        }  # fmt: skip
        for overlap in [float(x) for x in args.overlaps.split(",")]:
            llm = self.load(two, context, most, cap)
            small = min(most, llm.memory.num_tokens // tokens)
            near = self.measure(llm, small, context, overlap, method="two_level", **note) if small else None
            llm.close()
            del llm
            llm = self.load(tls, context, most, None)
            large = min(llm.engine.config.max_num_seqs, llm.memory.num_tokens // tokens)
            llm.pool.k.copy_(torch.randn(llm.pool.k.shape[2:]))  # every page the same: written, and not all zeros
            llm.pool.v.copy_(torch.randn(llm.pool.v.shape[2:]))
            found = {}
            for batch in dict.fromkeys(size for size in (small, large) if size):
                found[batch] = self.measure(llm, batch, context, overlap, method="asynctls", **note)
            still = self.measure(llm, large, context, 1.0, method="asynctls", **note)
            llm.close()
            del llm
            if large != small:
                llm = self.load(two, context, large, None)
                if llm.memory.num_tokens // tokens >= large:
                    near_large = self.measure(llm, large, context, overlap, method="two_level", cap=None)
                    self.bar_tpot(found[large], near_large, bandwidth)
                llm.close()
                del llm
            if near:
                self.bar_tpot(found[small], near, bandwidth)
            naive_ms = 1e3 * large * context * per_token / bandwidth
            self.report.point(shape=self.shape, method="naive", batch=large, context=context, cap=cap, tpot_ms=naive_ms)
            name = f"{self.shape} {context} cap {cap} overlap {overlap}"
            exposed = max(0.0, found[large]["tpot_ms"] - still["tpot_ms"]) / found[large]["tpot_ms"]
            if overlap >= 0.97:
                self.report.bar(f"exposed share, {name}", exposed, 0.05, "<=")
            if full and overlap in (0.9, 0.97):
                ratio = found[large]["tokens_per_s"] / full["tokens_per_s"]
                self.report.bar(f"asynctls x{large} / full x{fits}, {name}", ratio, 4 if overlap < 0.97 else 7, ">=")

    def bar_tpot(self, ours: dict[str, Any], near: dict[str, Any], bandwidth: float) -> None:
        limit = max(near["tpot_ms"], 1e3 * ours["step_bytes"] / bandwidth)
        name = f"{self.shape} {ours['batch']} x {ours['context']} cap {ours['cap']} overlap {ours['overlap']}"
        self.report.bar(f"TPOT / max(two_level, bytes / bandwidth), {name}", ours["tpot_ms"] / limit, 1.10, "<=")


def host_to_device(device: torch.device, size: int) -> float:
    """Bytes per second of one plain copy from pinned memory."""
    far = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    near = torch.empty(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        near.copy_(far, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return size / (time_host(copy, 5).median_ms / 1e3)


def gather_bandwidth(device: torch.device, num_blocks: int) -> float:
    """Bytes per second of the kernel that loads blocks, 16 KiB rows of K and of V, from anywhere in pinned memory."""
    far = tuple(torch.ones((num_blocks, 8, PAGE, 128), dtype=torch.bfloat16) for _ in range(2))
    if device.type == "cuda":
        far = tuple(x.pin_memory() for x in far)
    slots = num_blocks // 2
    near = tuple(torch.empty((8 * slots, PAGE, 128), dtype=torch.bfloat16, device=device) for _ in range(2))
    loads = torch.stack((torch.randperm(num_blocks)[:slots], torch.arange(slots)), dim=1).int()
    loads = loads.expand(8, -1, -1).contiguous().to(device)
    counts = torch.full((8,), slots, dtype=torch.int32, device=device)

    def load() -> None:
        residency.load_blocks(far, loads, counts, near, slots, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 8 * slots * 2 * PAGE * 128 * 2 / (time_host(load, 5).median_ms / 1e3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-8b")
    parser.add_argument("--contexts", default="49152,65536,98304")
    parser.add_argument("--caps", default="16GiB,32GiB,none")
    parser.add_argument("--overlaps", default="0.8,0.9,0.97")
    parser.add_argument("--candidates", default="union")
    parser.add_argument("--host", default="80GiB")
    parser.add_argument("--most", type=int, default=16, help="largest batch tried")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.contexts, args.caps, args.overlaps = "tiny", "2048", "2500KiB", "0.9"
        args.host, args.most, args.steps = "64MiB", 3, 8
    for cap in args.caps.split(","):
        if cap != "none":
            parse_bytes(cap)
    return args


def main() -> None:
    args = parse()
    device = torch.device("cpu" if args.smoke else "cuda")
    bandwidth = host_to_device(device, 1 << (24 if args.smoke else 30))
    gather = gather_bandwidth(device, 8 if args.smoke else 4096)
    report = Report("offload", notes={"h2d_bytes_per_s": bandwidth, "gather_bytes_per_s": gather, "steps": args.steps})
    report.bar("gather kernel over pinned memory, GB/s", gather / 1e9, 45, ">=")
    for shape in args.shapes.split(","):
        arms = Arms(args, report, shape)
        for cap in args.caps.split(","):
            for context in map(int, args.contexts.split(",")):
                arms.run(context, None if cap == "none" else cap, bandwidth)
                report.finish(args.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
