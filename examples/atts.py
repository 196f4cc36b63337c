"""A small draft thinks, the target verifies: four problems, the rate held and certified, events as they come."""

import asyncio

from slipstream import tasks
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Ended
from slipstream.atts.report import summary
from slipstream.scaling import scale

problems = []
for seed in range(4):
    problem = tasks.make("expression", seed, operations=10)
    problems.append({"id": f"expression {seed}", "prompt": problem.prompt, "answer": problem.answer})

config = ATTS(alpha=0.25, samples=4, draft_tokens=48, target_tokens=48, takeover="replace", answers="tagged")


def tell(event):
    if isinstance(event, Decided) and event.rejected:
        print(f"{event.question}, sample {event.sample}: the target rewrites turn {event.turn}, score {event.nll:.3f}")
    if isinstance(event, Ended):
        print(f"{event.question}, sample {event.sample}: {event.reason}, answer {event.answer}, right: {event.correct}")


# draft and target may be embedded models, directories, or servers (http://, vllm+http://, sglang+http://)
outcome = asyncio.run(
    scale(problems, draft="slipstream-draft", target="slipstream-target", config=config, on_event=tell)
)
result = summary(outcome)
print({name: result[name] for name in ("pass@1", "maj@4", "pass@4", "draft_tokens", "target_tokens", "wall_s")})
certificate = outcome.certificate
print(f"rate {certificate.rate:.3f} for alpha 0.25 over {certificate.tests} tests; per question:")
print({name: round(group.rate, 3) for name, group in certificate.questions.items()})
