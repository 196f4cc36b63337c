"""How far is a decode step from what the hardware allows? TPOT of the engine against a floor and against transformers.

The floor of a point, measured in the same process on the same weights and the same KV pool: all linear layers of the
model and its head as one CUDA graph, plus FlashInfer's paged attention of every layer as one CUDA graph. No norms, no
RoPE, no sampling, no host. Contexts are real: every prompt is prefilled.

    PYTHONPATH=src python benchmarks/decode.py --json benchmarks/results/h200/decode.json

With ``--methods full,quest,double_sparsity,two_level`` the arms are attention methods instead, one engine each on the
same shapes, over contexts of random KV (``contexts.py``); the bar is two_level against full. Every arm must have been
sparse in every timed step, and with a budget as large as the context must give the log-probabilities of ``full``.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
import torch.nn.functional as F
from contexts import fill_pool, remember
from harness import Report, Timing, check, time_graph
from shapes import SHAPES

from slipstream import LLM, SamplingParams
from slipstream.benchmark import decode_times, random_prompts

BAR = 1.10
# Decode and prefill sum in another order. On a CPU the same comparison (36 and 64 layers, random weights) differs by
# 2e-5 nats in fp32 and by 0.12 and 0.21 in bf16: that is rounding. A wrong row of KV would differ by whole nats.
# Random routers amplify rounding: 36 layers of 64 experts differ by .21 nats on average and .76 at worst between fp32
# and bf16 on a CPU, and by 1.2 on average from another token's. So a mixture is judged by the average.
TOLERANCE_NATS = 0.5


def linear_floor(llm: LLM, batch: int) -> Timing:
    """All matrix products of one decode step as one graph."""
    model = llm.model
    hidden = torch.randn(batch, llm.spec.hidden_size, device=llm.device, dtype=llm.spec.dtype)
    attended = torch.randn(batch, model.layers[0].output.weight.shape[1], device=llm.device, dtype=llm.spec.dtype)
    inner = torch.randn(batch, model.layers[0].down.weight.shape[1], device=llm.device, dtype=llm.spec.dtype)

    def work() -> None:
        for layer in model.layers:
            F.linear(hidden, layer.qkv.weight)
            F.linear(attended, layer.output.weight)
            F.linear(hidden, layer.gate_up.weight)
            F.linear(inner, layer.down.weight)
        model.logits(hidden)

    return time_graph(work)


def attention_floor(llm: LLM, batch: int, context: int) -> Timing:
    """FlashInfer's paged decode of every layer as one graph, over pages spread through the pool."""
    import flashinfer

    spec, size = llm.spec, llm.options.page_size
    per_request = -(-context // size)
    pages = torch.randperm(llm.pool.num_pages - 1)[: batch * per_request].to(torch.int32) + 1
    check(pages.numel() == batch * per_request, "the pool is too small for the floor")
    indptr = torch.arange(batch + 1, dtype=torch.int32) * per_request
    last = torch.full((batch,), (context - 1) % size + 1, dtype=torch.int32)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=llm.device)
    q = torch.randn(batch, spec.num_heads, spec.head_dim, device=llm.device, dtype=spec.dtype)
    best: Timing | None = None
    for tensor_cores in (True, False):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.empty(batch + 1, dtype=torch.int32, device=llm.device),
            paged_kv_indices_buffer=torch.empty(pages.numel(), dtype=torch.int32, device=llm.device),
            paged_kv_last_page_len_buffer=torch.empty(batch, dtype=torch.int32, device=llm.device),
        )
        wrapper.plan(
            indptr, pages.to(llm.device), last, spec.num_heads, spec.num_kv_heads, spec.head_dim, size,
            q_data_type=spec.dtype, kv_data_type=spec.dtype,
        )  # fmt: skip

        def work(run: Any = wrapper.run) -> None:
            for layer in range(spec.num_layers):
                run(q, (llm.pool.k[layer], llm.pool.v[layer]))

        found = time_graph(work)
        if best is None or found.median_ms < best.median_ms:
            best = found
    assert best is not None
    return best


def check_decode(llm: LLM) -> None:
    """The captured decode path gives the log-probabilities of the prefill path (bf16; tolerance in nats)."""
    prompts = random_prompts(llm.spec.vocab_size, 3, 300, seed=9)
    before = llm.stats()["graph_replays"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0))
    check(llm.stats()["graph_replays"] > before, "no step was replayed as a graph")
    for prompt, output in zip(prompts, outputs, strict=True):
        chain = output.outputs[0]
        decoded = [entry[token].logprob for token, entry in zip(chain.token_ids, chain.logprobs or (), strict=True)]
        scored = llm.score(prompt, chain.token_ids)
        worst = max(abs(a - b) for a, b in zip(decoded, scored, strict=True))
        check(worst < TOLERANCE_NATS, f"decode and prefill differ by {worst:.3f} nats")


def with_our_weights(llm: LLM, config: dict[str, Any]) -> Any:
    """transformers' own model of this shape with a copy of our weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype")}
    with torch.device(llm.device):
        network = Qwen3ForCausalLM._from_config(Qwen3Config(**fields), dtype=torch.bfloat16).eval()
    heads, kv, dim = llm.spec.num_heads, llm.spec.num_kv_heads, llm.spec.head_dim
    network.model.embed_tokens.weight.copy_(llm.model.embedding)
    network.lm_head.weight.copy_(llm.model.head.dense_weight())
    for ours, theirs in zip(llm.model.layers, network.model.layers, strict=True):
        parts = ours.qkv.dense_weight().split([heads * dim, kv * dim, kv * dim])
        for part, name in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
            getattr(theirs.self_attn, name).weight.copy_(part)
        theirs.self_attn.o_proj.weight.copy_(ours.output.dense_weight())
        for part, name in zip(ours.gate_up.dense_weight().chunk(2), ("gate_proj", "up_proj"), strict=True):
            getattr(theirs.mlp, name).weight.copy_(part)
        theirs.mlp.down_proj.weight.copy_(ours.down.dense_weight())
    return network


def transformers_tpot(llm: LLM, config: dict[str, Any], batch: int, context: int, steps: int) -> float:
    """ms per token of transformers' ``generate`` with a static cache and its compiled decode step, on our weights."""
    network = with_our_weights(llm, config)
    prompt = random_prompts(llm.spec.vocab_size, batch, context, 1)
    ids = torch.tensor(prompt, device=llm.device)
    theirs = network(ids[:1]).logits[0, -1].float().log_softmax(-1)
    best = int(theirs.argmax())
    ours = llm.score(prompt[0], [best])[0]
    check(abs(ours - float(theirs[best])) < TOLERANCE_NATS, "our log-probability is not transformers'")
    common = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None, "pad_token_id": 0}

    def generate(tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = network.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **common)
        torch.cuda.synchronize()
        check(out.shape[1] == context + tokens, "transformers stopped early")
        return time.perf_counter() - start

    generate(steps)  # compiles
    long, short = generate(steps), generate(2)
    return 1e3 * (long - short) / (steps - 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--points", default="1x1024,8x1024,32x1024,1x16384,8x16384,32x16384,1x32768,8x32768")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--kernels", default="auto", help="attention kernels of our arm: auto, flashinfer, triton")
    parser.add_argument("--transformers", default="", help="points at which transformers runs too, e.g. 8x1024")
    parser.add_argument("--overhead", action="store_true", help="also measure the host's time per step at B=64")
    parser.add_argument("--methods", default="", help="compare attention methods, e.g. full,quest,two_level")
    parser.add_argument("--budget", type=int, default=1024, help="tokens per KV head that a sparse method attends to")
    parser.add_argument("--json", default=None)
    return parser.parse_args()


def points_of(text: str) -> list[tuple[int, int]]:
    return [(int(b), int(c)) for b, c in (point.split("x") for point in text.split(",") if point)]


def main() -> None:
    args = parse()
    config, points = SHAPES[args.shape], points_of(args.points)
    if args.methods:
        compare_methods(args, config, points)
        return
    check("kv_lora_rank" not in config, "the floor is that of keys and values of heads: give --methods for this shape")
    report = Report("decode", notes={"shape": args.shape, "kernels": args.kernels, "steps": args.steps})
    start = time.perf_counter()
    llm = make_llm(args, config, points)
    report.notes["load_s"] = round(time.perf_counter() - start, 2)
    check_decode(llm)
    for batch, context in points:
        found = decode_times(llm, batch, context, args.steps)
        check(found.graph_replays >= args.steps, "the timed steps were not graph replays")
        ours = Timing.of(found.steps_s)
        linear, attention = linear_floor(llm, batch), attention_floor(llm, batch, context)
        floor = linear.median_ms + attention.median_ms
        report.point(
            batch=batch,
            context=context,
            **ours.fields("tpot"),
            **linear.fields("floor_linear"),
            **attention.fields("floor_attention"),
            floor_ms=round(floor, 4),
            ratio=round(ours.median_ms / floor, 4),
            host_ms=round(sorted(found.host_ms)[len(found.host_ms) // 2], 4),
            prefill_s=round(found.prefill_s, 3),
        )
        report.bar(f"tpot/floor B={batch} context={context}", ours.median_ms / floor, BAR, "<=")
    if args.overhead:
        found = decode_times(llm, 64, 512, args.steps)
        host = sorted(found.host_ms)[len(found.host_ms) // 2]
        report.point(batch=64, context=512, **Timing.of(found.steps_s).fields("tpot"), host_ms=round(host, 4))
        report.bar("host ms per step outside the graph, B=64", host, 1.0, "<=")
    if args.transformers:
        report.finish(args.json)  # the peer compiles for a while: what is measured is safe
        peers(report, args, llm, config)
    report.finish(args.json)


def compare_methods(args: argparse.Namespace, config: dict[str, Any], points: list[tuple[int, int]]) -> None:
    """TPOT of each method at each point; the JSON is written after every arm."""
    report = Report(
        "decode_methods",
        notes={"shape": args.shape, "budget": args.budget, "steps": args.steps, "contexts": "random KV, not prefilled"},
    )
    found: dict[tuple[str, int, int], float] = {}
    scores: list[float] | None = None
    for method in args.methods.split(","):
        attention = (
            method if method == "full" else {"method": method, "budget": args.budget, "min_context": args.budget}
        )
        llm = make_llm(args, config, points, attention=attention, prefix_cache=True, seed=0)
        scores = check_method(llm, method, args.budget, scores)
        for batch, context in points:
            found[method, batch, context] = time_method(report, llm, method, batch, context, args.steps)
        report.finish(args.json)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    for batch, context in points:
        if {"full", "two_level"} <= set(args.methods.split(",")):
            ratio = found["two_level", batch, context] / found["full", batch, context]
            limit = 0.65 if config.get("kv_lora_rank") else 0.45
            report.bar(f"two_level / full, {batch} x {context}", ratio, limit, "<=")
    report.finish(args.json)


def check_method(llm: LLM, method: str, budget: int, expected: list[float] | None) -> list[float]:
    """Within the budget a method attends to everything: the log-probabilities of the first arm, in bf16 noise.

    With its gate at 0 for once, so that it does select, in the sixteen decode rows of a prompt that is dense before.
    """
    backend, gate = llm.engine.backend, getattr(llm.engine.backend, "gate", 0)
    if method != "full":
        backend.gate = 0
    prompt = random_prompts(llm.spec.vocab_size, 1, budget - 64, seed=9)[0]
    forced = random_prompts(llm.spec.vocab_size, 1, 16, seed=10)[0]
    request = {"prompt_token_ids": [*prompt, *forced], "dense_tokens": len(prompt)}
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    entries = llm.generate(request, params)[0].prompt_logprobs or []
    scores = [next(iter(entry.values())).logprob for entry in entries[-len(forced) :] if entry]
    if method != "full":
        backend.gate = gate
        check(llm.stats()["sparse_rows"] >= len(forced) - 1, f"{method}: the check was dense")
    check(len(scores) == len(forced), f"{method}: {len(scores)} scores for {len(forced)} tokens")
    if expected is not None:
        apart = nats_apart(llm, scores, expected)
        check(apart < TOLERANCE_NATS, f"{method} differs from the first arm by {apart:.3f} nats within its budget")
    return scores


def nats_apart(llm: LLM, scores: list[float], expected: list[float]) -> float:
    """How far log-probabilities are from others of the same tokens: the most, of a mixture of experts the mean."""
    apart = [abs(a - b) for a, b in zip(scores, expected, strict=True)]
    return max(apart) if llm.model.config.experts is None else sum(apart) / len(apart)


def time_method(report: Report, llm: LLM, method: str, batch: int, context: int, steps: int) -> float:
    """One point of one arm: remembered contexts, then decode steps, all graph replays and all sparse."""
    warmup = 8
    remember(llm, random_prompts(llm.spec.vocab_size, batch, context - warmup - 1, seed=0))
    before = llm.stats()
    times = decode_times(llm, batch, context, steps, warmup=warmup)
    after = llm.stats()
    check(times.graph_replays >= steps, f"{method}: the timed steps were not graph replays")
    extra: dict[str, Any] = {}
    if method != "full":
        rows = after["sparse_rows"] - before["sparse_rows"]
        check(rows >= steps * batch, f"{method}: {rows} sparse rows in {steps} steps of {batch}")
        extra = {"density": round(after["density"], 5), "index_bytes": after["index_bytes"]}
    timing = Timing.of(times.steps_s)
    host = round(sorted(times.host_ms)[steps // 2], 4)
    report.point(method=method, batch=batch, context=context, **timing.fields("tpot"), host_ms=host, **extra)
    return timing.median_ms


def make_llm(args: argparse.Namespace, config: dict[str, Any], points: list[tuple[int, int]], **options: Any) -> LLM:
    """One engine for all points; room is left on the device for transformers' own weights where it runs too."""
    llm = LLM(
        config,
        load_format="dummy",
        max_model_len=max(c for _, c in points) + 2048,
        max_num_seqs=64,
        max_batch_tokens=8192,
        kernels=args.kernels,
        **{"prefix_cache": False, "kv_memory": "84GiB" if args.transformers else None, **options},
    )
    fill_pool(llm)  # never time on zeros
    return llm


def peers(report: Report, args: argparse.Namespace, llm: LLM, config: dict[str, Any]) -> None:
    """transformers at a few points that our arm was measured at."""
    for batch, context in points_of(args.transformers):
        gc.collect()
        torch.cuda.empty_cache()
        theirs = transformers_tpot(llm, config, batch, context, args.steps)
        ours = next(p for p in report.points if (p["batch"], p["context"]) == (batch, context))["tpot_ms"]
        report.point(
            batch=batch,
            context=context,
            arm="transformers",
            tpot_ms=round(theirs, 4),
            speedup_of_ours=round(theirs / ours, 3),
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
