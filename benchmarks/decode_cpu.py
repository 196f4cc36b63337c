"""Does the engine pay on a CPU? Greedy tokens/s of the embedded target against transformers' ``generate``.

Same weights in fp32, same prompts, same number of new tokens, same process; the two take turns, and every token must be
the same before a ratio is printed. Each run includes its prefill.

    PYTHONPATH=src python benchmarks/decode_cpu.py --json benchmarks/results/cpu/decode_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness import Report, Timing, check
from transformers import AutoModelForCausalLM

from slipstream import LLM, SamplingParams, tasks
from slipstream.build import embedded_models

MODEL = "slipstream-target"
BARS = {1: 1.0, 8: 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30, help="lines of the programs that are the prompts")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    report = Report("decode_cpu", notes={"model": MODEL, "new_tokens": args.tokens})
    llm = LLM(MODEL, device="cpu", max_model_len=4096, prefix_cache=False)
    path = embedded_models()[MODEL]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    for batch, bar in BARS.items():
        prompts = [llm.encode(tasks.make("program", seed, steps=args.steps).prompt, chat=True) for seed in range(batch)]
        check(
            len({len(p) for p in prompts}) == 1, "prompts of one batch must be equally long: transformers pads nothing"
        )
        ids = torch.tensor(prompts)
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(args.repeats + 1):
            before = llm.stats()["decode_tokens"]
            start = time.perf_counter()
            ours = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            times["ours"].append(time.perf_counter() - start)
            check(llm.stats()["decode_tokens"] - before == batch * (args.tokens - 1), "our arm was not active")
            start = time.perf_counter()
            with torch.inference_mode():
                out = theirs.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=args.tokens,
                    max_new_tokens=args.tokens, eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            times["transformers"].append(time.perf_counter() - start)
            check(out[:, ids.shape[1] :].tolist() == ours, "the two engines do not give the same tokens")
        timings = {name: Timing.of(values[1:]) for name, values in times.items()}  # the first round warms up
        ratio = statistics.median(b / a for a, b in zip(times["ours"][1:], times["transformers"][1:], strict=True))
        report.point(
            batch=batch,
            prompt_tokens=ids.shape[1],
            **timings["ours"].fields("ours"),
            **timings["transformers"].fields("transformers"),
            ours_tokens_per_s=round(batch * args.tokens / timings["ours"].median_ms * 1e3, 1),
            transformers_tokens_per_s=round(batch * args.tokens / timings["transformers"].median_ms * 1e3, 1),
            ratio=round(ratio, 3),
        )
        report.bar(f"tokens/s over transformers' generate, batch {batch}", ratio, bar, ">=")
    report.finish(args.json)


if __name__ == "__main__":
    main()
