"""Jobs to a response, whole or streamed, in the shape of completions or of chats; and test-time scaling's seam."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from slipstream.server.door import Call
from slipstream.server.errors import ApiError, refusing
from slipstream.server.reply import chat_logprobs, completion_logprobs, prompt_logprobs
from slipstream.server.schemas import ChatRequest, CompletionRequest, parse_messages
from slipstream.server.service import Job, Service
from slipstream.server.streaming import EventStream, unless_gone
from slipstream.types import Delta, SamplingParams

Chunks = AsyncGenerator[dict[str, Any], None]


@dataclass
class Scaled:
    """What test-time scaling answers: the majority's text, thinking apart, the certificate, and tokens per model
    (``{"draft": {"prompt_tokens": ..., "completion_tokens": ...}, "target": ...}``)."""

    content: str
    reasoning: str | None = None
    certificate: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, dict[str, int]] = field(default_factory=dict)


# (messages, the request's ``scaling`` object, its sampling parameters) -> answer. ``ValueError`` is the client's
# mistake, ``RuntimeError`` an engine's failure; cancelling the task cancels everything behind it.
Scale = Callable[[list[dict[str, str]], dict[str, Any], SamplingParams], Awaitable[Scaled]]


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
        deltas = await unless_gone(http.receive, self._service.finish(call, jobs))
        choices = [self._choice(body, job, delta) for job, delta in deltas]
        answer = self._frame(call, body) | {"choices": choices, "usage": _usage(jobs)}
        return JSONResponse(answer | self._beside(body, jobs))

    def _frame(self, call: Call, body: CompletionRequest | ChatRequest) -> dict[str, Any]:
        prefix, kind = "cmpl", "text_completion"
        if isinstance(body, ChatRequest):
            prefix, kind = "chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion"
        made = int(time.time())
        return {"id": f"{prefix}-{call.request_id}", "object": kind, "created": made, "model": self._service.name}

    async def _chunks(self, call: Call, body: CompletionRequest | ChatRequest, jobs: list[Job]) -> Chunks:
        """The chunks of a stream. Tokens whose text is held back (half a character) make none, unless asked for."""
        frame = self._frame(call, body)
        if body.include_usage:
            frame["usage"] = None
        keeps_all = body.return_token_ids or body.top_logprobs_wanted is not None
        if isinstance(body, ChatRequest):
            for reply in jobs[0].replies:
                opening = {"role": "assistant", "content": ""}
                yield frame | {"choices": [{"index": reply.index, "delta": opening, "finish_reason": None}]}
        is_first = True
        async with aclosing(self._service.stream(call, jobs)) as deltas:
            async for job, delta in deltas:
                choice = self._choice(body, job, delta)
                if choice.get("text") or choice.get("delta") or choice["finish_reason"] or keeps_all:
                    yield frame | {"choices": [choice]} | (self._beside(body, jobs) if is_first else {})
                    is_first = False
        if body.include_usage:
            yield frame | {"choices": [], "usage": _usage(jobs)}

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
        said = {"reasoning": reasoning or None, "reasoning_content": reasoning or None, "content": text}
        table = None
        if body.logprobs:
            table = chat_logprobs(delta.token_ids, delta.logprobs or (), self._service.token_text, body.top_logprobs)
        if body.stream:
            return {"delta": {part: text for part, text in said.items() if text}, "logprobs": table}
        return {"message": {"role": "assistant", **said}, "logprobs": table}

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
        messages, params = parse_messages(body.messages), body.params(self._service.config)
        call: Call = http.scope["slipstream.call"]
        self._service.gate.hold(call, 1, 1)
        chunks = self._scaled_chunks(self._scale, call, body, messages, params)
        if body.stream:
            return EventStream(chunks, self._service.config)
        return JSONResponse(await unless_gone(http.receive, anext(chunks)))

    async def _scaled_chunks(
        self, scale: Scale, call: Call, body: ChatRequest, messages: list[dict[str, str]], params: SamplingParams
    ) -> Chunks:
        """One chunk, which is the whole answer where it is not streamed."""
        with refusing("scaling"):
            try:
                result = await scale(messages, body.scaling or {}, params)
            except RuntimeError as error:
                raise ApiError(500, f"test-time scaling failed: {error}", code="engine_error") from error
        self._service.certificate = result.certificate
        said: dict[str, Any] = {"role": "assistant", "content": result.content}
        said |= {"reasoning": result.reasoning, "reasoning_content": result.reasoning}
        choice = {"index": 0, "delta" if body.stream else "message": said, "finish_reason": "stop"}
        used: dict[str, Any] = {
            name: sum(model.get(name, 0) for model in result.usage.values())
            for name in ("prompt_tokens", "completion_tokens")
        }
        used |= {"total_tokens": sum(used.values()), "models": result.usage}
        yield self._frame(call, body) | {"choices": [choice], "usage": used, "scaling": result.certificate}


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
