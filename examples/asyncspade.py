"""Selection that leaves the critical path: AsyncSpade against two-level selection that every layer waits for."""

from slipstream import LLM, AsyncSpade, SamplingParams, TwoLevel, tasks

BUDGET = 256
greedy = SamplingParams(temperature=0, max_tokens=None)
problems = [tasks.make("program_shuffled", seed, steps=30) for seed in range(4)]
gated = {"budget": BUDGET, "min_context": BUDGET, "blocks": 16}  # sparse as soon as a chain is longer than the budget

for attention in (
    TwoLevel(**gated),
    AsyncSpade(**gated, measure=8),  # in depth: what the layer below lets foresee, the token just drawn included
    AsyncSpade(**gated, predictor="last"),  # in time: the query before, turned to the next position
    AsyncSpade(**gated, predictor="analog", window=128, measure=8),
    # Heads whose query came out unlike its prediction attend to everything, in this step only.
    AsyncSpade(**gated, predictor="analog", window=128, measure=8, confidence=0.5),
):
    llm = LLM("slipstream-target", attention=attention, max_model_len=2048)
    outputs = llm.generate([llm.encode(problem.prompt, chat=True) for problem in problems], greedy)
    solved = sum(tasks.verify(p, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True))
    stats = llm.stats()
    heads = stats["sparse_rows"] * llm.spec.num_layers * llm.spec.num_kv_heads
    overlap, repaired = stats.get("asyncspade_overlap"), stats.get("asyncspade_repaired", 0) / heads
    about = "" if overlap is None else f", {overlap:.0%} of the true sets found, {repaired:.1%} of the heads repaired"
    name = f"{type(attention).__name__} {getattr(attention, 'predictor', '')}"
    print(f"{name}: {solved} of 4 solved, density {stats['density']:.2f}{about}")
