"""Counted on the engine: a rejected turn pays no second prefill, and the chains of a question share their prompt."""

import asyncio
from collections import Counter

import pytest

from slipstream import tasks
from slipstream.atts.backends import LocalBackend
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Ended, TakenOver
from slipstream.atts.pipeline.run import Run
from slipstream.scaling import local


class Counting(LocalBackend):
    """Remembers how many tokens each call came with, and what the engine then prefilled and took from its cache."""

    def __init__(self, llm):
        own = local(llm)
        super().__init__(own._generator, own._codec, name=own.name, max_length=own.max_length)
        self.calls = []

    async def _counted(self, kind, length, new, call):
        before = self.counters()
        result = await call
        spent = {name: value - before[name] for name, value in self.counters().items()}
        self.calls.append((kind, length, new, spent["prefill_tokens"], spent["cached_tokens"]))
        return result

    async def extend(self, ids, ask):
        return await self._counted("extend", len(ids), 0, super().extend(ids, ask))

    async def score(self, ids, start):
        return await self._counted("score", len(ids), len(ids) - start, super().score(ids, start))


@pytest.mark.parametrize("takeover", ["continue", "replace"])
def test_every_token_is_prefilled_once_but_for_the_last_page(draft, target, takeover):
    """One chain at a time, so that a call's share of the counters is its own. Every token that a call brings was
    either prefilled in it or came from the cache, and only what is new, and less than a page, is prefilled."""
    page = target.options.page_size
    problem = tasks.make("expression", 5, operations=18)
    prompt = draft.encode(problem.prompt, chat=True)
    assert len(prompt) > page
    config = ATTS(alpha=0.5, samples=3, turns=5, draft_tokens=2 * page, target_tokens=page + 7, window=1, settle=False,
                  takeover=takeover, answers="tagged")  # fmt: skip
    backend = Counting(target)
    target.engine.table.forget()
    outcome = asyncio.run(Run([{"id": "q", "prompt_token_ids": prompt}], local(draft), backend, config).run())
    kinds = Counter(type(event) for event in outcome.events)
    assert kinds[Ended] == 3 and kinds[TakenOver] and kinds[Decided]
    assert all(prefilled + cached == length for _, length, _, prefilled, cached in backend.calls)
    (kind, length, _, prefilled, _), *later = backend.calls
    assert kind == "score" and prefilled == length > len(prompt)  # the first chain brings the prompt
    for kind, _, new, prefilled, _ in later:
        assert prefilled < new + page, kind  # an extension brings nothing new
    assert {kind for kind, *_ in later} == {"score", "extend"}
    every = [sum(column) for column in list(zip(*backend.calls, strict=True))[1:]]
    assert every[2] < len(prompt) + every[1] + page * len(backend.calls) < every[0] / 1.5  # of all that came
