"""The three stages of a turn: the draft writes, the target's score is tested, the target goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

from slipstream.atts.backends import Ask, Backend, BackendError, Turn
from slipstream.atts.budget import Allowance
from slipstream.atts.config import ATTS
from slipstream.atts.conformal import Controller
from slipstream.atts.events import Decided, Drafted, Event, Failed, Limited, Looped, TakenOver
from slipstream.atts.pipeline.chain import DRAFT, TARGET, Chain, Together, repeated_share
from slipstream.atts.scores import View

T = TypeVar("T")
Verdict = Literal["accept", "takeover", "drop"]
Record = Callable[..., Any]


class Stages:
    """What can be done with a chain, each stage with its own limit of how many do it at once.

    record(type, chain, **fields): puts an event on record and returns it. A stage whose event is in the chain's past
    is not done again: its result is taken from there.
    """

    def __init__(
        self,
        config: ATTS,
        draft: Backend,
        target: Backend,
        controller: Controller,
        allowance: Allowance | None,
        record: Record,
    ) -> None:
        self._config, self._draft, self._target = config, draft, target
        self._controller, self._allowance, self._record = controller, allowance, record
        self._scorer = config.scorer
        self._drafting = asyncio.Semaphore(config.draft_concurrency)
        self._scoring = asyncio.Semaphore(config.score_concurrency)
        self._extending = asyncio.Semaphore(config.target_concurrency)
        # A target reads its weights in each step, for one chain as for sixteen, and where it shares a device the draft
        # waits for it. So its work begins together, except where the draft has nothing else to do.
        self._together = {
            slots: Together(config.gather, lambda: not self._drafting.locked())
            for slots in (self._scoring, self._extending)
        }
        self._taking = 0  # take-overs that run or wait

    # -- the draft writes

    async def draft(self, chain: Chain) -> Drafted | None:
        """A turn of the draft, pushed; None when the draft failed for good."""
        assert chain.context is not None
        gated = await self.gate(chain)
        event: Drafted | None = chain.recall("drafted")
        if event is None:
            if chain.recall("draft") is not None:
                return None
            ids, seed = chain.context.ids[DRAFT], chain.seed(self._config.seed, "draft")
            tops = self._scorer.tops if self._config.role == "both" and self._config.mode != "coin" else None
            tokens = self._room(chain, self._config.draft_tokens)
            try:
                turn, waited, busy = await self._at_work(
                    self._drafting, lambda: self._ask(self._draft, ids, tokens, seed, tops)
                )
            except BackendError as error:
                self._fail(chain, "draft", error, "drop")
                return None
            event = self._record(
                Drafted, chain, ids=turn.ids, tokens=turn.tokens, finish=turn.finish, logprob=turn.logprob,
                entropy=turn.entropy, wait_s=gated + waited, busy_s=busy,
            )  # fmt: skip
        assert event is not None
        await chain.context.push(DRAFT, event.ids)
        return event

    # -- the test

    async def verify(self, chain: Chain, drafted: Drafted, start: int) -> Verdict:
        """Score the turn, which begins at the target's token ``start``, test it, and say what is done with it."""
        gated = await self.gate(chain)
        failed = chain.recall("score")
        if failed is not None:
            return self._limited(chain) if failed.policy == "takeover" else failed.policy
        event: Decided | None = chain.recall("decided")
        if event is None:
            try:
                score, scored, waited, busy = await self._score(chain, drafted, start)
            except BackendError as error:
                policy = self._fail(chain, "score", error, self._config.on_failure).policy
                return self._limited(chain) if policy == "takeover" else policy
            alpha = self._allowance.alpha() if self._allowance is not None else self._config.alpha
            decision = self._controller.decide(chain.question, chain.turn, score, alpha)
            event = self._record(
                Decided, chain, nll=score, scored=scored, wait_s=gated + waited, busy_s=busy, **decision._asdict()
            )
        chain.tests += 1
        return self._limited(chain) if event.rejected else "accept"

    async def _score(self, chain: Chain, drafted: Drafted, start: int) -> tuple[float, int, float, float]:
        """The score, how many tokens the target read for it, seconds waited and worked."""
        assert chain.context is not None
        if self._config.mode == "coin":
            return 0.0, 0, 0.0, 0.0
        ids = chain.context.ids[TARGET]
        if not drafted.ids or start >= len(ids):
            raise BackendError("empty", "the draft wrote nothing that could be scored")
        repeated = repeated_share(drafted.ids, self._config.loop_ngram)
        if repeated >= self._config.loop_share:
            if chain.recall("looped") is None:
                self._record(Looped, chain, repeated=repeated)
            return math.inf, 0, 0.0, 0.0
        turn = Turn(drafted.ids, drafted.tokens, drafted.finish, drafted.logprob, drafted.entropy)
        view = View(ids, start, turn, self._target, (chain.question, chain.sample, chain.turn))
        score, waited, busy = await self._at_work(self._scoring, lambda: self._scorer(view))
        return score, len(ids) - start if self._scorer.reads_target else 0, waited, busy

    def _limited(self, chain: Chain) -> Verdict:
        """The hard limits: a turn that is to be taken over is kept where too many wait or the budget is spent."""
        if chain.recall("limited") is not None:
            return "accept"
        if (chain.turn, "taken_over") in chain.past:
            return "takeover"
        full = self._config.capacity is not None and self._taking >= self._config.capacity
        spent = self._allowance is not None and not self._allowance.affords()
        if full or spent:
            self._record(Limited, chain, reason="capacity" if full else "budget")
            return "accept"
        return "takeover"

    # -- the target goes on

    async def take_over(self, chain: Chain) -> TakenOver | Verdict:
        """A turn of the target, pushed; "accept" or "drop" when the target failed for good."""
        assert chain.context is not None
        event: TakenOver | None = chain.recall("taken_over")
        failed = chain.recall("take-over")
        if failed is not None:
            return failed.policy
        if event is None:
            self._taking += 1
            if self._allowance is not None:
                self._allowance.reserve()
            try:
                event = await self._continue(chain, await self.gate(chain))
            except BackendError as error:
                policy = "accept" if self._config.on_failure == "accept" and self._config.role == "both" else "drop"
                return self._fail(chain, "take-over", error, policy).policy
            finally:
                self._taking -= 1
                if self._allowance is not None:
                    self._allowance.release()
        else:
            await self.gate(chain)
        await chain.context.push(TARGET, event.ids)
        return event

    async def _continue(self, chain: Chain, gated: float) -> TakenOver:
        assert chain.context is not None
        ids, tokens = chain.context.ids[TARGET], self._room(chain, self._config.target_tokens)

        async def attempts() -> tuple[Turn, bool]:
            turn = await self._ask(self._target, ids, tokens, chain.seed(self._config.seed, "target"))
            if turn.ids:
                return turn, False
            again = chain.seed(self._config.seed, "target", 1)
            return await self._ask(self._target, ids, tokens, again, ban_end=True), True

        (turn, retried), waited, busy = await self._at_work(self._extending, attempts)
        event: TakenOver = self._record(
            TakenOver, chain, ids=turn.ids, tokens=turn.tokens, finish=turn.finish, retried=retried,
            wait_s=gated + waited, busy_s=busy,
        )  # fmt: skip
        return event

    # -- what they share

    async def gate(self, chain: Chain) -> float:
        """Wait for the others of the question, in the twin that has a barrier per turn; seconds waited."""
        if chain.gate is None:
            return 0.0
        clock = asyncio.get_running_loop().time
        began = clock()
        await chain.gate.arrive()
        return clock() - began

    def _room(self, chain: Chain, tokens: int) -> int:
        assert chain.context is not None
        limit = self._config.chain_tokens
        return tokens if limit is None else max(1, min(tokens, limit - chain.context.length))

    async def _ask(
        self, backend: Backend, ids: list[int], tokens: int, seed: int, tops: int | None = None, ban_end: bool = False
    ) -> Turn:
        ask = Ask(tokens, self._config.temperature, self._config.top_p, seed, tops, ban_end)
        return await backend.extend(ids, ask)

    async def _at_work(self, slots: asyncio.Semaphore, work: Callable[[], Awaitable[T]]) -> tuple[T, float, float]:
        """Do it when there is a slot: the result, seconds waited, seconds worked."""
        clock = asyncio.get_running_loop().time
        asked = clock()
        if slots in self._together:
            await self._together[slots].join()
        try:
            async with slots:
                began = clock()
                try:
                    result = await asyncio.wait_for(work(), self._config.timeout_s)
                except TimeoutError as error:
                    raise BackendError("timeout", f"no answer within {self._config.timeout_s:g} s") from error
                return result, began - asked, clock() - began
        finally:
            for group in self._together.values():
                group.look()

    def _fail(self, chain: Chain, stage: str, error: BackendError, policy: str) -> Any:
        event: Event = self._record(Failed, chain, stage=stage, what=f"{error.kind}: {error}", policy=policy)
        return event
