"""``LLM``: the Python face. Text or token ids in, text and token ids out, in the words that vLLM's users know."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral
from typing import Any, TypeVar

import torch

from slipstream.build import DEFAULT_MODEL, Options, build, parse_attention
from slipstream.engine.asynchronous import AsyncEngine
from slipstream.engine.request import Event, Request, StopCheck
from slipstream.text import Codec, GrowingText, StopText
from slipstream.types import (
    Completion,
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    SamplingParams,
    reject_unknown,
)

Prompt = str | Sequence[int] | Mapping[str, Any]
Key = TypeVar("Key")


@dataclass(frozen=True)
class TextChunk:
    """New text and tokens of one chain on a stream; ``finish_reason`` is set on the chain's last chunk.

    Text may lag behind the tokens: half a character and the possible beginning of a stop string are held back.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class LLM:
    """A model, its KV cache and an engine.

    model: an embedded model's name, a Hugging Face directory or hub id, or (with ``load_format="dummy"``) a config as
    a dict. options: the fields of :class:`slipstream.build.Options`; an unknown one raises ``TypeError`` that names
    the nearest.

    >>> llm = LLM("slipstream-target", max_model_len=4096)
    >>> llm.generate("...", SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text

    Not for several threads at once; :meth:`asynchronous` gives a face that is.
    """

    def __init__(self, model: Any = DEFAULT_MODEL, **options: Any) -> None:
        reject_unknown("LLM", options, ["model", *(option.name for option in fields(Options))])
        self.options = Options(**options)
        parts = build(model, self.options)
        self.name, self.identity, self.spec, self.memory = parts.name, parts.identity, parts.spec, parts.memory
        self.model, self.pool, self.engine = parts.model, parts.pool, parts.engine
        self._codec, self._ranks = parts.codec, parts.ranks
        self._inbox: dict[Request, deque[Event]] = {}
        self._lock = threading.Lock()
        self._asynchronous: AsyncEngine | None = None

    # -- what it is

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def codec(self) -> Codec:
        """The tokenizer's face. Raises ``ValueError`` for a model that has none."""
        if self._codec is None:
            raise ValueError(f"{self.name} has no tokenizer: give prompts as token ids, stop_token_ids instead of stop")
        return self._codec

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights, their precision and the attention method: equal settings, equal fingerprint."""
        digest = hashlib.sha256(f"{self.spec} {parse_attention(self.options.attention)}".encode())
        for tensor in (self.model.embedding, self.model.layers[-1].down.dense_weight()):
            digest.update(tensor[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of the engine, and the bytes of the KV pool."""
        return {"model": self.name, "kv_pool_bytes": self.pool.bytes, **self.engine.stats()}

    # -- text and ids

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt; ``chat=True`` makes it the user's turn of the model's chat template, if it has one."""
        if chat and getattr(self.codec.tokenizer, "chat_template", None):
            return self.codec.chat([{"role": "user", "content": prompt}])
        return self.codec.encode(prompt)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt["prompt_token_ids"]
            prompt = prompt.get("prompt", ())
            if not isinstance(prompt, str):
                raise ValueError("a prompt dict needs 'prompt' (text) or 'prompt_token_ids'")
        return self.codec.encode(prompt) if isinstance(prompt, str) else prompt

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """The request that a prompt makes. Raises ``ValueError``, before any work, when it cannot be served."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
        request = self._request(prompt, params)
        self.engine.check(request)
        return request

    # -- generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete one prompt or many; outputs in the order of the prompts.

        A prompt is text, a list of token ids, or a dict with either as "prompt" or "prompt_token_ids"; "dense_tokens"
        in the dict prefills only so many of them densely and runs the rest of the prompt as decode steps.
        params: one for all, or one for each. Everything is checked before any work; a prompt that cannot be served
        raises ``ValueError`` naming its index.
        """
        listed: list[Any] = [prompts] if _is_single(prompts) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(listed)
        else:
            each = list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(each)} sampling params")
        work = []
        for index, (prompt, own) in enumerate(zip(listed, each, strict=True)):
            try:
                request = self.check(prompt, own)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}" if len(listed) > 1 else str(error)) from None
            ids_only = {"prompt_token_ids": request.prompt_ids, "dense_tokens": request.dense_tokens}
            work.append((index, ids_only, own))
        outputs: dict[int, RequestOutput] = {}
        for index, output in self.as_completed(work):
            outputs[index] = replace(output, prompt=_text_of(listed[index]))
        return [outputs[index] for index in range(len(listed))]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or many, through the model's chat template."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        return self.generate([self.codec.chat(conversation, **template) for conversation in conversations], params)

    def score(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> list[float]:
        """Natural-log probability of every continuation token, the first included; cached prefix KV is reused."""
        request = self._submit(Request.to_score(prompt_ids, continuation_ids), keep_news=True)
        try:
            while not self._next_event(request).finished:
                pass
        finally:
            self._forget(request)
        return request.scores

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextChunk]:
        """Text as it comes, chains interleaved. Leaving the loop early cancels the request and frees its pages.

        A bad request raises ``ValueError`` here, a good one starts with the loop.
        """
        return self._chunks(self.check(prompt, params))

    def _chunks(self, request: Request) -> Iterator[TextChunk]:
        params = self._submit(request, keep_news=True).params
        texts = [
            StopText(self._codec, params.stop, params.min_tokens) if self._codec else None for _ in range(params.n)
        ]
        try:
            finished = False
            while not finished:
                _, delta, finished = self._next_event(request)
                if delta is None:
                    continue
                growing, piece = texts[delta.index], ""
                if growing is not None:
                    piece = growing.push(delta.token_ids)
                    piece += growing.finish() if delta.finish_reason else ""
                yield TextChunk(delta.index, piece, delta.token_ids, delta.finish_reason, delta.stop_reason)
        finally:
            self._forget(request)

    def as_completed(
        self, prompts: Iterable[tuple[Key, Prompt, SamplingParams]]
    ) -> Iterator[tuple[Key, RequestOutput]]:
        """Outputs as they finish, for a stream of (key, prompt, params) of any length: only a window is in flight.

        Leaving the loop early, Ctrl-C included, cancels what is in flight.
        """
        window = 2 * self.options.max_num_seqs
        source = iter(prompts)
        keys: dict[Request, Key] = {}
        exhausted = False
        try:
            while keys or not exhausted:
                while len(keys) < window and not exhausted:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                        break
                    keys[self._submit(self._request(item[1], item[2]))] = item[0]
                if keys:
                    self._step()
                for request in [r for r in keys if self._is_over(r)]:
                    key = keys.pop(request)
                    self._forget(request)
                    yield key, self._output(request)
        finally:
            for request in keys:
                self._forget(request)

    # -- requests on their way

    def asynchronous(self) -> AsyncEngine:
        """The ``Generator`` face over the same engine, on a thread of its own, which alone drives it from then on."""
        if self._asynchronous is None:
            if self._inbox:
                raise RuntimeError("a stream or as_completed loop of this LLM is not over: finish or close it first")
            self._asynchronous = AsyncEngine(self.engine, self._stop_check)
        return self._asynchronous

    def close(self) -> None:
        """Stop the asynchronous face, and let go of a cache rank, if there is one. The engine holds memory only.

        With ``tensor_parallel_size`` above 1 the other ranks end, and with them this engine, for good.
        """
        if self._asynchronous is not None:
            self._asynchronous.close()
            self._asynchronous = None
        self.engine.backend.close()
        self._ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        dense = prompt.get("dense_tokens") if isinstance(prompt, Mapping) else None
        stop_check = self._stop_check(params) if params.stop else None
        return Request(self._ids(prompt), params, stop_check=stop_check, dense_tokens=dense)

    def _stop_check(self, params: SamplingParams) -> StopCheck:
        """What the engine asks after each token: the stop string that a chain's text has reached, if any."""
        watched = [StopText(self.codec, params.stop, params.min_tokens) for _ in range(params.n)]
        seen = [0] * params.n

        def check(chain: int, token_ids: list[int]) -> str | None:
            watched[chain].push(token_ids[seen[chain] :])
            seen[chain] = len(token_ids)
            return watched[chain].stopped_by

        return check

    def _submit(self, request: Request, keep_news: bool = False) -> Request:
        """Hand a request to the engine. Its inbox holds all news in order, or only the latest."""
        if self._asynchronous is not None:
            raise RuntimeError(
                "this LLM is driven by its asynchronous face now; await its methods, or close() it first"
            )
        with self._lock:
            self.engine.add(request)
            self._inbox[request] = deque(maxlen=None if keep_news else 1)
        return request

    def _step(self) -> None:
        """One step of the engine; its news go to the requests that they are about."""
        with self._lock:
            for event in self.engine.step():
                if event.request in self._inbox:
                    self._inbox[event.request].append(event)

    def _next_event(self, request: Request) -> Event:
        inbox = self._inbox[request]
        while not inbox:
            self._step()
        event = inbox.popleft()
        if event.finished and request.error is not None:
            raise RuntimeError(f"the engine failed on this request: {request.error}") from request.error
        return event

    def _is_over(self, request: Request) -> bool:
        inbox = self._inbox[request]
        return bool(inbox) and inbox[-1].finished

    def _forget(self, request: Request) -> None:
        with self._lock:
            inbox = self._inbox.pop(request, None)
            if inbox is not None and not (inbox and inbox[-1].finished):
                self.engine.cancel(request.request_id)

    # -- outputs

    def _output(self, request: Request) -> RequestOutput:
        if request.error is not None:
            raise RuntimeError(f"the engine failed on this request: {request.error}") from request.error
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is not None:
            prompt_logprobs = [None if entry is None else self._named(entry) for entry in prompt_logprobs]
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=list(request.prompt_ids),
            outputs=[self._completion(c, request.params) for c in request.completions],
            prompt_logprobs=prompt_logprobs,
            metrics=request.metrics,
        )

    def _completion(self, chain: Completion, params: SamplingParams) -> CompletionOutput:
        text, logprobs, total = "", None, None
        if self._codec is not None:
            growing = StopText(self._codec, params.stop, params.min_tokens) if params.stop else GrowingText(self._codec)
            growing.push(chain.token_ids)
            _ = growing.finish() if isinstance(growing, StopText) else growing.flush()
            text = growing.text
        if chain.logprobs is not None:
            logprobs = [self._named(entry) for entry in chain.logprobs]
            pairs = zip(chain.token_ids, chain.logprobs, strict=True)
            total = sum(entry[token].logprob for token, entry in pairs)
        return CompletionOutput(
            index=chain.index,
            token_ids=chain.token_ids,
            logprobs=logprobs,
            finish_reason=chain.finish_reason,
            stop_reason=chain.stop_reason,
            text=text,
            cumulative_logprob=total,
        )

    def _named(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        if self._codec is None:
            return entry
        return {token: replace(value, decoded_token=self._codec.token_text(token)) for token, value in entry.items()}


def _is_single(prompts: Any) -> bool:
    """Text, a dict or a flat list of ids is one prompt; an empty list is no prompt at all."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return len(prompts) > 0 and isinstance(prompts[0], Integral)


def _text_of(prompt: Prompt) -> str | None:
    """The text of a prompt that came with one."""
    return prompt.get("prompt") if isinstance(prompt, Mapping) else prompt if isinstance(prompt, str) else None
