"""``slipstream serve`` as a process: ports, logs, signals; and ``bench serve`` against it."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import typer
from live_server import wait_until
from typer.testing import CliRunner

from slipstream import cli, cli_serve

MAIN = [
    "-c",
    "from slipstream import cli, cli_serve\n"
    "if 'serve' not in {c.callback.__name__ for c in cli.app.registered_commands}:\n"
    "    cli.app.command()(cli.engine_options(cli_serve.serve))\n"
    "    cli.bench.command('serve')(cli_serve.bench_serve)\n"
    "cli.main()",
]
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
    body = {"prompt": "add", "max_tokens": 300, "ignore_eos": True}
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
    assert line["status"] == 200 and line["prompt_tokens"] == 3 and line["request_id"] in replies[0].json()["id"]
    assert "add" not in "".join(server.lines)  # no text of anybody in the log


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
    app, bench = typer.Typer(), typer.Typer()
    app.add_typer(bench, name="bench")
    app.command()(cli.engine_options(cli_serve.serve))
    bench.command("serve")(cli_serve.bench_serve)
    done = CliRunner().invoke(app, arguments)
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
