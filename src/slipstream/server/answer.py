"""Jobs to a response, whole or streamed, in the shape of completions or of chats; and test-time scaling's seam."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from slipstream.server.door import Call
from slipstream.server.errors import ApiError, refusing
from slipstream.server.reply import chat_logprobs, completion_logprobs, prompt_logprobs
from slipstream.server.scaled import Scale
from slipstream.server.schemas import ChatRequest, CompletionRequest, parse_messages
from slipstream.server.service import Job, Service
from slipstream.server.streaming import EventStream, sse, to_json, unless_gone
from slipstream.types import Delta

log = logging.getLogger("slipstream.server")
Chunks = AsyncGenerator[bytes, None]
T = TypeVar("T")
LARGE = 4096  # tokens and their alternatives: some ten milliseconds


# Fields of a chat request that mean something where many chains give one answer; the others must be left out.
WITH_SCALING = {
    "scaling", "messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "seed",
}  # fmt: skip


class Answer:
    """Bodies to responses."""

    def __init__(self, service: Service, scale: Scale | None) -> None:
        self._service, self._scale = service, scale

    async def completion(self, body: CompletionRequest, http: HttpRequest) -> Response:
        return await self._respond(body, await self._service.completion_jobs(body), http)

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        if body.scaling is not None:
            return await self._scaled(body, http)
        return await self._respond(body, await self._service.chat_jobs(body), http)

    async def _respond(self, body: CompletionRequest | ChatRequest, jobs: list[Job], http: HttpRequest) -> Response:
        call: Call = http.scope["slipstream.call"]
        self._service.admit(call, jobs)
        if body.stream:
            return EventStream(self._chunks(call, body, jobs), self._service.config)
        return await unless_gone(http.receive, self._finish(call, body, jobs))

    async def _finish(self, call: Call, body: CompletionRequest | ChatRequest, jobs: list[Job]) -> Response:
        deltas = await self._service.finish(call, jobs)

        def whole() -> Response:  # choice by choice: writing JSON lets no other thread run
            choices = b",".join([to_json(self._choice(body, job, delta)) for job, delta in deltas])
            rest = to_json(self._frame(call, body) | {"usage": _usage(jobs)} | self._beside(body, jobs))
            return Response(rest[:-1] + b',"choices":[' + choices + b"]}", media_type="application/json")

        return await _aside(_is_large(body, jobs), whole)

    def _frame(self, call: Call, body: CompletionRequest | ChatRequest) -> dict[str, Any]:
        prefix, kind = "cmpl", "text_completion"
        if isinstance(body, ChatRequest):
            prefix, kind = "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
        made = int(time.time())
        return {"id": f"{prefix}-{call.request_id}", "object": kind, "created": made, "model": self._service.name}

    async def _chunks(self, call: Call, body: CompletionRequest | ChatRequest, jobs: list[Job]) -> Chunks:
        """The events of a stream, those of one moment in one chunk. Tokens whose text is held back (half a character)
        make none, unless asked for."""
        frame = self._frame(call, body)
        if body.streaming.include_usage:
            frame["usage"] = None
        if isinstance(body, ChatRequest):
            opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield b"".join([sse(frame | {"choices": [{"index": r.index, **opening}]}) for r in jobs[0].replies])
        beside, is_large = self._beside(body, jobs), _is_large(body, jobs)
        async with aclosing(self._service.stream(call, jobs)) as bundles:
            async for deltas in bundles:
                brings_prompt = is_large and any(not job.replies[delta.index].num_tokens for job, delta in deltas)
                if data := await _aside(brings_prompt, self._events, frame, body, jobs, deltas, beside):
                    yield data
        if body.streaming.include_usage:
            yield sse(frame | {"choices": [], "usage": _usage(jobs)})

    def _events(
        self,
        frame: dict[str, Any],
        body: CompletionRequest | ChatRequest,
        jobs: Sequence[Job],
        deltas: Sequence[tuple[Job, Delta]],
        beside: dict[str, Any],
    ) -> bytes:
        """All that is to be said of some deltas. The first event takes ``beside`` along and leaves it empty."""
        events = []
        for job, delta in deltas:
            if event := self._event(frame, body, jobs, job, delta, beside):
                events.append(event)
                beside.clear()
        return b"".join(events)

    def _event(
        self,
        frame: dict[str, Any],
        body: CompletionRequest | ChatRequest,
        jobs: Sequence[Job],
        job: Job,
        delta: Delta,
        beside: dict[str, Any],
    ) -> bytes:
        """A delta as an event, empty where there is nothing to show."""
        choice = self._choice(body, job, delta)
        if body.streaming.continuous_usage_stats:
            beside = beside | {"usage": _usage(jobs)}
        text = choice["delta" if isinstance(body, ChatRequest) else "text"]
        is_asked = body.return_token_ids or body.top_logprobs_wanted is not None
        return sse(frame | {"choices": [choice]} | beside) if text or delta.finish_reason or is_asked else b""

    # -- choices

    def _choice(self, body: CompletionRequest | ChatRequest, job: Job, delta: Delta) -> dict[str, Any]:
        """A chain, whole or the next of its stream."""
        choice: dict[str, Any] = {"index": job.replies[delta.index].index}
        choice |= self._said(body, job, delta) if isinstance(body, ChatRequest) else self._text(body, job, delta)
        choice |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _text(self, body: CompletionRequest, job: Job, delta: Delta) -> dict[str, Any]:
        """In the shape of ``text_completion``; the first of a chain brings what is asked about its prompt."""
        request, reply, name = job.request, job.replies[delta.index], self._service.token_text
        is_first, (_, text) = reply.num_tokens == 0, reply.take(delta)
        more: dict[str, Any] = {}
        tokens, entries = delta.token_ids, delta.logprobs or ()
        if is_first and body.echo:
            text = self._service.prompt_text(job) + text
            tokens, entries = (*request.prompt_ids, *tokens), (*job.prompt_logprobs, *entries)
        if is_first and body.return_token_ids:
            more["prompt_token_ids"] = request.prompt_ids
        if is_first and body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(job.prompt_logprobs, name)
        table = None if body.logprobs is None else completion_logprobs(tokens, entries, name, reply)
        return {"text": text, "logprobs": table, **more}

    def _said(self, body: ChatRequest, job: Job, delta: Delta) -> dict[str, Any]:
        """In the shape of ``chat.completion`` or its chunks."""
        reasoning, text = job.replies[delta.index].take(delta)
        table = None
        if body.logprobs:
            table = chat_logprobs(delta.token_ids, delta.logprobs or (), self._service.token_text, body.top_logprobs)
        if body.stream:
            return {"delta": _parts(reasoning, text), "logprobs": table}
        said = {"role": "assistant", "reasoning": reasoning or None, "reasoning_content": reasoning or None}
        return {"message": said | {"content": text}, "logprobs": table}

    def _beside(self, body: CompletionRequest | ChatRequest, jobs: list[Job]) -> dict[str, Any]:
        """What vLLM puts beside the choices of a chat."""
        beside: dict[str, Any] = {}
        if isinstance(body, ChatRequest) and body.return_token_ids:
            beside["prompt_token_ids"] = jobs[0].request.prompt_ids
        if isinstance(body, ChatRequest) and body.prompt_logprobs is not None:
            beside["prompt_logprobs"] = prompt_logprobs(jobs[0].prompt_logprobs, self._service.token_text)
        return beside

    # -- test-time scaling

    async def _scaled(self, body: ChatRequest, http: HttpRequest) -> Response:
        """Many chains of a draft, checked by this model, one answer."""
        if self._scale is None:
            raise ApiError(400, "scaling needs a draft model: start the server with --draft", param="scaling")
        self._service.check_model(body.model)
        fields, given = ChatRequest.model_fields, body.model_fields_set
        if bad := [name for name in given - WITH_SCALING if getattr(body, name) != fields[name].default]:
            raise ApiError(400, f"{bad[0]} cannot be asked together with scaling", param=bad[0])
        body.params(self._service.config)  # refuses what no request may ask
        options: dict[str, Any] = {n: getattr(body, n) for n in ("temperature", "top_p", "seed") if n in given}
        options |= body.scaling or {}
        messages, ids = parse_messages(body.messages), await self._service.encode_chat(body.messages, True, {})
        call: Call = http.scope["slipstream.call"]
        with refusing("scaling"):
            chains = self._scale.chains(options)
        self._service.gate.hold(call, chains, chains * len(ids))
        call.facts |= {"chains": chains, "prompt_tokens": len(ids)}
        answer = self._scaled_answer(self._scale, call, body, messages, options)
        if body.stream:
            return EventStream(_one_event(answer), self._service.config)
        return JSONResponse(await unless_gone(http.receive, answer))

    async def _scaled_answer(
        self, scale: Scale, call: Call, body: ChatRequest, messages: list[dict[str, str]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole answer, which is one chunk where it is streamed."""
        with refusing("scaling"):
            try:
                result = await scale(messages, options, body.max_tokens)
            except RuntimeError as error:
                log.error("test-time scaling failed on request %s: %s", call.request_id, error)
                raise ApiError(
                    500, f"test-time scaling failed (request id {call.request_id})", code="engine_error"
                ) from error
        self._service.certificate = result.certificate
        said: dict[str, Any] = {"role": "assistant", "content": result.content}
        said |= {"reasoning": result.reasoning, "reasoning_content": result.reasoning}
        choice = {"index": 0, "delta" if body.stream else "message": said, "finish_reason": result.finish_reason}
        call.facts["completion_tokens"] = sum(model.get("completion_tokens", 0) for model in result.usage.values())
        used: dict[str, Any] = {
            name: sum(model.get(name, 0) for model in result.usage.values())
            for name in ("prompt_tokens", "completion_tokens")
        }
        used |= {"total_tokens": sum(used.values()), "models": result.usage}
        return self._frame(call, body) | {"choices": [choice], "usage": used, "scaling": result.certificate}


def _is_large(body: CompletionRequest | ChatRequest, jobs: Sequence[Job]) -> bool:
    """Whether an answer holds so many tokens and alternatives that putting it together is not the event loop's work."""
    with_prompt = body.prompt_logprobs is not None or (isinstance(body, CompletionRequest) and body.echo)
    each = 1 + max(body.top_logprobs_wanted or 0, body.prompt_logprobs or 0)
    tokens = sum(len(chain.token_ids) for job in jobs for chain in job.request.completions)
    if with_prompt:
        tokens += sum(len(job.request.prompt_ids) * len(job.replies) for job in jobs)
    return each * tokens > LARGE


async def _aside(is_large: bool, work: Callable[..., T], *args: Any) -> T:
    return await asyncio.to_thread(work, *args) if is_large else work(*args)


async def _one_event(answer: Awaitable[dict[str, Any]]) -> Chunks:
    yield sse(await answer)


def _parts(reasoning: str, text: str) -> dict[str, str]:
    """What a chunk of a chat adds, under its names."""
    parts = {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}
    return parts | {"content": text} if text else parts


def _usage(jobs: Sequence[Job]) -> dict[str, Any]:
    replies = [reply for job in jobs for reply in job.replies]
    asked = sum(len(job.request.prompt_ids) for job in jobs)
    made = sum(reply.num_tokens for reply in replies)
    cached = sum(job.request.metrics.num_cached_tokens for job in jobs)
    return {
        "prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(reply.num_reasoning for reply in replies)},
    }  # fmt: skip
