"""``slipstream deploy`` on two Ray nodes of one machine: where things run, what comes of whatever dies, what is left.

The nodes are 127.0.0.2 and 127.0.0.3. Tests run in this order on one deployment; every wait has a deadline.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: `make scale-test` installs it and runs these")
pytestmark = pytest.mark.ray
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import httpx  # noqa: E402
from live_server import wait_until  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from slipstream import cli, tasks  # noqa: E402
from slipstream.deploy import cluster as room  # noqa: E402
from slipstream.deploy.config import Deployment  # noqa: E402

START_S = 150  # for processes that start on a busy machine of two cores
ENGINE = {"max_model_len": 2048, "kv_memory": "48MiB"}
SPADE = {"method": "asyncspade", "budget": 96, "recent": 8, "sink": 2, "min_context": 0, "predictor": "last",
         "rank_timeout": 2.0}  # fmt: skip


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


KEYS = Path(tempfile.mkdtemp()) / "keys"
KEYS.write_text("a-clients\n")
AUTHORIZED = {"Authorization": "Bearer a-clients"}
CONFIG = {
    "name": "test",
    "entrance": {"port": free_port(), "probe_s": 0.2, "probe_limit_s": 2, "wait_s": START_S, "api_key_file": str(KEYS)},
    "start_s": START_S,
    "drain_s": 20,
    "pools": {
        "target": {"model": "slipstream-target", "replicas": 2, "cpus": 0.2, "engine": ENGINE},
        "draft": {"model": "slipstream-draft", "cpus": 0.2, "engine": ENGINE},
        "spade": {"model": "slipstream-draft", "name": "spade", "cpus": 0.2, "engine": ENGINE | {"attention": SPADE},
                  "cache_rank": {"where": "apart", "cpus": 0.2, "kv_memory": "64MiB"}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes():
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    made = Cluster(True, head_node_args=node | {"node_ip_address": "127.0.0.2", "include_dashboard": False})
    second = made.add_node(**node, node_ip_address="127.0.0.3")
    ray.init(address=made.address, namespace=room.NAMESPACE, log_to_driver=False, configure_logging=False)
    yield made, second
    ray.shutdown()
    made.shutdown()


def write(path, **changes):
    config = CONFIG | changes
    path.write_text(json.dumps(config))  # which is YAML
    return str(path)


def run(*arguments):
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def deployed(nodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("deploy") / "d.yaml"
    found = run("deploy", write(path))
    assert found["ready"]
    with httpx.Client(base_url=found["entrance"], timeout=START_S, headers=AUTHORIZED) as http:
        yield http, path


def rows(pool):
    return room.status("test")["pools"][pool]["replicas"]


def all_ready():
    wait_until(lambda: room.status("test")["ready"], START_S)


def complete(http, model, **body):
    return http.post("/v1/completions", json={"model": model, "temperature": 0, "max_tokens": 24} | body)


def tokens(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["token_ids"]


def test_everything_is_where_it_should_be_and_at_work(deployed):
    http, _ = deployed
    models = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert models == ["slipstream-target", "slipstream-draft", "spade"]
    for model in models:
        assert complete(http, model, prompt="add").json()["choices"][0]["text"]
    assert len({row["node"] for row in rows("target")}) == 2
    (spade,) = rows("spade")
    actor = f"test/spade/0/{Deployment(**CONFIG).pools['spade'].digest('')}/rank"
    beside = ray.get(ray.get_actor(actor).where.remote(), timeout=20)
    assert beside["node"] != spade["node"] and beside["address"] == spade["rank"]
    complete(http, "spade", prompt=list(range(20, 320)), ignore_eos=True)
    engine = http.get("/stats", params={"replica": "spade/0"}).json()["engine"]
    assert engine["asyncspade_connections"] == 1 and engine["sparse_rows"] > 20 and engine["asyncspade_fallbacks"] == 0
    assert httpx.get(f"{http.base_url}/v1/models", timeout=10).status_code == 401
    # replicas answer those who have their key, which clients' keys are not
    reply = httpx.get(f"http://{spade['address']}/v1/models", timeout=10, headers=AUTHORIZED)
    assert reply.status_code == 401 and httpx.get(f"http://{spade['address']}/health", timeout=10).status_code == 200


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "p.jsonl"
    made = [tasks.make("program", i, steps=6) for i in range(3)]
    lines = [{"id": str(i), "prompt": p.prompt, "answer": p.answer} for i, p in enumerate(made)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SCALE = ("--samples", 2, "--draft-tokens", 24, "--target-tokens", 24, "--turns", 8, "--window", 1, "--alpha", 0.5,
         "--answers", "tagged", "--draft", "ray://test/draft", "--target", "ray://test/target")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(deployed, problems):
    found = run("scale", problems, *SCALE)
    assert found["certificate"]["tests"] > 5 and found["take_overs"] > 0 and not found["failures"]
    return found


def test_a_replica_is_killed_under_a_run_of_test_time_scaling(deployed, problems, undisturbed, tmp_path):
    """The certificate is that of the run that nobody disturbed, and Ray starts what died."""
    log = tmp_path / "run.jsonl"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        scaled = pool.submit(run, "scale", problems, *SCALE, "--log", log)
        wait_until(lambda: log.exists() and log.read_text().count('"decided"') >= 3, START_S)
        before = rows("target")
        victim = max(before, key=lambda row: row["chains"])
        os.kill(victim["pid"], signal.SIGKILL)
        found = scaled.result(START_S)
    assert found["certificate"] == undisturbed["certificate"] and not found["failures"]
    assert (found["maj@2"], found["draft_tokens"]) == (undisturbed["maj@2"], undisturbed["draft_tokens"])
    all_ready()
    after = {row["replica"]: row["pid"] for row in rows("target")}
    assert sum(after[row["replica"]] != row["pid"] for row in before) == 1


def test_requests_in_flight_on_a_replica_that_is_killed(deployed):
    """Those that have streamed nothing come from the other one; a stream that has begun says what happened."""
    http, _ = deployed
    all_ready()
    body = {"prompt": "add", "max_tokens": 1500, "ignore_eos": True, "return_token_ids": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with http.stream(
            "POST", "/v1/completions", json=body | {"model": "slipstream-target", "stream": True}
        ) as reply:
            chunks = reply.iter_text()
            text = next(chunks)
            whole = pool.submit(complete, http, "slipstream-target", **body)
            wait_until(lambda: max(row["chains"] for row in rows("target")) == 2, START_S)  # the same prompt: one place
            (victim,) = [row for row in rows("target") if row["chains"] == 2]
            os.kill(victim["pid"], signal.SIGKILL)
            text += "".join(chunks)
        *_, last, done, end = text.split("\n\n")
        assert json.loads(last[6:])["error"]["code"] == "replica_lost" and (done, end) == ("data: [DONE]", "")
        assert len(tokens(whole.result(START_S))) == 1500
    all_ready()


def test_a_cache_rank_is_killed(deployed):
    http, _ = deployed
    body = {"prompt": list(range(20, 320)), "ignore_eos": True, "return_token_ids": True, "max_tokens": 60}
    alone = tokens(complete(http, "spade", **body))
    actor = f"test/spade/0/{Deployment(**CONFIG).pools['spade'].digest('')}/rank"
    before = ray.get(ray.get_actor(actor).where.remote(), timeout=20)
    os.kill(before["pid"], signal.SIGKILL)
    assert len(tokens(complete(http, "spade", **body))) == 60  # densely, or sparse again: it ends

    def stats():
        return http.get("/stats", params={"replica": "spade/0"}).json()["engine"]

    wait_until(lambda: complete(http, "spade", prompt=[1]) and stats()["asyncspade_connections"] >= 2, START_S)
    fallbacks = stats()["asyncspade_fallbacks"]
    assert tokens(complete(http, "spade", **body)) == alone and stats()["asyncspade_fallbacks"] == fallbacks
    after = ray.get(ray.get_actor(actor).where.remote(), timeout=20)
    assert after["pid"] != before["pid"] and after["address"] == before["address"]


def test_a_replica_is_stopped_for_a_while(deployed):
    """As a link that is cut: no process dies, nothing answers. Others answer, and then it is there again."""
    http, _ = deployed
    all_ready()
    body = {"prompt": "sub", "max_tokens": 30, "return_token_ids": True}
    first = complete(http, "slipstream-target", **body)
    (victim,) = [row for row in rows("target") if row["replica"] == first.headers["x-slipstream-replica"]]
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        began = time.monotonic()
        reply = complete(http, "slipstream-target", **body)
        assert tokens(reply) == tokens(first) and time.monotonic() - began < 30
        assert reply.headers["x-slipstream-replica"] != victim["replica"]
        wait_until(lambda: "not answering" in [row["state"] for row in rows("target")], START_S)
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    all_ready()
    assert victim["pid"] in [row["pid"] for row in rows("target")]


def test_a_rolling_restart_loses_no_request(deployed):
    http, path = deployed
    before = {row["pid"] for row in rows("target") + rows("draft")}
    body = {"ignore_eos": True, "max_tokens": 40, "return_token_ids": True}
    expected = tokens(complete(http, "slipstream-target", prompt="add", **body))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rolled = pool.submit(run, "deploy", path, "--restart")
        while not rolled.done():
            assert tokens(complete(http, "slipstream-target", prompt="add", **body)) == expected
        assert rolled.result()["ready"]
    assert not before & {row["pid"] for row in rows("target") + rows("draft")}


def test_the_keeper_and_the_entrance_are_killed(deployed):
    """The keeper goes on with what is there; the entrance is at the same address again."""
    http, _ = deployed
    before = {row["pid"] for row in rows("target")}
    ray.kill(ray.get_actor("test/keeper"), no_restart=False)
    assert complete(http, "slipstream-target", prompt="add").status_code == 200
    (front,) = [name for name in ray.util.list_named_actors() if name.startswith("test/entrance/")]
    os.kill(ray.get(ray.get_actor(front).where.remote(), timeout=20)["pid"], signal.SIGKILL)

    def is_back():
        with contextlib.suppress(httpx.TransportError, ValueError):
            return room.status("test")["ready"] and http.get("/ready").status_code == 200
        return False

    wait_until(is_back, START_S)
    assert {row["pid"] for row in rows("target")} == before
    assert complete(http, "slipstream-target", prompt="add").status_code == 200


def test_load_raises_replicas_and_idleness_lowers_them_again(nodes, tmp_path):
    """By the wall clock: one, two while more is in flight than one is for, then one, with a client that never stops."""
    pool = {"model": "slipstream-draft", "cpus": 0.2, "engine": ENGINE,
            "replicas": {"least": 1, "most": 2, "chains": 2, "up_s": 1, "down_s": 3}}  # fmt: skip
    front = CONFIG["entrance"] | {"port": 0, "slack": 0}  # so that a prompt does not stay where its KV is
    found = run("deploy", write(tmp_path / "x.yaml", name="grown", pools={"a": pool}, entrance=front))
    busy, served, over = threading.Event(), set(), threading.Event()

    def replicas():
        return [row["replica"] for row in room.status("grown")["pools"]["a"]["replicas"]]

    def client(http, index, end):
        body = {"prompt": [20 + index] * 9, "ignore_eos": True, "return_token_ids": True, "max_tokens": 150}
        expected, asked = tokens(complete(http, "slipstream-draft", **body)), 1
        while not end.is_set():
            reply = complete(http, "slipstream-draft", **body)
            assert tokens(reply) == expected
            served.add(reply.headers["x-slipstream-replica"])
            asked += 1
        return asked

    assert replicas() == ["a/0"]
    with (
        httpx.Client(base_url=found["entrance"], timeout=START_S, headers=AUTHORIZED) as http,
        concurrent.futures.ThreadPoolExecutor(5) as threads,
    ):
        try:
            clients = [threads.submit(client, http, i, busy if i else over) for i in range(5)]
            wait_until(lambda: served == {"a/0", "a/1"} or any(one.done() for one in clients), START_S)
            assert replicas() == ["a/0", "a/1"]
            busy.set()
            wait_until(lambda: replicas() == ["a/0"], START_S)
            served.clear()
            wait_until(lambda: served, START_S)
        finally:
            busy.set()
            over.set()
        assert all(one.result(START_S) > 2 for one in clients) and served == {"a/0"}
    assert run("deploy", "--stop", "--name", "grown")["stopped"] >= 3


def test_a_node_is_lost(deployed, nodes, problems, undisturbed, tmp_path):
    """Its replicas come up on the other node, and a run that is under way ends as it would have."""
    http, path = deployed
    made, second = nodes
    run("deploy", write(path, pools={name: CONFIG["pools"][name] for name in ("target", "draft")}))
    assert "spade" not in room.status("test")["pools"]
    log = tmp_path / "run.jsonl"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        scaled = pool.submit(run, "scale", problems, *SCALE, "--log", log)
        wait_until(lambda: log.exists() and log.read_text().count('"decided"') >= 2, START_S)
        made.remove_node(second, allow_graceful=False)
        found = scaled.result(START_S)
    assert found["certificate"] == undisturbed["certificate"] and not found["failures"]
    all_ready()
    assert len({row["node"] for row in rows("target") + rows("draft")}) == 1


def test_what_cannot_be_is_refused_before_anything_starts(deployed, tmp_path):
    names = sorted(ray.util.list_named_actors())
    pool = {"model": "slipstream-draft"}
    for changes, words in (
        ({"gpus": 1}, "no node of the cluster has"), ({"memory": "9000GiB"}, "no node of the cluster has"),
        ({"engine": {"attention": "asyncspade"}, "cache_rank": {"where": "apart"}}, "needs two nodes"),
    ):  # fmt: skip
        file = write(tmp_path / "x.yaml", name="other", pools={"a": pool | changes})
        done = CliRunner().invoke(cli.app, ["deploy", file])
        assert isinstance(done.exception, ValueError) and words in str(done.exception)
    done = CliRunner().invoke(cli.app, ["status", "other"])
    assert "no deployment 'other'" in str(done.exception)
    with pytest.raises(ValueError, match="has the pools target, draft"):
        room.open_pool("ray://test/x")
    assert sorted(ray.util.list_named_actors()) == names


def test_a_replica_that_cannot_start_says_why(deployed, tmp_path):
    (tmp_path / "model").mkdir()
    file = write(tmp_path / "x.yaml", name="bad", pools={"a": {"model": str(tmp_path / "model"), "cpus": 0.1}},
                 entrance={"port": 0})  # fmt: skip
    done = CliRunner().invoke(cli.app, ["deploy", file])
    assert "config.json" in str(done.exception) and "a/0" in str(done.exception), done.exception
    assert run("deploy", "--stop", "--name", "bad")["stopped"] >= 2


def test_nothing_is_left(deployed):
    _, path = deployed
    status = room.status("test")
    pids = [row["pid"] for pool in status["pools"].values() for row in pool["replicas"] if "pid" in row]
    assert pids and run("deploy", path, "--stop")["stopped"] >= 5
    assert ray.util.list_named_actors() == []
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 30)
    groups = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in groups)
    with pytest.raises(httpx.TransportError):
        httpx.get(status["entrance"], timeout=5)
