"""The embedded model thinks aloud on one problem, then solves a few more at once and is checked."""

from slipstream import LLM, SamplingParams, tasks

llm = LLM("slipstream-target", max_model_len=4096)
greedy = SamplingParams(temperature=0, max_tokens=None)

# One problem, streamed: a program of five lines, executed in the chain of thought.
problem = tasks.make("program", seed=1, steps=5)
print(problem.prompt, "\n")
for chunk in llm.stream(llm.encode(problem.prompt, chat=True), greedy):
    print(chunk.text, end="", flush=True)
print("\n\nexpected:", problem.answer, "\n")

# Many problems in one batch, each verified.
problems = [tasks.make("needle_single", seed, num_tokens=512) for seed in range(4)]
outputs = llm.generate([llm.encode(p.prompt, chat=True) for p in problems], greedy)
right = sum(tasks.verify(p, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True))
print(f"{right} of {len(problems)} needles found")

# How likely a continuation is, the prompt's keys and values reused from the cache.
prompt, answer = llm.encode(problem.prompt, chat=True), llm.codec.encode(problem.completion)
print(f"log-probability of the ideal chain: {sum(llm.score(prompt, answer)):.2f}")
print(llm.stats())
