"""Our own server behind the backends that speak to servers: same numbers as the engine, and its cache is used."""

import asyncio

import httpx
import pytest

from slipstream import tasks
from slipstream.atts.backends import Ask
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Ended, Failed, TakenOver
from slipstream.atts.pipeline.run import Run
from slipstream.atts.servers import OpenAIServer, VLLMServer
from slipstream.scaling import local

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
from slipstream.server.app import create_app  # noqa: E402

PROBLEM = tasks.make("expression", 3, operations=14)


def ours(kind, llm):
    transport = httpx.ASGITransport(create_app(llm))
    return kind(
        "http://localhost", client=httpx.AsyncClient(transport=transport, base_url="http://localhost"), retries=0
    )


def test_scores_are_the_engines_and_the_prefix_comes_from_the_cache(target):
    """A turn is drafted, then scored, then extended: each call prefills less than a page beyond what is new."""
    page, ids = target.options.page_size, target.encode(PROBLEM.prompt, chat=True)

    async def work():
        server = ours(VLLMServer, target)
        await server.open()
        assert await server.prompt({"messages": [{"role": "user", "content": PROBLEM.prompt}]}) == ids
        turn = await server.extend(ids, Ask(100, 0.8, seed=1, tops=2))
        assert len(turn.ids) == 100 and turn.finish == "length"
        before = server.counters()
        logprobs = await server.score([*ids, *turn.ids], len(ids))
        after = server.counters()
        assert sum(logprobs) == pytest.approx(turn.logprob, abs=1e-3) and len(logprobs) == 100
        assert after["prefill_tokens"] - before["prefill_tokens"] <= 100 + page
        assert after["cached_tokens"] - before["cached_tokens"] >= len(ids) - page > 0
        assert logprobs == pytest.approx(await local(target).score([*ids, *turn.ids], len(ids)), abs=1e-4)
        await server.extend([*ids, *turn.ids], Ask(4, seed=2))
        assert server.counters()["prefill_tokens"] - after["prefill_tokens"] <= page
        await server.close()

    asyncio.run(work())


def test_the_end_token_is_banned_by_min_tokens(target):
    whole = [*target.encode(PROBLEM.prompt, chat=True), *target.codec.encode(PROBLEM.completion)]

    async def work():
        server = ours(VLLMServer, target)
        await server.open()
        assert (await server.extend(whole, Ask(8))).ids == []
        banned = await server.extend(whole, Ask(8, ban_end=True))
        assert banned.ids and banned.ids[0] not in target.spec.eos_token_ids
        await server.close()

    asyncio.run(work())


def test_text_only_clients_can_score_here(target):
    async def work():
        server = ours(OpenAIServer, target)
        await server.open()
        prompt = list(PROBLEM.prompt.encode())
        turn = await server.extend(prompt, Ask(8, tops=2))
        found = await server.score(prompt + turn.ids, len(prompt))
        await server.close()
        return server.can_score, found

    can_score, found = asyncio.run(work())
    assert can_score and found and all(value <= 0 for value in found)


def test_a_run_with_the_target_behind_our_server(draft, target):
    problems = [{"id": "a", "prompt_token_ids": draft.encode(PROBLEM.prompt, chat=True), "answer": PROBLEM.answer}]
    config = ATTS(alpha=0.5, samples=2, turns=4, draft_tokens=16, target_tokens=16, answers="tagged", settle=False)

    async def work():
        server = ours(VLLMServer, target)
        server._codec = target.codec
        return await Run(problems, local(draft), server, config).run()

    outcome = asyncio.run(work())
    kinds = {type(event) for event in outcome.events}
    assert Failed not in kinds and {Decided, TakenOver, Ended} <= kinds
    assert outcome.counters["target"]["cached_tokens"] > 0
