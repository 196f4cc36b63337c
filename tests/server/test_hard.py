"""Hard to break: bodies that are none, clients that leave, stall, storm or lie, full queues, engines that die."""

import base64
import concurrent.futures
import json
import random
import socket
import struct
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import LONG, wait_until

from slipstream.server.door import Call, Gate
from slipstream.server.errors import ApiError
from slipstream.server.reply import Reply
from slipstream.server.service import MANY_DEATHS

TIGHT = {"body_timeout_s": 1.0, "keep_alive_s": 0.15, "stall_timeout_s": 1.0, "max_body_bytes": 200_000}
ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def live(serving):
    with serving(**TIGHT) as live:
        yield live


@pytest.fixture(autouse=True)
def survives(live):
    """After whatever a test has done, nothing is held and the next request is answered."""
    yield
    live.at_rest()
    assert live.http.get("/health").json() == {"status": "ok"}
    assert live.completions(prompt="add", max_tokens=2)["usage"]["completion_tokens"] == 2


# bodies

BAD_BODIES = [
    b"", b"\x00", b"{", b"[]", b"null", b'"x"', b"3", b"\xff\xfe{\x00}\x00", b'{"prompt": "\xff"}', b'{"prompt": NaN}',
    b"[" * 100_000, b'{"a":' * 30_000 + b"1" + b"}" * 30_000, b'{"prompt": "x", "n": 1e999}', b"\xef\xbb\xbf{}",
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": "x", "max_tokens": 1e400}',
    b'{"prompt": [' + b"9" * 4000 + b"]}", b'{"prompt": []}', b'{"prompt": ""}', b'{"prompt": [[]]}',
    b'{"prompt": "x", "temperature": Infinity}', b'{"messages": []}', b'{"messages": [{}]}', b'{"tokens": [1e3]}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": true}}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"self": 1}}',  # a name of Python's
    b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}',
    b'{"messages": [{"role": "tool", "content": "x"}]}', b'{"prompt": "x", "max_tokens": 99999999999999999999}',
    b'{"prompt": "x", "prompt_logprobs": 0, "prompt_logprobs_start": -1}', b'{"prompt": [1, 2, 5000]}',
    '{"prompt": "é"}'.encode("utf-16")[:-1], b'{"prompt": "x", "stop": "' + b"x" * 300 + b'"}',
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_bad_bodies_are_the_clients_fault(live, route):
    """Some are no request for one route only: a prompt of "x" without more can be tokenized."""
    for body in BAD_BODIES:
        reply = live.http.post(route, content=body, headers={"Content-Type": "application/json"})
        if reply.status_code != 200 or "completions" in route:
            assert live.refused(reply, 400), body


RIGHT = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
FIELDS = st.sampled_from(
    "prompt messages model n stop seed stream max_tokens temperature logprobs echo tokens top_p stream_options top_k "
    "min_p min_tokens stop_token_ids best_of tools scaling prompt_logprobs cache_salt chat_template_kwargs "
    "nonsense".split()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(0, 5) | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(ROUTES), st.dictionaries(FIELDS, VALUES, max_size=6), st.booleans())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_json_breaks_it(live, route, body, is_mostly_right):
    if is_mostly_right:
        body |= RIGHT[route]
    reply = live.http.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400, 404), (body, reply.text)
    if reply.status_code != 200:
        live.refused(reply, reply.status_code)


def test_a_number_of_any_size_is_all_or_refused(live):
    """One that no integer of a device holds once ended the engine's thread, or came round to a small one."""
    body = RIGHT["/v1/completions"] | {"max_tokens": 8, "seed": 1}
    everything = live.completions(**body)["choices"]
    for huge in (2**31, 2**32 + 1, 2**63, 10**40):
        assert live.completions(**body, top_k=huge)["choices"] == everything
        assert live.completions(**body, stop_token_ids=[huge])["choices"] == everything
        for name in ("seed", "min_tokens", "max_tokens", "n", "logprobs", "temperature", "prompt_logprobs_start"):
            assert live.post("/v1/completions", **body | {name: huge}).status_code in (200, 400), name
    assert live.http.get("/health").status_code == 200


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_bytes_break_it(live, data):
    with live.raw(data) as connection:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        while connection.recv(65536):
            pass


def test_other_content_types_methods_and_paths(live):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what a page may post
        reply = live.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert "application/json" in live.refused(reply, 400)["message"]
    live.refused(live.http.get("/v1/completions"), 405)
    live.refused(live.http.get("/nothing"), 404)
    assert live.http.get("/openapi.json").json()["paths"].keys() >= set(ROUTES)


def test_too_long_bodies(live):
    live.refused(live.http.post("/tokenize", content=b"x" * 200_001), 413)

    def chunks():
        for _ in range(300):
            yield b" " * 1000

    reply = live.http.post("/tokenize", content=chunks(), headers={"Content-Type": "application/json"})
    live.refused(reply, 413)
    with live.raw(live.request_bytes("/tokenize", b"{", length=10**30)) as connection:
        assert connection.recv(65536).split()[1] in (b"413", b"400")  # the door's answer, or the HTTP parser's


def test_half_a_body_is_not_waited_for(live):
    with live.raw(live.request_bytes("/v1/completions", b'{"prompt": ', length=100)) as connection:
        began = time.monotonic()
        answer = connection.recv(65536)
        assert b" 408 " in answer and 0.5 < time.monotonic() - began < 5
    live.raw(live.request_bytes("/v1/completions", b'{"prompt": ', length=100)).close()


# limits


def test_limits_have_names_and_codes(live):
    error = live.error("/v1/completions", 400, prompt="x", max_tokens=2048)
    assert error["code"] == "context_length_exceeded" and "2048 tokens" in error["message"]
    assert live.error("/v1/completions", 400, prompt=[5] * 3000)["code"] == "context_length_exceeded"
    assert live.error("/v1/completions", 400, prompt=["x"] * 1025)["param"] == "prompt"
    assert "max_num_seqs" in live.error("/v1/completions", 400, prompt="x", n=100)["message"]
    assert live.error("/v1/completions", 400, prompt="x", n=129)["param"] == "n"


def test_a_full_queue_says_when_to_come_again(serving, tiny, slowly):
    llm = tiny()
    slowly(0.05, llm)
    with serving(llm, max_queue=2) as small:
        connection = small.raw(small.request_bytes("/v1/completions", {"prompt": [1], "n": 2, "max_tokens": 200}))
        wait_until(lambda: small.service.gate.chains == 2)
        reply = small.post("/v1/completions", prompt=[1], max_tokens=1)
        assert small.refused(reply, 503)["type"] == "overloaded_error" and int(reply.headers["Retry-After"]) >= 1
        assert small.http.get("/ready").status_code == 503 and small.http.get("/health").status_code == 200
        connection.close()
        small.at_rest()
        assert small.completions(prompt=[1], max_tokens=1) and small.http.get("/ready").status_code == 200


def test_an_engine_that_is_lost_shows(serving, tiny, monkeypatch):
    llm = tiny()
    with serving(llm) as lost:
        monkeypatch.setattr(llm.engine, "step", lambda: 1 / 0)
        assert lost.error("/v1/completions", 500, prompt=[1])["code"] == "engine_error"
        assert lost.error("/v1/completions", 500, prompt=[1])["code"] == "engine_error"
        for route in ("/health", "/ready"):
            error = lost.refused(lost.http.get(route), 503)
            assert error["code"] == "engine_lost" and "ZeroDivisionError: division by zero" in error["message"]
        monkeypatch.undo()
        llm.engine.cancel_all()


def test_a_device_that_fails_every_step_shows(serving, tiny, monkeypatch):
    """Its thread lives and goes on trying; one answer, and all is well again."""
    llm = tiny()

    def broken(plan):
        raise RuntimeError("an illegal memory access was encountered")

    with serving(llm) as failing:
        monkeypatch.setattr(llm.engine.runner, "launch", broken)
        for _ in range(MANY_DEATHS):
            assert failing.http.get("/health").status_code == 200
            failing.error("/v1/completions", 500, prompt=[1])
        assert f"last {MANY_DEATHS} requests died" in failing.refused(failing.http.get("/health"), 503)["message"]
        monkeypatch.undo()
        failing.completions(prompt=[1], max_tokens=1)
        assert failing.http.get("/health").status_code == 200
        failing.at_rest()


def test_out_of_memory_takes_the_batch_and_nobody_else(serving, tiny, monkeypatch):
    """Raised in the pool, in mid-batch: three that run die of it, three that wait are served."""
    llm, copy_pages, raised = tiny(max_num_seqs=3), None, []
    copy_pages = llm.pool.copy_pages

    def exhausted(copies):
        if not raised and len(llm.engine.scheduler.running) == 3 and llm.stats()["decode_tokens"] > 20:
            raised.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory: secret")
        copy_pages(copies)

    body = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
    with serving(llm) as crowded:
        alone = [crowded.completions(prompt=[i], **body)["choices"] for i in range(6)]
        monkeypatch.setattr(llm.pool, "copy_pages", exhausted)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda i: crowded.post("/v1/completions", prompt=[i], **body), range(6)))
        assert raised and sorted(reply.status_code for reply in replies) == [200] * 3 + [500] * 3
        for reply, choices in zip(replies, alone, strict=True):
            assert reply.status_code == 500 or reply.json()["choices"] == choices
            assert "secret" not in reply.text
        assert crowded.http.get("/health").status_code == 200
        crowded.at_rest()


def test_many_streams_share_what_may_be_sent(serving, tiny):
    """Beyond ``stream_rate`` a chunk holds several tokens; nothing is lost, and ends are not waited for."""
    body = {"prompt": [1, 2], "max_tokens": 120, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    with serving(tiny(), stream_rate=10) as shared:
        began = time.monotonic()
        parts = [event["choices"][0]["token_ids"] for event in shared.events("/v1/completions", **body)]
        seconds = time.monotonic() - began
        assert sum(parts, []) == shared.completions(**body)["choices"][0]["token_ids"]
        assert len(parts[0]) < 20 and len(parts) <= 3 + seconds / 0.1  # 10 a second, and the end
        parts = [event["choices"][0]["token_ids"] for event in shared.events("/v1/completions", **body | {"n": 3})]
        assert len(sum(parts, [])) == 360
        shared.at_rest()


def test_the_queue_counts_chains_and_tokens(live):
    gate = Gate(type(live.config)(max_queue=3, max_queue_tokens=100))
    first, second = Call("a"), Call("b")
    gate.hold(first, 2, 50)
    with pytest.raises(ApiError) as caught:
        gate.hold(second, 2, 10)
    assert caught.value.status_code == 503 and int(caught.value.headers["Retry-After"]) >= 1
    with pytest.raises(ApiError) as caught:
        gate.hold(second, 1, 51)
    assert caught.value.status_code == 503
    with pytest.raises(ApiError) as caught:  # never fits: not worth a retry
        gate.hold(second, 4, 1)
    assert caught.value.status_code == 400
    assert not gate.is_full
    gate.hold(second, 1, 50)
    assert gate.is_full
    gate.release(first)
    gate.release(first)
    gate.release(second)
    assert (gate.chains, gate.tokens, gate.is_full) == (0, 0, False)


# clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_frees_the_pages_at_once(live, slowly, stream):
    slowly(0.01)
    connection = live.raw(live.request_bytes("/v1/completions", LONG | {"stream": stream, "n": 4}))
    wait_until(lambda: live.llm.stats()["running"] == 4)
    assert live.llm.stats()["pages_used"] > 0 and live.service.gate.chains == 4
    steps = live.llm.stats()["steps"]
    connection.close()
    live.at_rest()
    assert live.llm.stats()["steps"] - steps < 100  # of 1900


def test_cancellation_storm(live):
    """Eighty clients, most of which reset or close at some moment; the others get what they would get alone."""
    dice = random.Random(1)
    alone = live.completions(prompt="min mul", max_tokens=60, temperature=0, ignore_eos=True)["choices"][0]["text"]

    def client(i):
        rough = dice.random()
        if i % 4 == 0:
            body = {"prompt": "min mul", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
            return live.completions(**body)["choices"][0]["text"] == alone
        data = live.request_bytes(
            "/v1/completions", LONG | {"stream": i % 2 == 0, "prompt": f"add {i}", "n": 1 + i % 3}
        )
        with live.raw(data[: len(data) if rough < 0.8 else int(rough * len(data))]) as connection:
            time.sleep(0.2 * dice.random())
            if i % 3 == 0:  # reset instead of close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(client, range(80)))


def test_who_does_not_read_is_cut_off_and_holds_nobody_up(live):
    """A reader that stalls: its answer's beginning (log-probabilities) is more than any buffer holds."""
    body = LONG | {"stream": True, "logprobs": 20, "prompt_logprobs": 20, "echo": True, "prompt": "add " * 400, "n": 8}
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", live.port))
    connection.sendall(live.request_bytes("/v1/completions", body | {"max_tokens": 1200}))
    wait_until(lambda: live.llm.stats()["running"] == 8)
    steps, began = live.llm.stats()["steps"], time.monotonic()
    assert live.completions(prompt="my", max_tokens=5)["choices"]
    assert time.monotonic() - began < 10
    live.at_rest()
    assert live.llm.stats()["steps"] - steps < 1000  # it was cut off, not served to its end
    connection.close()


def test_silence_is_filled_with_comments(live, slowly):
    slowly(0.4)
    reply = live.post("/v1/completions", prompt="add", max_tokens=3, stream=True, ignore_eos=True)
    blocks = reply.text.split("\n\n")
    assert blocks.count(": keep-alive") >= 2 and blocks[-2] == "data: [DONE]"
    assert sum(block.startswith("data: {") for block in blocks) == 3


# engines that fail


def test_a_step_that_dies_takes_only_its_requests(live, monkeypatch):
    launch, hits = live.llm.engine.runner.launch, []

    def out_of_memory(plan):
        if not hits and any(len(chain.ids) == 77 for chain in plan.chains()):
            hits.append(1)
            raise RuntimeError("CUDA out of memory: secret detail")
        return launch(plan)

    monkeypatch.setattr(live.llm.engine.runner, "launch", out_of_memory)
    error = live.error("/v1/completions", 500, prompt=[5] * 77)
    assert error["type"] == "server_error" and "secret" not in error["message"]
    hits.clear()
    reply = live.post("/v1/completions", prompt=[5] * 77, stream=True)
    assert reply.status_code == 200
    first, last, end = reply.text.split("\n\n")
    assert json.loads(first[6:])["error"]["code"] == "engine_error" and last == "data: [DONE]" and end == ""


def test_canary_greedy_under_load_is_greedy_alone(live):
    """What offload bugs break in other engines: every answer under load is the answer alone."""
    prompts = [f"add {i} sub {i % 7} mul" for i in range(24)]
    body = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
    alone = [live.completions(prompt=prompt, **body)["choices"][0]["text"] for prompt in prompts]
    assert len(set(alone)) > 3

    def crowd(i):
        if i % 2:
            return live.completions(prompt=prompts[i], **body)["choices"][0]["text"]
        return "".join(e["choices"][0]["text"] for e in live.events("/v1/completions", prompt=prompts[i], **body))

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(crowd, range(24))) == alone


# doors


def test_keys_guard_all_but_health(serving, live, tiny, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    with serving(tiny(), api_key_file=str(keys)) as guarded:
        routes = {(r.path, m) for r in guarded.server.config.app.routes for m in r.methods} - {("/health", "GET")}
        assert len(routes) >= 12
        for path, method in routes:
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}):
                error = (
                    guarded.refused(guarded.http.request(method, path, headers=header), 401) if method != "HEAD" else {}
                )
                assert error.get("code", "invalid_api_key") == "invalid_api_key"
        assert guarded.http.get("/health").status_code == 200
        assert guarded.http.get("/nothing").status_code == 401
        assert guarded.http.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
        basic = base64.b64encode(b"me:sesame").decode()
        assert guarded.http.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200
        assert guarded.http.get("/").headers["www-authenticate"].startswith("Basic")


def test_a_name_that_points_here_is_not_enough(live):
    """DNS rebinding: a foreign page may resolve its name to 127.0.0.1, but its Host header tells."""
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("", 403)):
        reply = live.http.get("/v1/models", headers={"Host": host})
        assert reply.status_code == status, host
    assert "access-control-allow-origin" not in live.http.get("/v1/models", headers={"Origin": "http://x"}).headers


def test_a_large_answer_is_put_together_beside_the_event_loop(live, monkeypatch):
    """One prompt's log-probabilities in 32 choices kept everybody waiting for seconds."""
    threads, take = [], Reply.take
    monkeypatch.setattr(Reply, "take", lambda *given: (threads.append(threading.current_thread()), take(*given))[1])
    body = {"prompt": [5] * 300, "n": 2, "echo": True, "max_tokens": 2, "temperature": 0}
    live.completions(**body)
    assert {*threads} == {live._thread}
    threads.clear()
    whole = live.completions(**body, logprobs=9)["choices"]
    assert len(threads) == 2 and live._thread not in threads
    threads.clear()
    events = live.events("/v1/completions", **body, logprobs=9)
    assert threads[0] is not live._thread
    for choice in whole:
        own = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert sum((part["logprobs"]["token_logprobs"] for part in own), []) == choice["logprobs"]["token_logprobs"]
        assert "".join(part["text"] for part in own) == choice["text"]


def test_a_kept_connection_is_answered_at_once(live):
    """Nagle's algorithm and delayed acknowledgements together make it 40 ms."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        live.post("/detokenize", tokens=[1])
        times.append(time.perf_counter() - began)
    assert min(times[1:]) < 0.03


def test_request_ids_come_back(live):
    assert live.http.get("/ready", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("x" * 65, "a b", 'a"b'):
        assert live.http.get("/ready", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_metrics_count_what_happened(live):
    def scrape():
        lines = [line for line in live.http.get("/metrics").text.splitlines() if line and line[0] != "#"]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    answered = 'slipstream_http_requests_total{route="/v1/completions",status="200"}'
    before = scrape()
    live.completions(prompt=[5] * 10, max_tokens=6, ignore_eos=True)
    live.events("/v1/completions", prompt=[5] * 10, max_tokens=6, ignore_eos=True)
    wait_until(lambda: scrape()[answered] == before[answered] + 2)  # counted when all of it is sent
    after = scrape()
    label = '{model_name="slipstream-draft"}'

    def grown(name):
        return after[name] - before[name]

    assert grown(f"vllm:prompt_tokens_total{label}") == 20 and grown(f"vllm:generation_tokens_total{label}") == 12
    assert grown(f"vllm:time_to_first_token_seconds_count{label}") == 2
    assert grown(f"vllm:request_time_per_output_token_seconds_count{label}") == 2
    assert 1 <= grown(f"vllm:inter_token_latency_seconds_count{label}") <= 5  # chunks, of one token or more
    assert grown('vllm:request_success_total{finished_reason="length",model_name="slipstream-draft"}') == 2
    assert after[f"vllm:num_requests_running{label}"] == 0 == after[f"vllm:kv_cache_usage_perc{label}"]
    assert grown(f"slipstream_finished_requests_total{label}") == 2
    live.http.get("/made/up/path")
    assert set(scrape()) - set(after) <= {
        f'slipstream_http_requests_{kind}{{route="other",status="404"}}' for kind in ("total", "created")
    }
