"""What does KV on the host cost, and what does the room buy? AsyncTLS with a capped device against what fits there.

Arms, in one process, over contexts that were not prefilled (``contexts.py``): full attention at the largest batch that
fits each cap; naive offload, which moves all KV of its batch in every step (its transfers alone: a lower bound);
two_level without offload at the largest batch under each cap and at AsyncTLS's; AsyncTLS with offload at two_level's
batch, at its own largest, and there also with blocks that stay (``overlap=1``), which shows what of the transfers is
exposed. Blocks are walked, not scored for: every step keeps a given share of the last step's (scores are computed and
thrown away), so locality is the same for two_level and AsyncTLS, and known. ``overlap="trace"`` walks through sets that
the embedded target chose in a task (``asynctls_accuracy.py --record``).

Full attention and two_level do not depend on the cap but for the batch that fits, so each has one engine for all caps;
its peak of device memory is given without the pages that the batch does not need. All engines get the same piece of
pinned memory, which takes most of a minute. ``weights_gb`` is what a step reads of the weights (of a mixture's where
tokens choose at random), ``context_gb`` what full attention reads beside them.

    PYTHONPATH=src python benchmarks/offload.py --json benchmarks/results/h200/offload.json
    PYTHONPATH=src python benchmarks/offload.py --shapes glm-4.7-flash --contexts 98304 --caps 8GiB --host 40GiB ...
    PYTHONPATH=src python benchmarks/offload.py --smoke        # a CPU, tiny shapes: that it runs, no bar means anything
First come the points that bars are of: each shape at the first context, under the first cap, with each of ``--slots``
(few are many chains, many few bytes a step), then the rest. None is begun after ``--time-limit-s``; JSON after each.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contexts import fill_pool, remember
from harness import Report, check, time_host
from offload_bars import bars, weight_bytes
from shapes import GLM_47_FLASH, QWEN3_8B, SHAPES
from transfers import SharedHost, transfers
from walks import Walk

from slipstream import LLM, AsyncTLS, SamplingParams, TwoLevel
from slipstream.asynctls.config import plan_offload
from slipstream.asynctls.offload import HostPool
from slipstream.benchmark import decoding, random_prompts
from slipstream.kernels.ops import stored
from slipstream.kvcache.plan import available_host_bytes, parse_bytes, plan_memory
from slipstream.models.config import normalise, read_config
from slipstream.types import ModelSpec

_SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float32",
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "eos_token_id": 63,
}  # fmt: skip
TINY = {
    "tiny": QWEN3_8B | _SMALL,
    "tiny-latent": GLM_47_FLASH | _SMALL | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8,
    },
}  # fmt: skip
PAGE = 64
SLOTS = (2.0, 3.0, 4.0, 6.0, 8.0)
SPARE_HOST = 8 << 30  # bytes of host memory that are not pinned: for everything else


class Arms:
    """The points of one shape of model."""

    def __init__(self, args: argparse.Namespace, report: Report, shape: str) -> None:
        self.args, self.report, self.shape = args, report, shape
        self.config = TINY[shape] if args.smoke else SHAPES[shape]
        if args.layers:
            self.config = self.config | {"num_hidden_layers": args.layers}
        small = {"budget": 32, "blocks": 8, "block": 8, "channels": 8, "recent": 8} if args.smoke else {}
        self.method: dict[str, Any] = {"min_context": 0, **small}
        self.contexts = [int(x) for x in args.contexts.split(",")]
        self.caps = [None if cap == "none" else cap for cap in args.caps.split(",")]
        self.overlaps = [float(x) for x in args.overlaps.split(",")]
        self.least_slots = [float(x) for x in args.slots.split(",")]
        own = self.decoder = read_config(normalise(self.config))
        self.spec = ModelSpec(
            self.shape, own.num_layers, own.hidden_size, own.num_heads, own.num_kv_heads, own.head_dim, own.vocab_size,
            max(self.contexts) + 512, getattr(torch, self.config["dtype"]),
            value_dim=None if own.latent is None else own.latent.kv_lora,
        )  # fmt: skip

    @contextmanager
    def engine(self, attention: Any, most: int, memory: str | None = None) -> Iterator[LLM]:
        """One engine after the other: each takes what is free."""
        on_cuda = torch.cuda.is_available() and not self.args.smoke
        longest, began = max(self.contexts) + 512, time.perf_counter()
        gc.collect()  # the engine before, which its phase held until it returned
        if on_cuda:
            torch.cuda.empty_cache()
        llm = LLM(
            self.config | {"max_position_embeddings": longest}, load_format="dummy", page_size=PAGE, seed=0,
            attention=attention, max_num_seqs=most, kv_memory=memory, max_model_len=longest, max_batch_tokens=8192,
            device="cuda" if on_cuda else "cpu", cuda_graphs=not self.args.eager,
        )  # fmt: skip
        try:
            assert llm.spec.kv_bytes_per_token() == self.spec.kv_bytes_per_token()
            assert llm.spec.value_dim == self.spec.value_dim
            (fill_host if isinstance(llm.pool, HostPool) else fill_pool)(llm)
            if on_cuda:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(f"-- {self.shape} {attention}: {time.perf_counter() - began:.1f} s to load and fill", flush=True)
            yield llm
        finally:
            llm.close()

    # -- what fits

    def tokens(self, context: int) -> int:
        return context + self.args.steps + 2 * PAGE

    def fitting(self, cap: str, context: int, sparse: bool) -> int:
        """Chains whose KV, and index, fit under a cap."""
        more = AsyncTLS(**self.method).for_model(self.spec).index.bytes_per_token(self.spec) if sparse else 0
        plan = plan_memory(self.spec, page_size=PAGE, kv_memory=cap, extra_bytes_per_token=more)
        return min(self.args.most, plan.num_tokens // self.tokens(context))

    def largest(self, cap: str | None, context: int, slots: float) -> int:
        """Chains that AsyncTLS takes under a cap; without one, those that the host holds."""
        try:
            plan = plan_offload(
                AsyncTLS(**self.offload(cap, slots)).for_model(self.spec), self.spec, page_size=PAGE,
                max_num_seqs=self.args.most, max_model_len=max(self.contexts) + 512,
                device_bytes=parse_bytes(cap or "100GiB"),
            )  # fmt: skip
        except ValueError:  # not one fits
            return 0
        return min(plan.num_seats, (plan.num_pages - 1) * PAGE // self.tokens(context))

    def slots(self, cap: str | None) -> float:
        """As many as there is room for, where the host is full."""
        most = self.largest(cap, self.contexts[0], SLOTS[0])
        return max(slots for slots in SLOTS if self.largest(cap, self.contexts[0], slots) == most)

    def offload(self, cap: str | None, slots: float) -> dict[str, Any]:
        own = {"offload": True, "candidates": self.args.candidates, "host_kv": self.args.host, "slots": slots}
        return self.method | own | ({"gpu_kv": cap} if cap else {})

    # -- phases

    def full(self) -> None:
        caps = [cap for cap in self.caps if cap is not None]
        with self.engine("full", self.args.most, None if None in self.caps else max(caps, key=parse_bytes)) as llm:
            for context in self.contexts:
                for cap in self.caps if context == self.contexts[0] else self.caps[:1]:
                    fits = min(self.args.most, llm.memory.num_tokens // self.tokens(context))
                    batch = self.fitting(cap, context, False) if cap else fits
                    if batch:
                        self.measure(llm, batch, context, None, method="full", cap=cap)
            self.first_token(llm, "full", None)

    def two_level(self) -> None:
        caps = [cap for cap in self.caps if cap is not None]
        wanted = [
            (context, batch)
            for context in self.contexts
            for cap in (caps if context == self.contexts[0] else caps[:1])
            for batch in (*(self.largest(cap, context, s) for s in self.least_slots), self.fitting(cap, context, True))
            if batch
        ]
        most, pages = max(b for _, b in wanted), max(b * -(-self.tokens(c) // PAGE) for c, b in wanted)
        config = TwoLevel(**self.method).for_model(self.spec)
        per_page = PAGE * (self.spec.kv_bytes_per_token() + config.index.bytes_per_token(self.spec))
        with self.engine({"method": "two_level", **self.method}, most, str((pages + 8) * per_page)) as llm:
            walk = Walk(llm)
            for context, batch in dict.fromkeys(wanted):
                walk.follow(context, 0.9)
                self.measure(llm, batch, context, 0.9, method="two_level")

    def asynctls(self, cap: str | None, slots: float) -> None:
        args, first = self.args, cap == self.caps[0]
        contexts = self.contexts if first else self.contexts[:1]
        most = max(self.largest(cap, context, slots) for context in contexts)
        with self.engine({"method": "asynctls", **self.offload(cap, slots)}, most) as llm:
            walk = Walk(llm)
            for context in contexts:
                large = min(llm.engine.config.max_num_seqs, llm.memory.num_tokens // self.tokens(context))
                small = min(large, self.fitting(cap, context, True)) if cap and slots == self.least_slots[0] else 0
                for overlap in (*self.overlaps, 1.0):
                    walk.follow(context, overlap)
                    for batch in dict.fromkeys(size for size in (large, small) if size):
                        self.measure(llm, batch, context, overlap, method="asynctls", cap=cap, slots=slots)
                if context == self.contexts[0] and args.trace and Path(args.trace).exists():
                    walk.replay(np.load(args.trace)["sets"])
                    self.measure(llm, large, context, "trace", method="asynctls", cap=cap, slots=slots)
            if first and slots == self.least_slots[0]:
                self.naive(llm, cap)
                self.first_token(llm, "asynctls", cap)

    # -- points

    def measure(self, llm: LLM, batch: int, context: int, overlap: float | str | None, **note: Any) -> None:
        args, selector = self.args, getattr(llm.engine.backend, "selector", None)
        if time.perf_counter() > args.deadline:
            self.report.notes["left_out"].append(f"{self.shape} {note} {batch} x {context} overlap {overlap}")
            return
        began, on_host = time.perf_counter(), isinstance(llm.pool, HostPool)
        where: dict[str, Any] = {"shape": self.shape, **note, "batch": batch, "context": context, "overlap": overlap}
        if any(where.items() <= point.items() for point in self.report.points):
            return  # an earlier phase's
        prompts = random_prompts(llm.spec.vocab_size, args.most, context, seed=0)[:batch]
        llm.engine.table.forget()
        remember(llm, prompts, index=not on_host)
        times, cached = [], llm.stats()["cached_tokens"]
        with decoding(llm, batch, context, args.steps, prompts=prompts) as ttft:
            before = counts_of(llm)
            check(before["cached_tokens"] - cached >= batch * (context - 2 * PAGE), "a context was not remembered")
            last = time.perf_counter()
            for _ in range(args.steps):
                news = llm.engine.step()
                times.append(time.perf_counter() - last)
                last += times[-1]
                check(sum(event.delta is not None for event in news) == batch, "a chain did not decode in a step")
            counts = {key: value - before.get(key, 0) for key, value in counts_of(llm).items()}
        check(selector is None or counts["sparse_steps"] >= args.steps, "an arm was not sparse")
        check(
            llm.device.type == "cpu" or args.eager or counts["graph_replays"] >= args.steps, "steps were not captured"
        )
        tpot_ms = 1e3 * float(np.median(times))
        row = where | {"tpot_ms": tpot_ms, "tokens_per_s": 1e3 * batch / tpot_ms, "ttft_cached_s": ttft}
        row["weights_gb"] = weight_bytes(self.decoder, batch) * llm.spec.dtype.itemsize / 1e9
        row["context_gb"] = batch * context * llm.spec.kv_bytes_per_token() / 1e9
        if "asynctls_misses" in counts:
            row["turnover"] = counts["asynctls_turned"] / max(1, counts["asynctls_compared"])
            row["step_bytes"] = counts["asynctls_misses"] / args.steps * block_bytes(llm)
            row["urgent"] = counts["asynctls_urgent"]
            for name in ("transfer", "exposed"):
                row[f"{name}_ms"] = 1e3 * counts[f"asynctls_{name}_s"] / args.steps
            row["busy_gb_s"] = row["step_bytes"] / max(1e-6, row["transfer_ms"]) / 1e6
            row["hot_gib"], row["host_gib"] = llm.engine.backend.hot.bytes / 2**30, llm.pool.bytes / 2**30
            if isinstance(overlap, float):
                blocks = selector._config.blocks  # type: ignore[union-attr]
                wanted = round((1 - overlap) * blocks) / blocks
                check(wanted == 0 or row["step_bytes"] > 0, "nothing was moved")
                check(abs(row["turnover"] - wanted) < 0.05, f"the walk is not what it should be: {row['turnover']}")
        if llm.device.type == "cuda":
            spare = 0 if on_host else llm.memory.num_pages - batch * -(-self.tokens(context) // PAGE)
            row["peak_device_gib"] = (torch.cuda.max_memory_allocated() - spare * llm.memory.page_bytes) / 2**30
        self.report.point(**row, wall_s=time.perf_counter() - began)
        self.report.keep(args.json)

    def first_token(self, llm: LLM, method: str, cap: str | None) -> None:
        """Seconds to the first token of a prompt that nobody has seen."""
        if not self.args.ttft or time.perf_counter() > self.args.deadline:
            return
        context = self.contexts[0]
        prompt = random_prompts(llm.spec.vocab_size, 1, context, seed=12345)
        times = []
        for tokens in (prompt[0][: context // 8], prompt[0][::-1]):  # the first one compiles
            began = time.perf_counter()
            llm.generate([tokens], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            times.append(time.perf_counter() - began)
        self.report.point(shape=self.shape, method=method, cap=cap, batch=1, context=context, ttft_s=times[1])

    def naive(self, llm: LLM, cap: str | None) -> None:
        """All KV of a batch to the device, layer by layer, by plain copies: what full attention must wait for."""
        context, stage, pool = self.contexts[0], llm.engine.backend.stage, llm.pool
        pages = context // PAGE
        for batch in dict.fromkeys((self.fitting(cap, context, False), self.largest(cap, context, 2)) if cap else ()):

            def move(batch: int = batch) -> None:
                for layer in range(llm.spec.num_layers):
                    for near, far in zip(stored(*stage.layer(layer)), stored(*pool.layer(layer)), strict=True):
                        for chain in range(batch):
                            near[:pages].copy_(far[1 + chain * pages :][:pages], non_blocking=True)
                if llm.device.type == "cuda":
                    torch.cuda.synchronize()

            if batch:
                tpot_ms = time_host(move, 1).median_ms
                self.report.point(
                    shape=self.shape, method="naive", cap=cap, batch=batch, context=context, tpot_ms=tpot_ms,
                    tokens_per_s=1e3 * batch / tpot_ms,
                )  # fmt: skip


def counts_of(llm: LLM) -> dict[str, float]:
    """The engine's counters, after all that was launched."""
    if llm.device.type == "cuda":
        torch.cuda.synchronize()
    return {key: value for key, value in llm.stats().items() if not isinstance(value, str)}


def block_bytes(llm: LLM) -> int:
    """K and V of one block and head."""
    block: int = llm.engine.backend.selector._config.block
    return block * llm.spec.kv_bytes_per_token() // (llm.spec.num_layers * llm.spec.num_kv_heads)


def fill_host(llm: LLM) -> None:
    """Random KV in every page of the host, made on the device, and the index of it."""
    pool, index = llm.pool, llm.engine.backend.index
    pages = torch.arange(1, pool.num_pages, dtype=torch.int32, device=llm.device).unsqueeze(0)
    length = pages.shape[1] * PAGE
    start, lengths = (torch.tensor(x, dtype=torch.int32, device=llm.device) for x in ([0, length], [length]))
    near = torch.empty(pool.k.shape[1:], dtype=pool.k.dtype, device=llm.device)
    for layer in range(llm.spec.num_layers):
        for part in stored(*pool.layer(layer))[::-1]:  # keys last: they are what is indexed
            part.copy_(near.normal_())
        index.extend(layer, near, pages, start, lengths, length)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-8b,qwen3-14b")
    parser.add_argument("--contexts", default="98304,65536,49152", help="of the first shape; others run the first one")
    parser.add_argument("--caps", default="16GiB,32GiB,none", help="the first one at all contexts, the others at one")
    parser.add_argument("--overlaps", default="0.97,0.9,0.8")
    parser.add_argument("--slots", default="2,1.25", help="under the first cap, as multiples of blocks")
    parser.add_argument("--candidates", default="union")
    parser.add_argument("--host", default="96GiB", help="host memory, pinned once for all; less if it is not there")
    parser.add_argument("--most", type=int, default=16, help="largest batch tried")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--trace", default="benchmarks/traces/blocks.npz", help="recorded sets; '' for none")
    parser.add_argument("--layers", type=int, default=0, help="of the model, fewer: to compile kernels before")
    parser.add_argument("--eager", action="store_true", help="capture no steps")
    parser.add_argument("--no-ttft", dest="ttft", action="store_false", help="prefill no prompt")
    parser.add_argument("--after", type=Path, help="pin memory, then begin when this file is there")
    parser.add_argument("--time-limit-s", type=float, default=1e9, help="begin no point after so long")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.smoke:
        args.shapes = args.shapes if args.shapes in TINY else ",".join(TINY)
        args.contexts, args.caps, args.overlaps = "2048,1024", "2000KiB,none", "0.9,0.97"
        args.host, args.most, args.steps = "64MiB", 3, 8
    for cap in args.caps.split(","):
        if cap != "none":
            parse_bytes(cap)
    return args


def phases(args: argparse.Namespace, report: Report) -> list[tuple[str, Callable[[], None]]]:
    """The most important first."""
    found: list[tuple[str, Callable[[], None]]] = []
    for shape in args.shapes.split(","):
        own = Arms(argparse.Namespace(**vars(args) | {"ttft": False, "trace": ""}), report, shape)
        own.contexts, own.caps = own.contexts[:1], own.caps[:1]
        cap, most = own.caps[0], 0
        found += [(f"{shape} full", own.full), (f"{shape} two_level", own.two_level)]
        for slots in own.least_slots:
            if own.largest(cap, own.contexts[0], slots) > most:  # else the host has no room for more chains
                most = own.largest(cap, own.contexts[0], slots)
                found.append((f"{shape} asynctls {cap} slots {slots}", partial(own.asynctls, cap, slots)))
    if not (args.ttft or args.trace or "," in args.contexts + args.caps):
        return found
    rest = Arms(args, report, args.shapes.split(",")[0])
    traced = args.trace and Path(args.trace).exists()
    if len(rest.contexts) == len(rest.caps) == 1 and not (args.ttft or traced):
        return found
    found += [("full, the rest", rest.full), ("two_level, the rest", rest.two_level)]
    for cap in rest.caps:
        slots = rest.least_slots[0] if cap == rest.caps[0] else rest.slots(cap)
        found.append((f"asynctls {cap}, the rest", partial(rest.asynctls, cap, slots)))
    return found


def main() -> None:
    args, began = parse(), time.perf_counter()
    args.deadline = began + args.time_limit_s
    device = torch.device("cpu" if args.smoke else "cuda")
    there = available_host_bytes() - (0 if args.smoke else SPARE_HOST)
    args.host = str(min(parse_bytes(args.host), there))
    host = SharedHost(int(args.host), device)
    report = Report("offload", notes={"steps": args.steps, "pin_s": host.seconds, "failed": [], "left_out": []})
    print(f"-- pinned {args.host} bytes of {there} in {host.seconds:.1f} s", flush=True)
    while args.after and not args.after.exists():
        time.sleep(0.1)
    bandwidth = transfers(report, host, device, 16 if args.smoke else 1024)
    for name, phase in phases(args, report):
        if time.perf_counter() > args.deadline:
            report.notes["left_out"].append(name)
            continue
        try:
            phase()
        except Exception:  # noqa: BLE001 - the others are worth having; this one is in the result and the exit status
            traceback.print_exc()
            report.notes["failed"].append(f"{name}: {traceback.format_exc(limit=-2)}")
        report.keep(args.json)
        print(f"-- {name}: over after {time.perf_counter() - began:.0f} s", flush=True)
    bars(report, bandwidth)
    report.finish(args.json)
    if report.notes["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
