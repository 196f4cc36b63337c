"""``slipstream serve`` as a process: ports, logs, signals; and ``bench serve`` against it."""

import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from live_server import wait_until
from typer.testing import CliRunner

from slipstream import cli, cli_serve
from slipstream.build import ASSETS

MAIN = ["-m", "slipstream"]
MODEL = ["slipstream-draft", "--max-model-len", "2048", "--kv-memory", "64MiB", "--device", "cpu"]


def command(*arguments, **more):
    return subprocess.run(
        [sys.executable, *MAIN, *arguments], capture_output=True, text=True, timeout=100, check=False, **more
    )


class Served:
    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, *MAIN, "serve", *MODEL, "--port", "0", "--log-json", *arguments],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: self.said("serving"), 60)
        self.url = self.said("serving")[0]["message"].rsplit(" ", 1)[1]
        wait_until(lambda: self.said("Application startup complete."), 60)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def said(self, beginning):
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line["message"].startswith(beginning)]

    def post(self, **body):
        return httpx.post(self.url + "/v1/completions", json=body, timeout=60)


@pytest.fixture
def served():
    made = []

    def start(*arguments):
        made.append(Served(*arguments))
        return made[-1]

    yield start
    for server in made:
        server.process.kill()
        server.process.wait(10)


def test_sigterm_lets_requests_end_and_takes_no_new_ones(served, tmp_path):
    server = served()
    done = command("bench", "serve", "--url", server.url, "--num-prompts", "6", "--input-len", "8", "--output-len", "5",
                   "--max-concurrency", "3", "--request-rate", "200", "--json", str(tmp_path / "x.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    assert result == json.loads(done.stdout) and result["completed"] == 6 and result["total_output_tokens"] == 30
    assert 0 < result["p50_ttft_ms"] <= result["p99_e2el_ms"] and "output_throughput" in done.stderr

    replies = []
    body = {"prompt": "my quiz", "max_tokens": 300, "ignore_eos": True}  # no hex digits alone: ids are in the log
    asking = threading.Thread(target=lambda: replies.append(server.post(**body)))
    asking.start()
    wait_until(lambda: httpx.get(server.url + "/stats").json()["engine"]["running"] == 1)
    server.process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert replies[0].status_code == 200 and replies[0].json()["usage"]["completion_tokens"] == 300
    assert server.process.wait(20) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        server.post(**body)
    (line,) = [line for line in server.said("request") if line.get("completion_tokens") == 300]
    answer = replies[0].json()
    assert line["status"] == 200 and line["request_id"] in answer["id"]
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    log = "".join(server.lines)
    assert "quiz" not in log and answer["choices"][0]["text"] not in log  # no text of anybody in the log


def test_after_the_drain_requests_are_cancelled_in_order(served):
    server = served("--drain-s", "1", "--max-num-seqs", "40")
    answers = {}

    def ask(stream):
        answers[stream] = server.post(prompt="add", max_tokens=1900, ignore_eos=True, stream=stream, n=40)

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in asking:
        thread.start()
    wait_until(lambda: httpx.get(server.url + "/stats").json()["server"]["queued_chains"] == 80)
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    for thread in asking:
        thread.join(30)
    assert 0.5 < time.monotonic() - began < 8
    assert answers[False].status_code == 503 and answers[False].json()["error"]["code"] == "shutting_down"
    *_, last, done, end = answers[True].text.split("\n\n")
    assert json.loads(last[6:])["error"]["code"] == "shutting_down" and (done, end) == ("data: [DONE]", "")
    server.process.wait(20)


def refusal(monkeypatch, *arguments):
    """What a command in this process is refused with, before any model is loaded."""
    monkeypatch.setattr(cli_serve, "load", lambda *_: pytest.fail("a model was loaded"))
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, (ValueError, OSError)), done.output
    return str(done.exception)


def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch):
    assert "No such file" in refusal(monkeypatch, "serve", "--port", "0", "--api-key-file", "/nowhere")
    assert "max_n must be at least 1" in refusal(monkeypatch, "serve", "--max-n", "0")
    assert "cannot listen on 999.1.1.1" in refusal(monkeypatch, "serve", "--host", "999.1.1.1", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in refusal(
            monkeypatch, "serve", "--port", port
        )
    assert "no server answers" in refusal(monkeypatch, "bench", "serve", "--url", f"http://127.0.0.1:{port}")
    assert "comma-separated numbers" in refusal(monkeypatch, "bench", "serve", "--percentiles", "x")


def test_a_full_disk_for_the_log_stops_nobody(tmp_path):
    """The file of the log may grow to 4,000 bytes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    def lost():
        return float(re.search(r"^slipstream_lost_log_lines_total (\S+)", httpx.get(url + "/metrics").text, re.M)[1])

    with open(tmp_path / "log", "w") as file:
        process = subprocess.Popen(
            [sys.executable, *MAIN, "serve", *MODEL, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
        )  # fmt: skip
    try:
        wait_until(lambda: answers(url + "/health"), 60)
        for _ in range(60):
            assert httpx.post(url + "/tokenize", json={"prompt": "add"}, timeout=30).status_code == 200
        assert lost() >= 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait(10)
    assert "request" in (tmp_path / "log").read_text()


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:  # its port is taken long before it serves
        return False


READER = """
import http.client, json, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
body = {"prompt": "add", "max_tokens": 600, "ignore_eos": True, "temperature": 0, "stream": True, "logprobs": 20,
        "return_token_ids": True}
connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
ids = []
for line in connection.getresponse():
    if line.startswith(b"data: {"):
        ids += json.loads(line[6:])["choices"][0]["token_ids"]
        print(ids if len(ids) == 600 else "reading", flush=True)
"""


def test_a_client_that_is_stopped_for_five_seconds_gets_it_all_and_holds_nobody_up(served):
    server = served()
    port = server.url.rsplit(":", 1)[1]
    with subprocess.Popen([sys.executable, "-c", READER, port], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline() == "reading\n"
        reader.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            began = time.monotonic()
            assert server.post(prompt="my", max_tokens=3).status_code == 200
            assert time.monotonic() - began < 3
        reader.send_signal(signal.SIGCONT)
        *_, last = reader.stdout
    body = {"prompt": "add", "max_tokens": 600, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    assert json.loads(last) == server.post(**body).json()["choices"][0]["token_ids"]


@pytest.mark.parametrize("damage", ["nothing in it", "no JSON", "no weights", "not there"])
def test_a_model_that_cannot_be_read_is_named(tmp_path, damage):
    folder = tmp_path / "model"
    if damage != "not there":
        folder.mkdir()
    if damage == "no JSON":
        (folder / "config.json").write_text("{")
    if damage == "no weights":
        shutil.copy(ASSETS / "slipstream-draft" / "config.json", folder)
    done = command("serve", str(folder), "--port", "0", "--device", "cpu")
    assert done.returncode != 0 and "Traceback" not in done.stderr and str(folder) in done.stderr.replace("\n", "")


def test_a_draft_answers_chats_of_a_served_model(served):
    server = served("--draft", "slipstream-draft", "--alpha", "0.5")
    asked = {
        "messages": [{"role": "user", "content": "add"}],
        "scaling": {"samples": 2, "turns": 2, "draft_tokens": 20},
    }
    found = httpx.post(server.url + "/v1/chat/completions", json=asked, timeout=60).json()
    assert found["scaling"]["alpha"] == 0.5 and found["scaling"]["samples"] == 2
    assert found["usage"]["models"]["draft"]["completion_tokens"] > 0
