"""A load generator in the shape of ``vllm bench serve``: random prompts at a rate, with a bound on how many at once."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True)
class Load:
    """request_rate: requests per second, Poisson arrivals; 0 sends all at once. Prompts are random token ids."""

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    num_prompts: int = 100
    request_rate: float = 0.0
    max_concurrency: int = 32
    input_len: int = 128
    output_len: int = 128
    seed: int = 0
    api_key: str | None = None
    percentiles: tuple[float, ...] = (50, 90, 99)


@dataclass
class Shot:
    """One request: when it was sent and when each piece of text came (seconds), its tokens, what went wrong."""

    sent_s: float
    came_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


async def run(load: Load) -> dict[str, Any]:
    """Send the load and sum up; ``ConnectionError`` when nobody answers at all."""
    dice, limit = random.Random(load.seed), asyncio.Semaphore(load.max_concurrency)
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    bounds = httpx.Limits(max_connections=load.max_concurrency)
    async with httpx.AsyncClient(base_url=load.url, headers=headers, timeout=None, limits=bounds) as client:
        try:
            card = (await client.get("/v1/models")).raise_for_status().json()["data"][0]
        except httpx.HTTPError as error:
            raise ConnectionError(f"no server answers at {load.url}: {error}") from error
        body = {
            "model": load.model or card["id"], "max_tokens": load.output_len, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        began, shots = time.perf_counter(), []
        for _ in range(load.num_prompts):
            prompt = [dice.randrange(16, 1000) for _ in range(load.input_len)]
            shots.append(asyncio.create_task(_shoot(client, body | {"prompt": prompt}, limit)))
            if load.request_rate:
                await asyncio.sleep(dice.expovariate(load.request_rate))
        done = await asyncio.gather(*shots)
        return summary(load, done, time.perf_counter() - began)


async def _shoot(client: httpx.AsyncClient, body: dict[str, Any], limit: asyncio.Semaphore) -> Shot:
    async with limit:
        shot = Shot(time.perf_counter())
        try:
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    shot.error = f"status {reply.status_code}"
                rest = b""
                async for data in reply.aiter_raw():
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        _take(shot, event)
        except httpx.HTTPError as error:
            shot.error = f"{type(error).__name__}: {error}"
        return shot


def _take(shot: Shot, event: bytes) -> None:
    if not event.startswith(b"data: {"):
        return
    chunk = json.loads(event[6:])
    if "error" in chunk:
        shot.error = chunk["error"]["message"]
    elif chunk["choices"]:
        shot.came_s.append(time.perf_counter())
    elif chunk.get("usage"):
        shot.num_tokens = chunk["usage"]["completion_tokens"]


def summary(load: Load, shots: Sequence[Shot], seconds: float) -> dict[str, Any]:
    """Rates, and mean and percentiles in ms of time to first token, per output token, between pieces, and in all."""
    good = [shot for shot in shots if shot.error is None and shot.came_s]
    errors = sorted({shot.error for shot in shots if shot.error is not None})
    tokens = sum(shot.num_tokens for shot in good)
    result: dict[str, Any] = {
        "completed": len(good), "failed": len(shots) - len(good), "errors": errors[:5], "duration_s": seconds,
        "total_output_tokens": tokens, "request_throughput": len(good) / seconds, "output_throughput": tokens / seconds,
        "total_token_throughput": (tokens + len(good) * load.input_len) / seconds,
    }  # fmt: skip
    times = {
        "ttft": [s.came_s[0] - s.sent_s for s in good],
        "tpot": [(s.came_s[-1] - s.came_s[0]) / (s.num_tokens - 1) for s in good if s.num_tokens > 1],
        "itl": [b - a for s in good for a, b in zip(s.came_s, s.came_s[1:], strict=False)],
        "e2el": [s.came_s[-1] - s.sent_s for s in good],
    }
    for name, values in times.items():
        values = sorted(values) or [0.0]
        result[f"mean_{name}_ms"] = 1e3 * sum(values) / len(values)
        for p in load.percentiles:
            result[f"p{p:g}_{name}_ms"] = 1e3 * values[min(len(values) - 1, int(p / 100 * len(values)))]
    return result


def measure(load: Load) -> dict[str, Any]:
    """:func:`run` for those who have no event loop."""
    return asyncio.run(run(load))
