"""Talk to ``slipstream serve`` with the openai package: stream a chain of thought, then score a text."""

import sys

import openai

from slipstream import tasks

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
problem = tasks.make("program", seed=1, steps=5)
print(problem.prompt, "\n")

# The thinking comes apart from the answer.
chunks = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": problem.prompt}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in chunks:
    delta = chunk.choices[0].delta if chunk.choices else None
    print(getattr(delta, "reasoning", None) or getattr(delta, "content", None) or "", end="", flush=True)
print(f"\n\nexpected {problem.answer}; {chunk.usage.completion_tokens} tokens")

# How likely a text is, and only its end: what lies before comes from the prefix cache.
text = f"{problem.prompt}\n{problem.completion}"
scored = client.completions.create(
    model=model, prompt=text, max_tokens=0, extra_body={"prompt_logprobs": 0, "prompt_logprobs_start": 100}
)
entries = [next(iter(entry.values())) for entry in scored.choices[0].prompt_logprobs if entry]
print(f"log-probability of {len(entries)} tokens: {sum(entry['logprob'] for entry in entries):.2f}")
