"""From a request body to the engine and back: prompts to token ids, jobs to deltas."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch

from slipstream.llm import LLM, Request
from slipstream.server.config import ServerConfig
from slipstream.server.door import Call, Gate
from slipstream.server.errors import ApiError, refusing
from slipstream.server.metrics import Metrics
from slipstream.server.reply import OPEN, Reply, Thinking
from slipstream.server.schemas import Asked, ChatRequest, CompletionRequest, parse_messages, parse_prompts
from slipstream.text import Codec
from slipstream.types import Delta, PeerLost

log = logging.getLogger("slipstream.server")
T = TypeVar("T")
MANY_DEATHS = 8  # requests that die one after the other before the engine counts as lost
MAX_PAUSE_S = 0.1  # a stream is never slower than this, however many there are
SHORT_TEXT = 4096  # characters; tokenizing more is not the event loop's work


@dataclass
class Job:
    """One prompt: what the engine is asked, the text it came as, and its chains' replies.

    thinks: whether the prompt ends inside ``<think>``; None where thinking is not split off.
    """

    request: Request
    text: str | None = None
    thinks: bool | None = None
    replies: list[Reply] = field(default_factory=list)

    @property
    def prompt_logprobs(self) -> list[Any]:
        """One entry per prompt token: None before ``prompt_logprobs_start``."""
        return [None] * (self.request.logprobs_start or 0) + list(self.request.prompt_logprobs or ())


class Service:
    """One engine, served. All methods run on the event loop; the engine runs on its own thread."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self.name = config.served_model_name or llm.name
        self.engine = llm.asynchronous()
        self.gate = Gate(config)
        self.metrics = Metrics(self.name, llm.stats)
        self.streams = 0  # that are open
        self._died = 0  # requests that died in the engine since one last came through
        self.certificate: dict[str, Any] | None = None  # of the last request with scaling
        try:
            self.codec: Codec | None = llm.codec
        except ValueError:
            self.codec = None
        self.max_model_len = llm.engine.limits.max_model_len
        self.token_text = lru_cache(maxsize=65536)(self._token_text)

    def _token_text(self, token: int) -> str:
        return f"token_id:{token}" if self.codec is None else self.codec.token_text(token)

    @property
    def lost(self) -> str | None:
        """Why nothing can be served any more; None while something can. A device that is broken fails every step, and
        the engine goes on trying: so many in a row are taken for that."""
        failure = self.engine.failure
        if failure is not None:
            return f"its thread died of {type(failure).__name__}: {failure}"
        return f"the last {self._died} requests died in a step" if self._died >= MANY_DEATHS else None

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"The model {name!r} does not exist; this is {self.name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    # -- text to token ids

    async def _aside(self, size: int, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Text work, on another thread when it is long. What it says of a bad text is the client's to hear."""
        with refusing():
            return work(*args, **kwargs) if size <= SHORT_TEXT else await asyncio.to_thread(work, *args, **kwargs)

    async def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        if not texts:
            return []
        with refusing("prompt"):
            encode = self.llm.codec.tokenizer.encode

        def work() -> list[list[int]]:
            return [list(encode(text, add_special_tokens=special)) for text in texts]

        return await self._aside(sum(map(len, texts)), work)

    async def encode_chat(self, value: Any, add_generation_prompt: bool, template: dict[str, Any]) -> list[int]:
        messages = parse_messages(value)
        with refusing("messages"):
            codec = self.llm.codec
        taken = {"self", "messages", *inspect.signature(codec.tokenizer.apply_chat_template).parameters}
        if bad := [name for name in template if name in taken]:
            raise ApiError(400, f"{bad[0]} cannot be set by a client", param="chat_template_kwargs")
        size = sum(len(message["content"]) for message in messages)
        return await self._aside(size, codec.chat, messages, add_generation_prompt=add_generation_prompt, **template)

    async def decode(self, ids: list[int]) -> str:
        """Text of any tokens, special ones written out."""
        size = self.llm.spec.vocab_size
        if any(not 0 <= token < size for token in ids):
            raise ApiError(400, f"token ids must be in 0..{size - 1}", param="tokens")
        with refusing("tokens"):
            decode = self.llm.codec.tokenizer.decode
        return str(await self._aside(len(ids), decode, ids, skip_special_tokens=False))

    def prompt_text(self, job: Job) -> str:
        """For echo: the text that came, or the tokens' with special ones written out."""
        if job.text is not None or self.codec is None:
            return job.text or ""
        return str(self.codec.tokenizer.decode(job.request.prompt_ids, skip_special_tokens=False))

    # -- bodies to jobs

    async def completion_jobs(self, body: CompletionRequest) -> list[Job]:
        self.check_model(body.model)
        if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            raise ApiError(400, "max_tokens is 0: nothing is asked but echo or prompt_logprobs", param="max_tokens")
        prompts = parse_prompts(body.prompt, self.config.max_prompts)
        encoded = iter(await self.encode([p for p in prompts if isinstance(p, str)], body.add_special_tokens))
        return [
            Job(self._request(body, next(encoded)), text=prompt)
            if isinstance(prompt, str)
            else Job(self._request(body, prompt))
            for prompt in prompts
        ]

    async def chat_jobs(self, body: ChatRequest) -> list[Job]:
        self.check_model(body.model)
        ids = await self.encode_chat(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        tail = self.llm.codec.tokenizer.decode(ids[-8:], skip_special_tokens=False)
        return [Job(self._request(body, ids), thinks=tail.rstrip().endswith(OPEN))]

    def _request(self, body: Asked, ids: list[int]) -> Request:
        params, asked, most = body.params(self.config), body.max_tokens or 1, self.max_model_len
        if len(ids) + asked > most:
            message = f"This model's maximum context length is {most} tokens. However, you requested "
            message += f"{len(ids) + asked} tokens ({len(ids)} in the prompt, {asked} in the completion). "
            message += "Please reduce the length of the prompt or of the completion."
            raise ApiError(400, message, code="context_length_exceeded", param=body.prompt_field)
        start: int | None = body.prompt_logprobs_start
        if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
            params = replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
        if params.prompt_logprobs is None:
            start = None
        elif not 0 <= body.prompt_logprobs_start < len(ids):
            message = f"prompt_logprobs_start = {start} is outside the prompt of {len(ids)} tokens"
            raise ApiError(400, message, param="prompt_logprobs_start")
        with refusing(body.prompt_field):
            request = self.llm.check(ids, params)
        return replace(request, generate=body.max_tokens != 0, logprobs_start=start, salt=body.cache_salt)

    def admit(self, call: Call, jobs: Sequence[Job]) -> None:
        """Take room in the queue for the jobs; the door gives it back when the call is over."""
        chains = [job.request.params.n for job in jobs]
        tokens = [len(job.request.prompt_ids) for job in jobs]
        self.gate.hold(call, sum(chains), sum(a * b for a, b in zip(chains, tokens, strict=True)))
        call.facts |= {"prompts": len(jobs), "prompt_tokens": sum(tokens)}
        index = 0
        for job in jobs:
            params, thinks = job.request.params, job.thinks
            for index in range(index, index + params.n):  # noqa: B020 - goes on where the job before ended
                thinking = None if thinks is None else Thinking(thinks)
                job.replies.append(Reply(index, self.codec, params.stop, thinking, params.min_tokens))
            index += 1

    # -- jobs to deltas

    async def stream(self, call: Call, jobs: Sequence[Job]) -> AsyncGenerator[list[tuple[Job, Delta]], None]:
        """Tokens of all chains as they come: bundles of what is new since the last, one delta a chain in each."""
        job_of = {job.request: job for job in jobs}
        self.streams += 1
        try:
            async with aclosing(self.engine.events(*job_of, pause_s=self._pause_s)) as bundles:
                async for events in bundles:
                    deltas = [(job_of[event.request], event.delta) for event in events if event.delta is not None]
                    if len(deltas) > 1:
                        deltas = _joined(deltas)
                    now = time.perf_counter()
                    for job, delta in deltas:
                        reply = job.replies[delta.index]
                        if reply.last_s is not None:
                            self.metrics.gap(now - reply.last_s)
                        reply.last_s = now
                        self._count(job, delta)
                    for event in events:
                        if event.finished:
                            deltas += self._ended(call, job_of[event.request])
                    if deltas:
                        yield deltas
        except RuntimeError as error:
            raise self._failure(call, jobs, error) from error
        finally:
            self.streams -= 1

    def _pause_s(self) -> float:
        """Between two chunks of one stream: what a chunk costs (a write to a socket above all) is a share of the time
        that grows with the streams, unless they share what they may send."""
        return min(MAX_PAUSE_S, self.streams / self.config.stream_rate)

    async def finish(self, call: Call, jobs: Sequence[Job]) -> list[tuple[Job, Delta]]:
        """Serve jobs to their ends: one delta per chain, with all of it."""
        tasks = [asyncio.create_task(self.engine.run(job.request)) for job in jobs]
        try:
            await asyncio.gather(*tasks)
        except RuntimeError as error:
            raise self._failure(call, jobs, error) from error
        finally:
            for task in tasks:
                task.cancel()
        deltas = []
        for job in jobs:
            deltas += self._ended(call, job)
            for c in job.request.completions:
                logprobs = None if c.logprobs is None else tuple(c.logprobs)
                delta = Delta(c.index, tuple(c.token_ids), logprobs, c.finish_reason, c.stop_reason)
                self._count(job, delta)
                deltas.append((job, delta))
        return deltas

    def _count(self, job: Job, delta: Delta) -> None:
        before = job.replies[delta.index].num_tokens
        if before == 0 and delta.index == 0:
            self.metrics.began(len(job.request.prompt_ids))
        self.metrics.grew(len(delta.token_ids))
        if delta.finish_reason:
            self.metrics.chain_ended(delta.finish_reason, before + len(delta.token_ids))

    def _ended(self, call: Call, job: Job) -> list[tuple[Job, Delta]]:
        """A request is over. One that only scored its prompt has no chain to say so: here is its delta."""
        self._died = 0
        self.metrics.ended(job.request.metrics)
        made = sum(len(completion.token_ids) for completion in job.request.completions)
        call.facts["completion_tokens"] = call.facts.get("completion_tokens", 0) + made
        call.facts.setdefault("ttft_s", job.request.metrics.ttft_s)
        if job.request.generate:
            return []
        scored = Delta(0, (), finish_reason="length")
        self._count(job, scored)
        return [(job, scored)]

    def _failure(self, call: Call, jobs: Sequence[Job], error: RuntimeError) -> ApiError:
        """A step that died takes its requests with it; an engine that died takes everything."""
        causes = [job.request.error for job in jobs if job.request.error is not None]
        log.error("the engine failed on request %s: %s", call.request_id, error)
        if any(isinstance(cause, PeerLost) for cause in causes):
            lost = "a process that held this request's keys and values was lost: try again"
            return ApiError(503, lost, code="peer_lost", headers={"Retry-After": "1"})
        if not any(isinstance(cause, (MemoryError, torch.OutOfMemoryError)) for cause in causes):
            self._died += 1  # too much for the memory says nothing about the next request
        return ApiError(500, f"the engine failed on this request (request id {call.request_id})", code="engine_error")


def _joined(deltas: Sequence[tuple[Job, Delta]]) -> list[tuple[Job, Delta]]:
    """One delta per chain, with all of its tokens."""
    chains: dict[tuple[Request, int], tuple[Job, list[Delta]]] = {}
    for job, delta in deltas:
        chains.setdefault((job.request, delta.index), (job, []))[1].append(delta)
    return [(job, _sum(parts) if len(parts) > 1 else parts[0]) for job, parts in chains.values()]


def _sum(parts: Sequence[Delta]) -> Delta:
    ids = tuple([token for part in parts for token in part.token_ids])
    logprobs = tuple([entry for part in parts for entry in part.logprobs or ()]) or None
    return replace(parts[-1], token_ids=ids, logprobs=logprobs)
