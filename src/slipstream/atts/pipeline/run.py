"""A run: all chains of all questions in one live window, or behind the barriers of the synchronous twins."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.atts.answers import ANSWERS, clusters, math_equal
from slipstream.atts.backends import Backend, BackendError
from slipstream.atts.budget import Allowance
from slipstream.atts.config import ATTS
from slipstream.atts.conformal import Certificate, Controller
from slipstream.atts.events import Decided, Drafted, Ended, Event, Failed, Log, LogFailed, TakenOver
from slipstream.atts.pipeline.chain import DRAFT, TARGET, Chain, Context, Gate
from slipstream.atts.pipeline.stages import Stages

Problem = Mapping[str, Any]


@dataclass
class Outcome:
    """What came of a run. events: of all its sessions, in order. majority: answer of each question's largest cluster,
    and whether it is right. texts: what a chain of that cluster wrote (any chain, where none has an answer), of chains
    of this session. counters: tokens prefilled and found in the cache by each backend, in this session."""

    config: ATTS
    certificate: Certificate
    events: list[Event]
    majority: dict[str, tuple[str | None, bool | None]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    counters: dict[str, dict[str, float]] = field(default_factory=dict)


class Run:
    """Scale problems with two models.

    problems: with ``id`` and a prompt (see :meth:`Backend.prompt`), and where known ``answer`` or ``check`` (answer ->
    bool). log: see :class:`slipstream.atts.events.Log`. on_event: called with every new event. controller: decides
    instead of the one that ``config`` describes.
    Raises ``ValueError``, before any work, for what cannot be done.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        draft: Backend,
        target: Backend,
        config: ATTS | None = None,
        *,
        log: str | Path | None = None,
        resume: bool = False,
        on_event: Callable[[Event], None] | None = None,
        controller: Controller | None = None,
    ) -> None:
        self.config = config = config or ATTS()
        if not problems:
            raise ValueError("there are no problems to scale")
        if not all("id" in problem for problem in problems):
            raise ValueError("every problem needs an id")
        self._problems = {str(problem["id"]): problem for problem in problems}
        if len(self._problems) < len(problems):
            raise ValueError("two problems have the same id")
        self._backends = (draft, target)
        self._on_event = on_event
        self._where, self._resume = log, resume
        self._controller = controller or Controller(config.conformal)
        self._allowance = None
        if config.budget is not None:
            self._allowance = Allowance(
                config.budget, config.price_list, config.target_tokens, len(problems) * config.samples, config.turns
            )
        self._answers = ANSWERS[config.answers]()
        self._chains = {
            (question, sample): Chain(question, sample)
            for question in self._problems
            for sample in range(config.samples)
        }
        self._events: list[Event] = []
        self._ended: dict[str, list[Ended]] = defaultdict(list)
        self._settled: set[str] = set()
        self._same: dict[tuple[str, str], bool] = {}
        self._pool: ProcessPoolExecutor | None = None

    async def run(self) -> Outcome:
        """All chains to their ends. Raises :class:`LogFailed` when the log cannot be written."""
        log = None
        try:
            for backend in dict.fromkeys(self._backends):
                await backend.open()
            if self.config.role == "both" and self.config.mode != "coin":
                if self.config.scorer.reads_target and not self._backends[TARGET].can_score:
                    raise ValueError(
                        f"{self._backends[TARGET].name} gives no log-probabilities of a prompt: "
                        "choose --score draft, entropy or grade"
                    )
            self._log = log = Log(self._where, self._header(), self._resume)
            self._remember(log.history)
            self._began = asyncio.get_running_loop().time() - (self._events[-1].at_s if self._events else 0.0)
            draft, target = self._backends
            self._stages = Stages(self.config, draft, target, self._controller, self._allowance, self._record)
            await self._run_all()
            counters = {side: b.counters() for side, b in zip(("draft", "target"), self._backends, strict=True)}
            majority = {question: await self._majority(question) for question in self._problems}
            texts = {question: await self._text(question) for question in self._problems}
            return Outcome(self.config, self._controller.certificate(), self._events, majority, texts, counters)
        finally:
            if log is not None:
                log.close()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            for backend in dict.fromkeys(self._backends):
                await backend.close()

    # -- the past

    def _header(self) -> dict[str, Any]:
        plain = [{k: v for k, v in p.items() if k != "check"} for p in self._problems.values()]
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
        names = {"draft": self._backends[DRAFT].name, "target": self._backends[TARGET].name}
        return {**self.config.header(), **names, "problems": digest}

    def _remember(self, history: Sequence[Event]) -> None:
        """Take up earlier sessions: every test is told to the controller again, in its order, none is done again."""
        for event in history:
            if isinstance(event, Decided):
                again = self._controller.decide(event.question, event.turn, event.nll, event.alpha)
                if (again.number, again.rejected) != (event.number, event.rejected):
                    raise ValueError(f"test {event.number} of the log was decided otherwise: it is from other code")
            self._take(event)
            self._chains[event.question, event.sample].remember(event)

    def _take(self, event: Event) -> None:
        """Count an event, new or old."""
        self._events.append(event)
        if isinstance(event, Ended):
            self._ended[event.question].append(event)
        if self._allowance is None:
            return
        if isinstance(event, Drafted):
            self._allowance.charge_draft(event.tokens, 0)
        elif isinstance(event, Decided):
            self._allowance.charge_draft(0, event.scored)
            self._allowance.tested()
        elif isinstance(event, TakenOver):
            self._allowance.charge_take_over(event.tokens)
        elif isinstance(event, Ended):
            self._allowance.ended(event.tests)

    def _record(self, kind: type[Event], chain: Chain, **fields: Any) -> Event:
        at: dict[str, Any] = {
            "question": chain.question,
            "sample": chain.sample,
            "turn": chain.turn,
            "at_s": self._now(),
        }
        event = kind(**at, **fields)
        try:
            self._log.append(event)
        except LogFailed as error:
            if self._on_event is not None and error.errno is not None:  # once, with the reason
                self._on_event(Failed(**at, stage="log", what=str(error), policy="stop"))
            raise
        self._take(event)
        if self._on_event is not None:
            self._on_event(event)
        return event

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    # -- all chains

    async def _run_all(self) -> None:
        waiting = [c for c in self._chains.values() if (e := self._ended.get(c.question)) is None
                   or all(x.sample != c.sample for x in e)]  # fmt: skip
        for question in self._ended:
            await self._settle(question)
        try:
            async with asyncio.TaskGroup() as group:
                if self.config.schedule == "async":
                    await self._live_window(group, waiting)
                else:
                    await self._by_question(group, waiting)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _live_window(self, group: asyncio.TaskGroup, waiting: Sequence[Chain]) -> None:
        slots = asyncio.Semaphore(self.config.window)
        for chain in waiting:
            await slots.acquire()
            chain.task = group.create_task(self._run_chain(chain))
            chain.task.add_done_callback(lambda _: slots.release())

    async def _by_question(self, group: asyncio.TaskGroup, waiting: Sequence[Chain]) -> None:
        questions: dict[str, list[Chain]] = defaultdict(list)
        for chain in waiting:
            questions[chain.question].append(chain)
        for chains in questions.values():
            gate = Gate(len(chains)) if self.config.schedule == "turn" else None
            for chain in chains:
                chain.gate = gate
                chain.task = group.create_task(self._run_chain(chain))
            await asyncio.wait([chain.task for chain in chains if chain.task is not None])

    async def _run_chain(self, chain: Chain) -> None:
        found: list[str] = []
        try:
            reason = "settled" if chain.question in self._settled else await self._live(chain, found)
        except asyncio.CancelledError:
            if chain.question not in self._settled:
                raise
            reason = "settled"
        except BackendError as error:  # text to tokens, or back: the stages record their own
            self._record(Failed, chain, stage="text", what=f"{error.kind}: {error}", policy="drop")
            reason = "failed"
        finally:
            if chain.gate is not None:
                chain.gate.leave()
        answer = found[-1] if found and reason != "settled" else None
        correct = await self._correct(chain.question, answer) if reason != "settled" else None
        self._record(Ended, chain, reason=reason, answer=answer, correct=correct, tests=chain.tests)
        if reason != "settled":
            await self._settle(chain.question)

    async def _live(self, chain: Chain, found: list[str]) -> str:
        """From the prompt to the end, and why it ended. found: its answers, kept up to date."""
        problem = self._problems[chain.question]
        prompts = [await backend.prompt(problem) for backend in self._backends]
        chain.context = Context(self._backends, prompts)
        while True:
            limit = self.config.chain_tokens
            if limit is not None and chain.context.length >= limit:
                return "tokens"
            reason = await self._turn(chain, found)
            if reason is not None:
                return reason
            chain.turn += 1
            if chain.turn >= self.config.turns:
                return "turns"

    async def _turn(self, chain: Chain, found: list[str]) -> str | None:
        """One turn; why the chain is over with it, if it is."""
        config, context = self.config, chain.context
        assert context is not None
        mark, drafted = context.mark(), None
        if config.role != "target":
            drafted = await self._stages.draft(chain)
            if drafted is None:
                return "failed"
            done = await self._is_done(chain, found, drafted.finish)
            tested = config.tests_answers and config.role == "both" and drafted.ids  # a bare end token is no turn
            if done and not tested:
                return "answer"
            verdict = "accept" if config.role == "draft" else await self._stages.verify(chain, drafted, mark[TARGET])
            if verdict != "takeover":
                await self._stages.gate(chain)
                return "failed" if verdict == "drop" else self._ending(done, found, drafted.finish)
            if config.takeover == "replace":
                context.reset(mark)
            elif config.chain_tokens is not None and context.length >= config.chain_tokens:
                return "tokens"
        taken = await self._stages.take_over(chain)
        if isinstance(taken, str):
            if taken == "drop" or drafted is None:
                return "failed"
            if config.takeover == "replace":
                await context.push(DRAFT, drafted.ids)
            return self._ending(await self._is_done(chain, found, drafted.finish), found, drafted.finish)
        return self._ending(await self._is_done(chain, found, taken.finish), found, taken.finish)

    def _ending(self, done: bool, found: list[str], finish: str) -> str | None:
        if done:
            return "answer"
        return "stopped" if finish == "stop" and not found else None

    # -- answers

    async def _is_done(self, chain: Chain, found: list[str], finish: str) -> bool:
        """Look for answers in the text so far: may the chain stop with the last of them?"""
        assert chain.context is not None
        config = self.config
        found[:] = self._answers.find(chain.context.text, finish == "stop")
        last = found[-config.agreement :]
        if len(last) == config.agreement and chain.turn + 1 >= config.min_turns:
            if all([await self._is_same(answer, last[-1]) for answer in last]):
                return True
        if found and finish == "stop" and config.nudge:
            await chain.context.push(DRAFT, await self._backends[DRAFT].encode(config.nudge))
        return False

    async def _is_same(self, one: str, other: str) -> bool:
        if one == other or self._answers.same(one, other):
            return True
        if not (self.config.symbolic and self._answers.symbolic):
            return False
        if (one, other) not in self._same:
            self._pool = self._pool or ProcessPoolExecutor(max_workers=2)
            loop = asyncio.get_running_loop()
            self._same[one, other] = await loop.run_in_executor(self._pool, math_equal, one, other)
        return self._same[one, other]

    async def _correct(self, question: str, answer: str | None) -> bool | None:
        problem = self._problems[question]
        if "check" in problem:
            return answer is not None and bool(problem["check"](answer))
        if problem.get("answer") is None:
            return None
        expected = str(problem["answer"])
        return answer is not None and (self._answers.correct(answer, expected) or await self._is_same(answer, expected))

    async def _votes(self, question: str) -> list[list[Ended]]:
        """The ends of a question's chains that have an answer, in clusters of equal answers, the largest first; of
        equally large ones that of the first sample, whoever came first."""
        ends = sorted((e for e in self._ended[question] if e.answer is not None), key=lambda end: end.sample)
        answers = [str(event.answer) for event in ends]
        equal = {(a, b): await self._is_same(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]}
        return [[ends[index] for index in cluster] for cluster in clusters(answers, equal)]

    async def _majority(self, question: str) -> tuple[str | None, bool | None]:
        votes = await self._votes(question)
        if votes:
            return votes[0][0].answer, votes[0][0].correct
        return None, await self._correct(question, None)

    async def _text(self, question: str) -> str:
        votes = await self._votes(question)
        ends = votes[0] if votes else self._ended[question]
        contexts = [self._chains[question, end.sample].context for end in ends]
        return next((context.text for context in contexts if context is not None), "")

    async def _settle(self, question: str) -> None:
        """Cancel a question's other chains when they cannot change its majority."""
        left = self.config.samples - len(self._ended[question])
        if not self.config.settle or left == 0 or question in self._settled:
            return
        sizes = [len(cluster) for cluster in await self._votes(question)]
        if sizes and sizes[0] - (sizes[1] if len(sizes) > 1 else 0) > left:
            self._settled.add(question)
            ended = {event.sample for event in self._ended[question]}
            for sample in range(self.config.samples):
                task = self._chains[question, sample].task
                if sample not in ended and task is not None and task is not asyncio.current_task():
                    task.cancel()
