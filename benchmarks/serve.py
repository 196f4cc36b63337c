"""What does the server cost? Its throughput against the engine alone, and its share of the time to first token.

    python benchmarks/serve.py [--model slipstream-target] [--device cpu] [--json benchmarks/results/cpu/serve.json]

Same prompts (token ids), same engine, same run, alternating: the engine alone is driven through its asynchronous face;
the server is asked by another process over loopback, streamed and whole. Every answer is compared first.
Time to first token is the client's (one request at a time) less the engine's own, over the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from harness import Report, check

from slipstream import LLM, SamplingParams
from slipstream.server.app import make_server
from slipstream.server.config import ServerConfig

Prompts = list[list[int]]


def ask(port: int, prompt: list[int], tokens: int, stream: bool) -> tuple[float, list[int]]:
    """One request on a connection of its own: seconds to the first token, and the token ids."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    began, first, ids = time.perf_counter(), 0.0, []
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": stream}), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    if not stream:
        return time.perf_counter() - began, json.loads(reply.read())["choices"][0]["token_ids"]
    while (line := reply.readline()) != b"data: [DONE]\n":
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            ids += json.loads(line[6:])["choices"][0]["token_ids"]
    return first, ids


def client(pipe: Connection, port: int) -> None:
    """The other process: serves orders (prompts, tokens, stream, how many at once) until None."""
    while (order := pipe.recv()) is not None:
        prompts, tokens, stream, width = order
        began = time.perf_counter()
        with ThreadPoolExecutor(width) as pool:
            results = list(pool.map(lambda prompt, t=tokens, s=stream: ask(port, prompt, t, s), prompts))
        pipe.send((time.perf_counter() - began, results))


async def engine_alone(
    llm: LLM, prompts: Prompts, tokens: int, width: int
) -> tuple[float, list[tuple[float, list[int]]]]:
    """The same work without HTTP."""
    limit, params = asyncio.Semaphore(width), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine = llm.asynchronous()

    async def one(prompt: list[int]) -> tuple[float, list[int]]:
        async with limit:
            began, first, ids = time.perf_counter(), 0.0, []
            async for delta in engine.stream(prompt, params):
                first = first or time.perf_counter() - began
                ids += delta.token_ids
            return first, ids

    began = time.perf_counter()
    results = await asyncio.gather(*map(one, prompts))
    return time.perf_counter() - began, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slipstream-target")
    parser.add_argument("--device", default=None)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()

    llm = LLM(args.model, device=args.device, load_format=args.load_format, kv_memory=args.kv_memory,
              max_model_len=args.input_len + args.output_len + 1, prefix_cache=False)  # fmt: skip
    llm.engine.warmup()
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listening.getsockname()[1]
    server = make_server(llm, ServerConfig(port=port))
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=client, args=(theirs, port), daemon=True)
    other.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()

    dice = random.Random(0)
    prompts = [[dice.randrange(16, 1000) for _ in range(args.input_len)] for _ in range(args.requests)]

    def over_http(work: Prompts, tokens: int, stream: bool, width: int) -> tuple[float, list[tuple[float, list[int]]]]:
        ours.send((work, tokens, stream, width))
        return ours.recv()

    report = Report("serve", notes={"model": llm.name, "concurrency": args.concurrency})
    arms = {"engine": [], "whole": [], "stream": []}
    first = {"engine": [], "stream": []}
    asyncio.run(engine_alone(llm, prompts[: args.concurrency], 8, args.concurrency))  # warm
    over_http(prompts[: args.concurrency], 8, True, args.concurrency)
    for _ in range(args.rounds):
        seconds, truth = asyncio.run(engine_alone(llm, prompts, args.output_len, args.concurrency))
        arms["engine"].append(seconds)
        for name in ("whole", "stream"):
            seconds, found = over_http(prompts, args.output_len, name == "stream", args.concurrency)
            check(
                [ids for _, ids in found] == [ids for _, ids in truth], f"the {name} answers differ from the engine's"
            )
            arms[name].append(seconds)
        first["engine"] += [t for t, _ in asyncio.run(engine_alone(llm, prompts, 1, 1))[1]]
        first["stream"] += [t for t, _ in over_http(prompts, 1, True, 1)[1]]
    num_tokens = args.requests * args.output_len
    rates = {name: num_tokens / statistics.median(times) for name, times in arms.items()}
    for name, rate in rates.items():
        report.point(arm=name, tokens_per_s=rate, seconds=[round(t, 3) for t in arms[name]])
    overhead = 1e3 * (statistics.median(first["stream"]) - statistics.median(first["engine"]))
    report.point(arm="first token", engine_ms=1e3 * statistics.median(first["engine"]), overhead_ms=overhead)
    for name in ("whole", "stream"):
        ratio = statistics.median(e / s for e, s in zip(arms["engine"], arms[name], strict=True))
        report.bar(f"throughput {name} / engine alone at {args.concurrency}", ratio, 0.95, ">=")
    report.bar("first token overhead on loopback (ms)", overhead, 5.0, "<=")
    ours.send(None)
    server.should_exit = True
    thread.join(20)
    report.finish(args.json)


if __name__ == "__main__":
    main()
