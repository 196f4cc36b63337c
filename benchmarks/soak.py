"""Does the server stay up, leak nothing and answer right, under a crowd that comes and goes?

    python benchmarks/soak.py [--requests 2000] [--methods full,two_level] [--json benchmarks/results/cpu/soak.json]

The default is every method that there is.

Per method one server with a KV cache so small that chains are preempted. Of the requests 30 % leave at a random moment,
5 % stop reading until they are cut off, the others' greedy answers are compared with those computed alone before.
Afterwards nothing may wait, run or hold a page, and memory must be flat (slope of the resident set).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import torch
from harness import Report, check

from slipstream import LLM, SamplingParams
from slipstream.build import ATTENTION
from slipstream.kvcache.plan import parse_bytes
from slipstream.server.app import bind, cap_caches, make_server
from slipstream.server.config import ServerConfig

LENGTHS, TOKENS = (20, 80, 300, 700), (4, 40, 120)
WORK = ("sparse_rows", "tova_evicted_tokens", "asynctls_returned", "asynctls_lost_selections", "asynctls_bytes_in")
# Small enough for these lengths to be at work: gate, budget, and blocks that a first level leaves out.
SPARSE = {"budget": 128, "recent": 16, "min_context": 128, "block": 16, "blocks": 16}


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


class Crowd:
    """Clients of one server. Outcomes are counted; a wrong answer fails the run at once."""

    def __init__(self, url: str, truth: dict[tuple[int, ...], list[int]], dice: random.Random) -> None:
        self.url, self.truth, self.dice = url, truth, dice
        self.counts = {"right": 0, "left": 0, "stalled": 0}
        self.memory: list[tuple[int, float]] = []

    async def run(self, requests: int, width: int) -> None:
        limit = asyncio.Semaphore(width)
        bounds = httpx.Limits(max_connections=2 * width)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=bounds) as client:

            async def one(number: int) -> None:
                async with limit:
                    await self.visit(client)
                    if number % 20 == 0:
                        self.memory.append((number, resident_mib()))

            await asyncio.gather(*map(one, range(requests)))

    async def visit(self, client: httpx.AsyncClient) -> None:
        prompt = self.dice.choice(list(self.truth))
        tokens, mood, stream = self.dice.choice(TOKENS), self.dice.random(), self.dice.random() < 0.5
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": stream}
        if mood < 0.30:
            patience = self.dice.expovariate(3.0)
            try:
                reply = await asyncio.wait_for(
                    client.post("/v1/completions", json=body | {"max_tokens": 400}), patience
                )
            except TimeoutError:
                self.counts["left"] += 1
            else:
                check(
                    reply.status_code == 200, f"who would have left got status {reply.status_code}: {reply.text[:200]}"
                )
            return
        if mood < 0.35:
            await self.stall(body | {"stream": True, "logprobs": 20, "max_tokens": 300})
            self.counts["stalled"] += 1
            return
        reply = await client.post("/v1/completions", json=body)
        check(reply.status_code == 200, f"status {reply.status_code}: {reply.text[:200]}")
        payloads = (
            [json.loads(b[6:]) for b in reply.text.split("\n\n") if b.startswith("data: {")]
            if stream
            else [reply.json()]
        )
        found = [token for payload in payloads for token in payload["choices"][0]["token_ids"]]
        check(found == self.truth[prompt][:tokens], "an answer under load differs from the one computed alone")
        self.counts["right"] += 1

    async def stall(self, body: dict[str, Any]) -> None:
        port = int(self.url.rsplit(":", 1)[1])
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(connection, head.encode() + data)
            await asyncio.sleep(2.0 * self.dice.random())


def slope(points: list[tuple[int, float]]) -> float:
    """MiB per thousand requests after the first third (until its caches are full, torch keeps kernels for shapes)."""
    last = sorted(points)[len(points) // 3 :]
    x = torch.tensor([a for a, _ in last], dtype=torch.float64)
    y = torch.tensor([b for _, b in last], dtype=torch.float64)
    return float(1000 * ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum().clamp(min=1))


def options_of(label: str, memory: str) -> dict[str, Any]:
    """memory: of the host, where KV is (``asynctls:offload``)."""
    method, _, offload = label.partition(":")
    known = {option.name for option in fields(ATTENTION[method])}
    moved = {"offload": True, "host_kv": memory} if offload else {}
    return {"method": method} | {name: value for name, value in SPARSE.items() if name in known} | moved


def soak(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method's point, in a process of its own: what one leaves in memory is not the next one's."""
    cap_caches()
    dice = random.Random(args.seed)
    options = {
        "max_model_len": 1600,
        "page_size": 16,
        "device": args.device,
        "attention": options_of(method, args.kv_memory),
    }
    if not options["attention"].get("offload"):  # else the host's memory is the limit
        seats = LLM(args.model, **options).memory.fixed_bytes  # what a method keeps beside its pages
        options["kv_memory"] = parse_bytes(args.kv_memory) + seats
    llm = LLM(args.model, **options)
    prompts = [[dice.randrange(16, 1000) for _ in range(dice.choice(LENGTHS))] for _ in range(24)]
    alone = SamplingParams(temperature=0, max_tokens=max(TOKENS), ignore_eos=True)
    truth = {tuple(ids): llm.generate(ids, alone)[0].outputs[0].token_ids for ids in prompts}
    config = ServerConfig(port=0, stall_timeout_s=1.0)
    listening = bind(config)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = make_server(llm, config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    crowd, began = Crowd(url, truth, dice), time.perf_counter()
    asyncio.run(crowd.run(args.requests, args.width))
    seconds = time.perf_counter() - began
    end = time.monotonic() + 30
    while any(llm.stats()[name] for name in ("running", "waiting", "pages_used")) and time.monotonic() < end:
        time.sleep(0.05)
    stats = llm.stats()
    llm.engine.table.check_integrity()
    server.should_exit = True
    thread.join(60)
    pressed = stats["preemptions"] + stats["pages_left"]  # the latter where chains decode without pages
    work = {name: stats[name] for name in WORK if name in stats}
    check(method == "full" or sum(work.values()) > 0, f"{method}: every step was dense, it was never at work")
    check("offload" not in options["attention"] or work["asynctls_bytes_in"] > 0, f"{method}: nothing was moved")
    check(work.get("asynctls_returned") != 0, f"{method}: candidates were those of `previous`")
    check(pressed > 0, f"{method}: the cache was large enough for all, nothing was preempted")
    check(crowd.counts["left"] > 0 and crowd.counts["right"] > 0, f"{method}: nobody left, or nobody stayed")
    held = stats["running"] + stats["waiting"] + stats["pages_used"]
    every = max(1, len(crowd.memory) // 10)
    return {
        **options["attention"], "requests": args.requests, "seconds": seconds, "preemptions": stats["preemptions"],
        "pages_left": stats["pages_left"], **work,
        **crowd.counts, "held": held, "slope": slope(crowd.memory),
        "resident_mib": [round(mib) for _, mib in sorted(crowd.memory)[::every]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slipstream-draft")
    parser.add_argument("--methods", default=",".join(ATTENTION), help="comma-separated names, and asynctls:offload")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-memory", default="5MiB")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    report = Report("soak", notes={"model": args.model})
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        for method in args.methods.split(","):
            point = pool.submit(soak, method, args).result()
            report.point(**point)
            report.bar(f"{method}: chains and pages held afterwards", point["held"], 0, "<=")
            report.bar(f"{method}: resident set, MiB per 1000 requests", point["slope"], 20.0, "<=")
    report.finish(args.json)


if __name__ == "__main__":
    main()
