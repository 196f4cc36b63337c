"""Models that are a rule and a stopwatch: deterministic, for the virtual clock."""

import asyncio
import hashlib

from slipstream.atts.backends import Ask, BackendError, Turn
from slipstream.atts.pipeline.clock import run_virtual
from slipstream.atts.pipeline.run import Run

END = 0


def number(*words):
    """A number in [0, 1) from some words: the only randomness there is."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=6).digest()) / 2**48


class Model:
    """Writes bytes. A turn is letters; after ``answer_after`` tokens of chain, a boxed answer and the end.

    seconds: per token written. log: what was asked, in order. fail: (call, number of calls) -> exception or None.
    vocabulary: equal ones share ids.
    """

    can_score = True

    def __init__(self, name="model", *, answer_after=60, seconds=0.01, vocabulary="bytes", right=0.5, fail=None):
        self.name, self.vocabulary = name, vocabulary
        self.answer_after, self.seconds, self.right = answer_after, seconds, right
        self.log, self.running, self.most = [], 0, 0
        self.fail = fail or (lambda call, count: None)
        self.closed = 0

    async def open(self):
        self.log.append(("open",))

    async def close(self):
        self.closed += 1

    def counters(self):
        return {"prefill_tokens": 0.0}

    async def prompt(self, problem):
        return list(problem["prompt"].encode())

    async def encode(self, text):
        return list(text.encode())

    async def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")

    async def _work(self, call, seconds):
        self.log.append(call)
        failure = self.fail(call[0], sum(c[0] == call[0] for c in self.log))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(seconds)
            if failure is not None:
                raise failure
        finally:
            self.running -= 1

    async def extend(self, ids, ask: Ask):
        await self._work(("extend", len(ids), ask.seed, ask.ban_end), self.seconds * ask.max_tokens)
        return self.write(ids, ask)

    def write(self, ids, ask):
        text, prompt = bytes(ids), bytes(ids).index(b"?") + 1
        if len(text) - prompt >= self.answer_after:
            value = 42 if number(self.name, ask.seed) < self.right else 7 + int(2 * number(ask.seed))
            return Turn(list(b" so \\boxed{%d}" % value), 6, "stop", -3.0, 0.5)
        letters = [97 + int(26 * number(ask.seed, i)) for i in range(ask.max_tokens)]
        return Turn(letters, len(letters), "length", -0.1 * len(letters), 0.3)

    async def score(self, ids, start):
        await self._work(("score", len(ids), start), self.seconds)
        return [-number(self.name, bytes(ids[: i + 1])) for i in range(start, len(ids))]


def failing(kind, after=0, every=1):
    """A ``fail`` that raises a BackendError at the calls beyond ``after``."""
    return lambda call, which: (
        lambda c, n: BackendError(which, "as ordered") if c == call and n > after and n % every == 0 else None
    )


def problems(count=3):
    return [{"id": f"q{i}", "prompt": f"what is question {i}?", "answer": 42} for i in range(count)]


def scale(config, count=3, draft=None, target=None, **options):
    """A run on the virtual clock: its outcome, its virtual seconds, and both models."""
    draft, target = draft or Model("draft"), target or Model("target", seconds=0.03, right=0.9)
    outcome, seconds = run_virtual(Run(problems(count), draft, target, config, **options).run())
    return outcome, seconds, draft, target
