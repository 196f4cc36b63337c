"""What does the entrance of a deployment cost? A replica through it, against the same replica asked directly.

    OMP_NUM_THREADS=1 python benchmarks/entrance.py --json benchmarks/results/cpu/entrance.json

Three processes over loopback, as ``slipstream deploy`` starts them, without Ray (no request of one passes through it):
the replica, the entrance, and this client, which only collects what comes and reads it when the clock has stopped. Same
prompts (token ids), the arms in turn. Overhead of a request: one token, one at a time, no stream. Throughput: streams,
16 at once. Every answer is compared first, and counters say that each arm went the way it should.
On two cores the entrance shares one with the client, and the replica has the other: only a quiet machine tells the
ratio. What each process spends of a CPU per streamed token is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
from harness import Report, check
from serve import ask_all

KEYS = {"direct": "the-replicas", "entrance": ""}
POOL = "m"


def start(spec: dict[str, Any], key: str) -> tuple[subprocess.Popen[str], int]:
    """A child as a deployment starts it; its port once it serves. It ends with this process."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-m", "slipstream.deploy.child"], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert child.stdin and child.stdout and child.stderr
    json.dump(spec | {"host": "127.0.0.1", "key": key, "rank": None, "parent": os.getpid()}, child.stdin)
    child.stdin.close()
    threading.Thread(target=child.stderr.read, daemon=True).start()
    port = int(child.stdout.readline().rsplit(":", 1)[1])
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                return child, port
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"{spec['kind']} did not come up")


def cpu_s(child: subprocess.Popen[str]) -> float:
    """Of a process so far, user and system."""
    with open(f"/proc/{child.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def served(ports: dict[str, int]) -> tuple[int, int]:
    """Requests that the replica, and that the entrance, answered with 200 so far."""
    found = []
    for arm, pattern in (("direct", r"^slipstream_http_requests_total\{"), ("entrance", r"^slipstream_entrance_http_")):
        head = {"Authorization": f"Bearer {KEYS[arm]}"} if KEYS[arm] else {}
        text = httpx.get(f"http://127.0.0.1:{ports[arm]}/metrics", headers=head, timeout=10).text
        lines = [line for line in text.splitlines() if re.match(pattern, line) and "_total{" in line]
        generated = [line for line in lines if 'status="200"' in line and 'route="/v1/completions"' in line]
        found.append(int(sum(float(line.rsplit(" ", 1)[1]) for line in generated)))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slipstream-target")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--single", type=int, default=40, help="requests of one token, one at a time, a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()

    engine = {"device": args.device, "kv_memory": "512MiB", "prefix_cache": False}
    engine |= {"max_model_len": args.input_len + args.output_len + 1}
    replica, port = start(
        {"kind": "engine", "model": args.model, "name": POOL, "engine": engine, "server": {}}, KEYS["direct"]
    )
    entrance, front = start({"kind": "entrance", "front": {"port": 0}, "drain_s": 1}, "the-keepers")
    ports = {"direct": port, "entrance": front}
    row = {"name": "m/0", "pool": POOL, "url": f"http://127.0.0.1:{port}", "key": KEYS["direct"], "is_leaving": False}
    said = {"models": {POOL: POOL}, "replicas": [row]}
    told = httpx.put(f"http://127.0.0.1:{front}/fleet", json=said, headers={"Authorization": "Bearer the-keepers"})
    check(told.status_code == 200, f"the entrance refused its fleet: {told.text}")

    dice = random.Random(0)
    prompts = [[dice.randrange(16, 1000) for _ in range(args.input_len)] for _ in range(args.requests)]

    def ask(arm: str, count: int, tokens: int, stream: bool, width: int) -> tuple[float, list[Any]]:
        work, before = (prompts * (count // len(prompts) + 1))[:count], served(ports)
        began = time.perf_counter()
        asked = ask_all(ports[arm], work, tokens, stream, width, KEYS[arm])
        took = time.perf_counter() - began
        results, after = [asking.result() for asking in asked], served(ports)
        gained = (after[0] - before[0], after[1] - before[1])
        check(gained == (count, count * (arm == "entrance")), f"{arm}: {gained} requests came by for {count}")
        return took, results

    truth = [ids for _, ids in ask("direct", args.requests, args.output_len, True, args.concurrency)[1]]
    check(all(len(ids) == args.output_len for ids in truth), "an answer is short")
    seconds: dict[str, list[float]] = {arm: [] for arm in ports}
    busy = {"replica": 0.0, "entrance": 0.0}  # CPU seconds while the entrance's arm streams
    single: dict[str, list[float]] = {arm: [] for arm in ports}
    for turn in range(args.rounds):
        for arm in list(ports)[:: 1 if turn % 2 == 0 else -1]:
            before = cpu_s(replica), cpu_s(entrance)
            took, found = ask(arm, args.requests, args.output_len, True, args.concurrency)
            if arm == "entrance":
                busy["replica"] += cpu_s(replica) - before[0]
                busy["entrance"] += cpu_s(entrance) - before[1]
            check([ids for _, ids in found] == truth, f"{arm}: the answers differ")
            seconds[arm].append(took)
            _, found = ask(arm, args.single, 1, False, 1)
            expected = [ids[:1] for ids in (truth * (args.single // len(truth) + 1))[: args.single]]
            check([ids for _, ids in found] == expected, f"{arm}: the first tokens differ")
            single[arm] += [first for first, _ in found]
    for child in (entrance, replica):
        child.terminate()
        child.wait(20)
    report = Report(
        "entrance", notes={"model": args.model, "concurrency": args.concurrency, "load": os.getloadavg()[0]}
    )
    tokens = args.requests * args.output_len
    for arm in ports:
        times = sorted(single[arm])
        report.point(
            arm=arm, tokens_per_s=tokens / statistics.median(seconds[arm]), seconds=[round(s, 3) for s in seconds[arm]],
            request_ms=1e3 * statistics.median(times), request_p90_ms=1e3 * times[int(0.9 * len(times))],
        )  # fmt: skip
    report.point(
        arm="entrance", **{f"{who}_cpu_us_per_token": 1e6 * spent / tokens / args.rounds for who, spent in busy.items()}
    )
    ratio = statistics.median(a / b for a, b in zip(seconds["direct"], seconds["entrance"], strict=True))
    over = 1e3 * (statistics.median(single["entrance"]) - statistics.median(single["direct"]))
    report.bar(f"streamed throughput / bare replica at {args.concurrency}", ratio, 0.95, ">=")
    report.bar("overhead of a request (ms)", over, 10.0, "<=")
    report.finish(args.json)


if __name__ == "__main__":
    main()
