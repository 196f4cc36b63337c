"""Chat requests with ``scaling``: many chains of a draft, verified by the model that is served, one answer (ATTS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from slipstream.atts.backends import Backend
from slipstream.atts.config import ATTS
from slipstream.atts.events import Decided, Drafted, TakenOver
from slipstream.atts.pipeline.run import Outcome, Run
from slipstream.llm import LLM
from slipstream.scaling import local, open_model
from slipstream.server.reply import OPEN, Thinking
from slipstream.types import reject_unknown

# What a client may set. The rest decides how much of the machine a run takes at once, or how long it may hold on.
OPTIONS = (
    "alpha", "mode", "score", "takeover", "samples", "turns", "draft_tokens", "target_tokens", "chain_tokens",
    "temperature", "top_p", "token_budget", "answers", "test_answers", "min_turns", "agreement", "settle",
    "loop_ngram", "loop_share", "gamma", "gamma_turn", "gamma_question", "seed",
)  # fmt: skip
_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "Any": str}


@dataclass
class Scaled:
    """What test-time scaling answers: the majority's text, thinking apart; why it ends (``stop``: some chain has found
    an answer); the certificate; tokens per model (``{"draft": {"prompt_tokens": ..., ...}, "target": ...}``)."""

    content: str
    reasoning: str | None = None
    certificate: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, dict[str, int]] = field(default_factory=dict)
    finish_reason: str = "stop"


class Scale(Protocol):
    """Answers a conversation. ``ValueError`` or ``TypeError`` is the client's mistake, ``RuntimeError`` an engine's
    failure; cancelling the task cancels everything behind it."""

    def chains(self, options: Mapping[str, Any]) -> int:
        """How many chains it would take. Raises as the call would, before any work."""
        ...

    async def __call__(
        self, messages: list[dict[str, str]], options: Mapping[str, Any], max_tokens: int | None
    ) -> Scaled: ...


class Scaler:
    """A draft in front of the model that is served.

    draft: an ``LLM``, which the caller closes, or the address of a server (:func:`slipstream.scaling.open_model`).
    defaults: what a request does not say. most_chains: most samples that it may ask for.
    Every request has a controller of its own: its certificate is about its own tests, and no score of one shows in
    the decisions of another.
    """

    def __init__(self, draft: LLM | str, target: LLM, defaults: ATTS, most_chains: int = 128) -> None:
        self._draft, self._target, self._defaults, self._most = draft, target, defaults, most_chains

    def chains(self, options: Mapping[str, Any]) -> int:
        return self._config(options).samples

    async def __call__(
        self, messages: list[dict[str, str]], options: Mapping[str, Any], max_tokens: int | None
    ) -> Scaled:
        config, target = self._config(options), local(self._target)
        draft: Backend = local(self._draft) if isinstance(self._draft, LLM) else open_model(self._draft)
        problem = {"id": "chat", "messages": messages}
        prompt = await target.prompt(problem)
        lengths = [most for side in (draft, target) if (most := getattr(side, "max_length", None)) is not None]
        lengths += [config.chain_tokens] if config.chain_tokens is not None else []
        lengths += [len(prompt) + max_tokens] if max_tokens is not None else []
        config = replace(config, chain_tokens=min(lengths))
        if len(prompt) >= min(lengths):
            raise ValueError(f"the prompt has {len(prompt)} tokens, and a chain may have {min(lengths)} with it")
        outcome = await Run([problem], draft, target, config).run()
        tail = self._target.codec.tokenizer.decode(prompt[-8:], skip_special_tokens=False)
        return _scaled(outcome, len(prompt), tail.rstrip().endswith(OPEN))

    def _config(self, options: Mapping[str, Any]) -> ATTS:
        """The run's options. Raises ``ValueError`` or ``TypeError`` for what cannot be or may not be asked."""
        reject_unknown("scaling", options, OPTIONS)
        for name, value in options.items():
            kind = str(ATTS.__dataclass_fields__[name].type).partition(" ")[0]
            if value is None or not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise ValueError(f"scaling.{name} must be a {kind.replace('Any', 'str')}, got {value!r}")
        config = replace(self._defaults, **options)
        if config.samples > self._most:
            raise ValueError(f"scaling.samples = {config.samples} exceeds this server's limit of {self._most}")
        return config


def _scaled(outcome: Outcome, num_prompt: int, thinks: bool) -> Scaled:
    answer, text = outcome.majority["chat"][0], outcome.texts["chat"]
    reasoning, content = Thinking(thinks).push(text, is_last=True)
    found = outcome.certificate
    bound = None
    if found.window_bound is not None and found.tests:
        bound = min(1.0, found.alpha + found.window_bound * found.window / found.tests)
    certificate = found.as_dict() | {"bound": bound, "answer": answer, "samples": outcome.config.samples}
    del certificate["questions"]  # there is one
    written = {"draft": 0, "target": 0}
    for event in outcome.events:
        if isinstance(event, Drafted | TakenOver):
            written["draft" if isinstance(event, Drafted) else "target"] += event.tokens
    usage = {name: {"prompt_tokens": num_prompt, "completion_tokens": count} for name, count in written.items()}
    usage["target"]["scored_tokens"] = sum(event.scored for event in outcome.events if isinstance(event, Decided))
    return Scaled(content, reasoning or None, certificate, usage, "stop" if answer is not None else "length")
