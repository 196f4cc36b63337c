"""What does the server cost? Its throughput against the engine alone, and its share of the time to first token.

    OMP_NUM_THREADS=1 python benchmarks/serve.py [--device cpu] [--json benchmarks/results/cpu/serve.json]

Same prompts (token ids), same engine, same run, arms in turn: the engine alone through its asynchronous face, token ids
in and token ids out (it makes no text, the server does), and the server over loopback; both streamed and whole, each
compared with its like. The client is another process, which only collects what comes and reads it when the clock has
stopped. On a CPU leave it a core, as above: what it takes from the engine is not the server's. Every answer is compared
first. A stream's chunks hold several tokens where ``stream_rate`` is less than the streams make.
Only a quiet machine tells the ratio: on a slow one a stream's chunks hold fewer tokens, and the arm with more threads
gets more of it. cpu_us_per_token is of this process, engine and server.
Time to first token is the client's (one request at a time) less the engine's own, over the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import selectors
import socket
import statistics
import threading
import time
from multiprocessing.connection import Connection

from harness import Report, check

from slipstream import LLM, SamplingParams
from slipstream.server.app import bind, make_server
from slipstream.server.config import ServerConfig

Prompts = list[list[int]]


class Asking:
    """One request on a connection of its own. Its answer is only collected: what parsing costs is not the server's."""

    def __init__(self, port: int, prompt: list[int], tokens: int, stream: bool, key: str = "") -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        data = json.dumps(body | {"stream": stream}).encode()
        self.stream, self.began, self.first, self.answer = stream, time.perf_counter(), 0.0, bytearray()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\n" if key else ""
        self.socket.sendall(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Take what has come; whether that was all."""
        data = self.socket.recv(1 << 18)
        self.answer += data
        if not self.first and (not self.stream or b"data: {" in self.answer):
            self.first = time.perf_counter() - self.began
        return not data

    def result(self) -> tuple[float, list[int]]:
        """Seconds to the first token, and the token ids."""
        self.socket.close()
        head, _, rest = bytes(self.answer).partition(b"\r\n\r\n")
        check(head.startswith(b"HTTP/1.1 200"), f"refused: {self.answer[:300]!r}")
        if not self.stream:
            return self.first, json.loads(rest)["choices"][0]["token_ids"]
        body = bytearray()
        while rest:  # undo the chunked encoding
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        events = [event[6:] for event in bytes(body).split(b"\n\n") if event.startswith(b"data: {")]
        check(body.endswith(b"data: [DONE]\n\n"), "a stream was cut off")
        return self.first, [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


def ask_all(port: int, prompts: Prompts, tokens: int, stream: bool, width: int, api_key: str = "") -> list[Asking]:
    """All requests, ``width`` at a time, on one thread: a client that is no heavier than it must be."""
    waiting, open_, all_ = list(enumerate(prompts))[::-1], selectors.DefaultSelector(), {}
    while waiting or open_.get_map():
        while waiting and len(open_.get_map()) < width:
            place, prompt = waiting.pop()
            all_[place] = Asking(port, prompt, tokens, stream, api_key)
            open_.register(all_[place].socket, selectors.EVENT_READ, all_[place])
        for key, _ in open_.select():
            if key.data.read():
                open_.unregister(key.data.socket)
    return [all_[place] for place in range(len(prompts))]


def client(pipe: Connection, port: int) -> None:
    """The other process: serves orders (prompts, tokens, stream, how many at once) until None."""
    while (order := pipe.recv()) is not None:
        prompts, tokens, stream, width = order
        began = time.perf_counter()
        asked = ask_all(port, prompts, tokens, stream, width)
        seconds = time.perf_counter() - began
        pipe.send((seconds, [asking.result() for asking in asked]))


async def engine_alone(
    llm: LLM, prompts: Prompts, tokens: int, stream: bool, width: int
) -> tuple[float, list[tuple[float, list[int]]]]:
    """The same work without HTTP."""
    limit, params = asyncio.Semaphore(width), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine = llm.asynchronous()

    async def one(prompt: list[int]) -> tuple[float, list[int]]:
        async with limit:
            began, first, ids = time.perf_counter(), 0.0, []
            if not stream:
                (completion,) = await engine.generate(prompt, params)
                return time.perf_counter() - began, completion.token_ids
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()

    llm = LLM(args.model, device=args.device, load_format=args.load_format, kv_memory=args.kv_memory,
              max_model_len=args.input_len + args.output_len + 1, prefix_cache=False)  # fmt: skip
    llm.engine.warmup()
    config = ServerConfig(port=0)
    listening = bind(config)
    port = listening.getsockname()[1]
    server = make_server(llm, config)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=client, args=(theirs, port), daemon=True)
    other.start()
    theirs.close()  # a client that dies ends the benchmark instead of being waited for
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()

    dice = random.Random(0)
    prompts = [[dice.randrange(16, 1000) for _ in range(args.input_len)] for _ in range(args.requests)]

    def ask(arm: str, work: Prompts, tokens: int, width: int) -> tuple[float, list[tuple[float, list[int]]]]:
        side, _, kind = arm.partition(" ")
        if side == "engine":
            return asyncio.run(engine_alone(llm, work, tokens, kind == "stream", width))
        ours.send((work, tokens, kind == "stream", width))
        return ours.recv()

    report = Report("serve", notes={"model": llm.name, "concurrency": args.concurrency})
    arms = ["engine whole", "server whole", "engine stream", "server stream"]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    busy: dict[str, list[float]] = {arm: [] for arm in arms}
    first: dict[str, list[float]] = {arm: [] for arm in arms[2:]}
    truth = [ids for _, ids in ask("engine whole", prompts, args.output_len, args.concurrency)[1]]
    for turn in range(args.rounds):
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            cpu = time.process_time()
            took, found = ask(arm, prompts, args.output_len, args.concurrency)
            busy[arm].append(time.process_time() - cpu)
            seconds[arm].append(took)
            check([ids for _, ids in found] == truth, f"{arm}: the answers differ")
        for arm, times in first.items():
            times += [t for t, _ in ask(arm, prompts, 1, 1)[1]]
    num_tokens = args.requests * args.output_len
    for arm in arms:
        rate, cpu = num_tokens / statistics.median(seconds[arm]), 1e6 * statistics.median(busy[arm]) / num_tokens
        report.point(arm=arm, tokens_per_s=rate, cpu_us_per_token=cpu, seconds=[round(s, 3) for s in seconds[arm]])
    alone, served = (1e3 * statistics.median(times) for times in first.values())
    report.point(arm="first token", engine_ms=alone, overhead_ms=served - alone)
    for kind in ("whole", "stream"):
        pairs = zip(seconds[f"engine {kind}"], seconds[f"server {kind}"], strict=True)
        ratio = statistics.median(engine / server for engine, server in pairs)
        report.bar(f"throughput {kind} / engine alone at {args.concurrency}", ratio, 0.95, ">=")
    report.bar("first token overhead on loopback (ms)", served - alone, 5.0, "<=")
    ours.send(None)
    server.should_exit = True
    thread.join(20)
    report.finish(args.json)


if __name__ == "__main__":
    main()
