"""What the pipeline asks of a model, and our own engine behind it (servers are in :mod:`slipstream.atts.servers`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from slipstream.types import Completion, Generator, Logprob, SamplingParams

SWITCH_S = 5e-4
"""Python lets a thread that waits for the interpreter in after 5 ms, which is as long as a decode step."""


class BackendError(RuntimeError):
    """A model gave no usable answer. kind: connection, timeout, http 500, refused, engine, empty, nan."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Ask:
    """How to write on. tops: alternatives to report beside each token (0: its own log-probability; None: nothing).
    ban_end: the first token may not be the end token."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    tops: int | None = None
    ban_end: bool = False


@dataclass
class Turn:
    """What a model wrote: its token ids without the end token.

    tokens: how many it generated (ids may be of another kind, see :class:`slipstream.atts.servers.OpenAIServer`).
    finish: ``stop`` (its end token) or ``length``. logprob: natural-log probability, summed over the tokens; entropy:
    of the next-token distribution, mean over the tokens, from the likeliest ones; both None where not asked for.
    first_tops: text -> log-probability of the likeliest first tokens.
    """

    ids: list[int]
    tokens: int
    finish: str
    logprob: float | None = None
    entropy: float | None = None
    first_tops: dict[str, float] = field(default_factory=dict)


class Backend(Protocol):
    """A model by token ids. Backends of equal ``vocabulary`` understand each other's ids.

    can_score: it gives log-probabilities of given text. All calls raise :class:`BackendError` when they fail for good.
    """

    name: str
    can_score: bool

    @property
    def vocabulary(self) -> Hashable: ...

    async def open(self) -> None:
        """Get ready. Raises ``ValueError``, before any work, for a model that is not there or not the one meant."""
        ...

    async def prompt(self, problem: Mapping[str, Any]) -> list[int]:
        """Token ids of a problem: its ``prompt_token_ids``, its ``messages`` by chat template, or its ``prompt``."""
        ...

    async def encode(self, text: str) -> list[int]:
        """Text in the middle of a chain: no begin-of-sequence token."""
        ...

    async def decode(self, ids: Sequence[int]) -> str: ...

    async def extend(self, ids: Sequence[int], ask: Ask) -> Turn:
        """Write on where ``ids`` ends."""
        ...

    async def score(self, ids: Sequence[int], start: int) -> list[float]:
        """Natural-log probability of every token of ``ids[start:]``, the first included."""
        ...

    def counters(self) -> dict[str, float]:
        """Tokens prefilled and found in the cache so far, where the backend knows."""
        ...

    async def close(self) -> None: ...


def entropy_of(tops: Sequence[float]) -> float:
    """Entropy in nats of a distribution of which the largest log-probabilities are known; the rest counts as one."""
    rest = max(0.0, 1.0 - sum(map(math.exp, tops)))
    return -sum(math.exp(x) * x for x in tops if x > -math.inf) - (rest * math.log(rest) if rest > 1e-9 else 0.0)


class LocalBackend:
    """Any :class:`slipstream.types.Generator`, ours above all: what was scored is in its cache when it is extended.

    codec: a :class:`slipstream.text.Codec` or the like; None for problems of token ids whose answers nobody reads.
    max_length: most tokens of a chain. close: called when the run is over.
    Engines of one process share its interpreter: ``sys.setswitchinterval`` is lowered to ``SWITCH_S``, if above.
    """

    can_score = True

    def __init__(
        self,
        generator: Generator,
        codec: Any = None,
        *,
        name: str = "local",
        vocabulary: Hashable = None,
        max_length: int | None = None,
        chat: bool = True,
        close: Any = None,
    ) -> None:
        self._generator, self._codec, self._chat, self._close = generator, codec, chat, close
        self.name, self.max_length = name, max_length
        self.vocabulary = vocabulary if vocabulary is not None else vocabulary_of(codec)
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))

    async def open(self) -> None:
        """Nothing to do: the engine runs."""

    async def prompt(self, problem: Mapping[str, Any]) -> list[int]:
        return prompt_ids(problem, self._codec, self._chat)

    async def encode(self, text: str) -> list[int]:
        return encode_middle(self._codec, text)

    async def decode(self, ids: Sequence[int]) -> str:
        return self._codec.decode(ids) if self._codec is not None else ""

    async def extend(self, ids: Sequence[int], ask: Ask) -> Turn:
        params = SamplingParams(
            max_tokens=ask.max_tokens, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed, logprobs=ask.tops,
            min_tokens=int(ask.ban_end),
        )  # fmt: skip
        return self._turn(await self._ask(self._generator.extend(ids, params)), bool(ask.tops))

    async def score(self, ids: Sequence[int], start: int) -> list[float]:
        logprobs = await self._ask(self._generator.score(ids[:start], ids[start:]))
        if len(logprobs) != len(ids) - start:
            raise BackendError("empty", f"{len(logprobs)} log-probabilities for a turn of {len(ids) - start} tokens")
        return list(logprobs)

    def counters(self) -> dict[str, float]:
        stats: dict[str, float] = getattr(self._generator, "stats", dict)()
        return {name: stats[name] for name in ("prefill_tokens", "cached_tokens") if name in stats}

    async def close(self) -> None:
        if self._close is not None:
            self._close()

    async def _ask(self, answer: Any) -> Any:
        try:
            return await answer
        except ValueError as error:
            raise BackendError("refused", str(error)) from error
        except RuntimeError as error:
            raise BackendError("engine", str(error)) from error

    def _turn(self, completion: Completion, tops: bool) -> Turn:
        ids = list(completion.token_ids)
        ended = completion.finish_reason == "stop" and bool(ids) and ids[-1] == completion.stop_reason
        if ended:
            ids.pop()
        turn = Turn(ids, len(ids), "stop" if completion.finish_reason == "stop" else "length")
        if completion.logprobs is not None:
            entries = completion.logprobs[: len(ids)]
            turn.logprob = sum(entry[token].logprob for entry, token in zip(entries, ids, strict=True))
            if entries and tops:
                turn.entropy = sum(entropy_of([c.logprob for c in e.values()]) for e in entries) / len(entries)
                turn.first_tops = self._named(entries[0])
        return turn

    def _named(self, entry: Mapping[int, Logprob]) -> dict[str, float]:
        if self._codec is None:
            return {}
        return {self._codec.token_text(token): candidate.logprob for token, candidate in entry.items()}


def vocabulary_of(codec: Any) -> Hashable:
    """Equal for tokenizers that give every id the same text."""
    if codec is None:
        return "ids"
    vocabulary = getattr(getattr(codec, "tokenizer", None), "get_vocab", None)
    return hash(frozenset(vocabulary().items())) if vocabulary is not None else id(codec)


def prompt_ids(problem: Mapping[str, Any], codec: Any, chat: bool) -> list[int]:
    """See :meth:`Backend.prompt`; a plain prompt becomes the user's message where there is a chat template."""
    if "prompt_token_ids" in problem:
        return list(problem["prompt_token_ids"])
    if not {"prompt", "messages"} & problem.keys():
        raise ValueError(f"problem {problem.get('id')!r} has no prompt, messages or prompt_token_ids")
    if codec is None:
        raise ValueError("a problem in text needs a tokenizer: name one, or give prompt_token_ids")
    if "messages" in problem:
        return list(codec.chat(problem["messages"]))
    if chat and getattr(codec.tokenizer, "chat_template", None):
        return list(codec.chat([{"role": "user", "content": problem["prompt"]}]))
    return list(codec.encode(problem["prompt"]))


def encode_middle(codec: Any, text: str) -> list[int]:
    """Ids of text that continues other text: what the tokenizer puts around every text is left out."""
    if codec is None:
        raise ValueError("models of different vocabularies need a tokenizer each, to read what the other wrote")
    return list(codec.tokenizer.encode(text, add_special_tokens=False))
