"""A needle in a long prompt, found by full attention and by two-level selection that reads an eighth of it."""

from slipstream import LLM, Full, SamplingParams, TwoLevel, Window, evaluation, tasks

CONTEXT, BUDGET = 2048, 256
greedy = SamplingParams(temperature=0, max_tokens=64)
problems = [tasks.make("needle_multikey", seed, num_tokens=CONTEXT) for seed in range(4)]

gated = {"budget": BUDGET, "min_context": BUDGET}  # sparse as soon as a request is longer than its budget
for attention in (Full(), Window(**gated), TwoLevel(**gated, blocks=16)):
    llm = LLM("slipstream-target", attention=attention, max_model_len=4096)
    # The context is read densely, the question arrives when attention is sparse already (protocol B of docs/tasks.md).
    prompts = [evaluation.split_prompt(llm, problem) for problem in problems]
    outputs = llm.generate(prompts, greedy)
    found = sum(tasks.verify(p, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True))
    stats = llm.stats()
    density, index = stats.get("density", 1.0), stats.get("index_bytes", 0) / llm.pool.bytes
    print(f"{type(attention).__name__}: {found} of 4 found, density {density:.2f}, index {index:.1%} of the KV")
