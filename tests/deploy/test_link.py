"""Two Ray nodes in network namespaces of their own, as two hosts are, and the link between them cut for ten seconds."""

import concurrent.futures
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: `make scale-test` installs it and runs these")
pytestmark = pytest.mark.ray
import httpx  # noqa: E402
from live_server import wait_until  # noqa: E402

START_S, CUT_S = 150, 10.0
HOSTS = {name: f"10.98.0.{number}" for number, name in enumerate((f"sl{os.getpid()}a", f"sl{os.getpid()}b"), 1)}
HEAD, OTHER = HOSTS
PORT = 6390
CONFIG = {
    "name": "link",
    "entrance": {"port": 8000, "probe_s": 0.2, "probe_limit_s": 1, "wait_s": START_S},
    "start_s": START_S,
    "drain_s": 5,
    "pools": {
        "m": {"model": "slipstream-draft", "replicas": 2, "cpus": 0.2,
              "engine": {"max_model_len": 2048, "kv_memory": "48MiB"}},
    },
}  # fmt: skip


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def inside(name, *command, **more):
    own = os.environ | {"RAY_ADDRESS": f"{HOSTS[HEAD]}:{PORT}", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["ip", "netns", "exec", name, *map(str, command)], env=own, **more)


def slipstream(*arguments):
    """The command line on the head's host; its last line."""
    pipe = subprocess.PIPE
    with inside(HEAD, sys.executable, "-m", "slipstream", *arguments, stdout=pipe, stderr=pipe, text=True) as process:
        out, err = process.communicate(timeout=START_S)
    assert process.returncode in (0, 1) and out, err
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces with a wire between them."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "sl0", "netns", HEAD, "type", "veth", "peer", "name", "sl0", "netns", OTHER)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(
            f"NO NETWORK NAMESPACES HERE ({error}): test_ray.py has two nodes on the loopback interface instead"
        )
    try:
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "sl0")
            for device in ("lo", "sl0"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "delete", name)


@pytest.fixture(scope="module")
def nodes(hosts, tmp_path_factory):
    ray = Path(sys.executable).with_name("ray")
    own = ["--num-cpus", 2, "--object-store-memory", 80 * 2**20, "--block", "--disable-usage-stats"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    where = Path("/tmp") / f"sl{os.getpid()}"  # paths of sockets have to be short
    head = ["--head", "--port", PORT, "--include-dashboard", "false", "--temp-dir", where]
    started = [inside(HEAD, ray, "start", *own, *head, "--node-ip-address", HOSTS[HEAD], **quiet)]
    try:
        wait_until(lambda: reaches(HOSTS[HEAD], PORT), 60)
        join = ["--address", f"{HOSTS[HEAD]}:{PORT}", "--node-ip-address", HOSTS[OTHER]]
        started.append(inside(OTHER, ray, "start", *own, *join, **quiet))
        count = f"import ray; ray.init('{HOSTS[HEAD]}:{PORT}', log_to_driver=False); print(len(ray.nodes()))"
        until = time.monotonic() + 60
        while True:
            with inside(HEAD, sys.executable, "-c", count, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                if process.communicate(timeout=60)[0].strip() == b"2":
                    break
            assert time.monotonic() < until, "the second node does not come"
        yield
    finally:
        for process in started[::-1]:
            process.terminate()
        for process in started:
            process.wait(90)
        subprocess.run(["rm", "-rf", str(where)], check=True, timeout=30)


def at_head(work):
    """``work()`` on a thread whose sockets are the head host's."""

    def run():
        with open(f"/run/netns/{HEAD}", "rb") as space:
            assert ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0x40000000) == 0
        return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def reaches(host, port):
    def work():
        import socket

        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return True
        return False

    return at_head(work)


def ask(**body):
    body = {"prompt": "add", "temperature": 0, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True} | body
    return at_head(lambda: httpx.post("http://127.0.0.1:8000/v1/completions", json=body, timeout=START_S))


def tokens(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


def test_a_link_is_cut_for_ten_seconds(nodes, tmp_path):
    file = tmp_path / "d.yaml"
    file.write_text(json.dumps(CONFIG))
    found = slipstream("deploy", file)
    assert found["ready"]
    rows = {row["replica"]: row for row in found["pools"]["m"]["replicas"]}
    far = next(name for name, row in rows.items() if row["address"].startswith(HOSTS[OTHER]))
    assert len({row["node"] for row in rows.values()}) == 2

    for number in range(20, 24):  # idle replicas take turns: a prompt whose place is the far one
        prompt = [number] * 20
        first = ask(prompt=prompt)
        if first.headers["x-slipstream-replica"] == far:
            break
    assert first.headers["x-slipstream-replica"] == far
    long = {"prompt": prompt, "max_tokens": 1900}
    in_flight = {"whole": long, "stream": long | {"stream": True}}
    got = {}

    def fly(name):
        got[name] = ask(**in_flight[name])

    threads = [threading.Thread(target=fly, args=(name,)) for name in in_flight]
    for thread in threads:
        thread.start()
    wait_until(lambda: chains(far) == 2, 30)
    time.sleep(1.0)  # the stream has begun
    ip("-n", HEAD, "link", "set", "sl0", "down")
    cut = time.monotonic()
    try:
        reply = ask(prompt=prompt)
        assert tokens(reply) == tokens(first) and time.monotonic() - cut < CUT_S
        assert reply.headers["x-slipstream-replica"] != far
        time.sleep(max(0.0, cut + CUT_S - time.monotonic()))
    finally:
        ip("-n", HEAD, "link", "set", "sl0", "up")
    for thread in threads:
        thread.join(START_S)
    assert len(tokens(got["whole"])) == 1900 and got["whole"].headers["x-slipstream-replica"] != far
    *_, last, done, end = got["stream"].text.split("\n\n")
    assert json.loads(last[6:])["error"]["code"] == "replica_lost" and (done, end) == ("data: [DONE]", "")

    wait_until(lambda: at_head(lambda: f'up{{replica="{far}"}} 1.0' in metrics()), START_S)
    until = time.monotonic() + START_S
    while not (found := slipstream("status", "link"))["ready"]:
        assert time.monotonic() < until, found
    assert {row["replica"]: row["pid"] for row in found["pools"]["m"]["replicas"]} == {
        name: row["pid"] for name, row in rows.items()
    }  # nothing died of it
    assert len(ask(prompt=prompt).json()["choices"]) == 1
    assert slipstream("deploy", "--stop", "--name", "link")["stopped"] >= 4


def metrics():
    return httpx.get("http://127.0.0.1:8000/metrics", timeout=20).text


def chains(replica):
    line = f'slipstream_replica_chains{{replica="{replica}"}} '
    return next(float(x.removeprefix(line)) for x in at_head(metrics).splitlines() if x.startswith(line))
