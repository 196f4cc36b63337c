"""The entrance before engines: same answers, one door; and before replicas that break off, refuse or fall silent."""

import asyncio
import concurrent.futures
import json
import re
import threading
import time

import httpx
import pytest
from fronts import KEY, Fronted, Scripted
from live_server import wait_until
from starlette.responses import JSONResponse, StreamingResponse

from slipstream import tasks

PROMPT = tasks.make("program", 1, steps=4).prompt
GREEDY = {"model": "m", "temperature": 0, "max_tokens": 40}


def said(reply):
    """What a stream says, without what differs from call to call."""
    events = [json.loads(part[6:]) for part in reply.text.split("\n\n") if part.startswith("data: {")]
    assert reply.text.count("data: [DONE]\n\n") == 1 and reply.text.endswith("data: [DONE]\n\n")
    return events


def text_of(events):
    deltas = [choice.get("delta", choice) for event in events for choice in event["choices"]]
    return "".join(d.get("reasoning") or d.get("content") or d.get("text") or "" for d in deltas)


# before engines


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_the_replicas(before_engines, path, stream):
    body = GREEDY | {"stream": stream}
    body |= {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    ours = before_engines.http.post(path, json=body)
    theirs = before_engines.replicas["m/0"].http.post(path, json=body)
    assert ours.status_code == theirs.status_code == 200
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    if stream:
        assert text_of(said(ours)) == text_of(said(theirs)) != ""
    else:
        assert ours.json()["choices"] == theirs.json()["choices"]
        assert ours.headers["x-slipstream-replica"] in before_engines.replicas
    assert len(ours.headers["x-request-id"]) == 32
    before_engines.at_rest()


def test_a_replicas_refusals_come_through(before_engines):
    reply = before_engines.ask(temperature=-1)
    assert reply.status_code == 400 and "temperature" in reply.json()["error"]["message"]
    assert before_engines.ask(model=["m"]).status_code == 404
    assert before_engines.ask(model="other").json()["error"]["code"] == "model_not_found"
    assert before_engines.http.post("/v1/completions", content="{").status_code == 400
    assert before_engines.http.post("/v1/completions", content='{"prompt": "a"}').status_code == 400  # no type
    assert before_engines.http.get("/nowhere").status_code == 404
    reply = before_engines.ask(prompt=[1] * 5000, stream=True)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "context_length_exceeded"
    before_engines.at_rest()


def test_everything_else_that_a_server_has(before_engines):
    http = before_engines.http
    (card,) = http.get("/v1/models").json()["data"]
    assert card["id"] == "m" and http.get("/v1/models/m").json() == card and http.get("/v1/models/x").status_code == 404
    ids = http.post("/tokenize", json={"model": "m", "prompt": "add"}).json()["tokens"]
    assert http.post("/detokenize", json={"model": "m", "tokens": ids}).json()["prompt"] == "add"
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    page = http.get("/")
    assert "<title>Slipstream" in page.text and "sha256-" in page.headers["content-security-policy"]
    stats = http.get("/stats", params={"replica": "m/1"}).json()
    assert stats["replica"] == "m/1" and stats["replicas"] == ["m/0", "m/1"] and stats["engine"]["pages_free"] > 0
    assert http.get("/stats", params={"replica": "x"}).status_code == 503
    assert http.put("/fleet", json={}).status_code == 403
    assert before_engines.ask(model=None).status_code == 200


def test_metrics_of_all_replicas_in_one_page(before_engines):
    before_engines.ask()
    text = before_engines.http.get("/metrics").text
    running = re.findall(r'^vllm:num_requests_running\{replica="(m/\d)",model_name="m"\} 0.0$', text, re.M)
    assert running == ["m/0", "m/1"]
    assert len(re.findall("^# TYPE vllm:num_requests_running ", text, re.M)) == 1
    assert re.search(r'^slipstream_replica_up\{replica="m/1"\} 1.0$', text, re.M)
    assert re.search(r'^slipstream_lost_log_lines_total\{replica="m/0"\} ', text, re.M)
    from prometheus_client.parser import text_string_to_metric_families

    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families)) > 30


def test_chains_of_a_question_find_their_prompts_keys(before_engines):
    """Four questions, three chains of two turns each, one after the other: each turn's prompt is in a cache."""
    cached = asked = 0
    used = {}
    for i in range(4):
        question = before_engines.http.post("/tokenize", json={"prompt": f"{i} {PROMPT} {i}"}).json()["tokens"] * 2
        for chain in range(3):
            ids = list(question)
            for turn in range(2):
                reply = before_engines.ask(
                    prompt=ids, max_tokens=20, seed=chain, temperature=1, return_token_ids=True, ignore_eos=True
                )
                found = reply.json()
                used.setdefault(i, set()).add(reply.headers["x-slipstream-replica"])
                ids += found["choices"][0]["token_ids"]
                if chain or turn:
                    cached += found["usage"]["prompt_tokens_details"]["cached_tokens"]
                    asked += len(question) // 64 * 64
    assert all(len(places) == 1 for places in used.values()) and cached >= asked >= 20 * 64


def test_many_at_once_are_shared_out(before_engines):
    def one(i):
        reply = before_engines.ask(prompt=[i + 20] * 30, max_tokens=30, ignore_eos=True, stream=i % 2 == 0)
        assert reply.status_code == 200
        return reply

    before = [live.llm.stats()["decode_tokens"] for live in before_engines.replicas.values()]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(24)))
    after = [live.llm.stats()["decode_tokens"] for live in before_engines.replicas.values()]
    gained = [b - a for a, b in zip(before, after, strict=True)]
    assert sum(gained) >= 24 * 29 and min(gained) >= 5 * 29
    before_engines.at_rest()


def test_who_leaves_is_cancelled_behind_the_entrance(before_engines):
    long = {"model": "m", "prompt": "add", "max_tokens": 1900, "ignore_eos": True}
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with before_engines.http.stream("POST", "/v1/completions", json=long | {"stream": True}) as reply:
                    next(reply.iter_raw())
                    raise httpx.ReadTimeout("enough")
            before_engines.http.post("/v1/completions", json=long, timeout=0.5)
        before_engines.at_rest()
        for live in before_engines.replicas.values():
            live.at_rest()


# before replicas that fail

EVENT = 'data: {"id": "x", "choices": [{"index": 0, "text": "%s", "finish_reason": null}]}\n\n'
OPENING = 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
ERROR = 'data: {"error": {"message": "no", "code": "%s"}}\n\n'
DONE = "data: [DONE]\n\n"


def streaming(*parts):
    """An answer of these events; an exception among them breaks the connection."""

    async def body():
        for part in parts:
            if not isinstance(part, str):
                raise part
            yield part.encode()
            await asyncio.sleep(0.02)

    async def answer(_):
        return StreamingResponse(body(), media_type="text/event-stream")

    return answer


async def good(_):
    return JSONResponse({"choices": [{"text": "good"}]})


def refusing(status, code):
    async def answer(_):
        return JSONResponse({"error": {"message": "no", "code": code}}, status, {"Retry-After": "7"})

    return answer


async def never(_):
    await asyncio.sleep(30)


breaking = streaming(RuntimeError("on purpose"))
GOOD_STREAM = streaming(EVENT % "go", EVENT % "od", DONE)
GOOD_CHAT = streaming(OPENING, 'data: {"choices":[{"index":0,"delta":{"content":"good"}}]}\n\n', DONE)


class Nobody:
    url = "http://127.0.0.1:9"

    def close(self): ...


def pair(running, bad, well, **front):
    """An entrance before a replica that does ``bad``, which gets the first request, and one that does ``well``."""
    replicas = {"bad": running(Scripted, bad), "well": running(Scripted, well)}
    fronted = running(Fronted, replicas, **front)
    fronted.all_up(2)
    fronted.replicas = replicas
    return fronted


@pytest.mark.parametrize(
    "bad",
    [breaking, refusing(503, "shutting_down"), refusing(503, "queue_full"), refusing(500, "engine_error")],
    ids=["breaks off", "shuts down", "is full", "engine fails"],
)
def test_what_was_not_answered_is_asked_elsewhere(running, bad):
    fronted = pair(running, bad, good)
    reply = fronted.ask(prompt="same")
    assert reply.json()["choices"] == [{"text": "good"}] and reply.headers["x-slipstream-replica"] == "well"
    (first,), (second,) = fronted.replicas["bad"].asked, fronted.replicas["well"].asked
    assert first[0] == second[0] and first[1]["authorization"] == "Bearer theirs"
    assert first[1]["x-request-id"] == reply.headers["x-request-id"]
    fronted.at_rest()


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("completions", []), ("completions", [": keep-alive\n\n"]), ("chat/completions", [OPENING]),
        ("chat/completions", [OPENING[:30]]), ("completions", [ERROR % "shutting_down", DONE]),
        ("chat/completions", [OPENING, ERROR % "peer_lost", DONE]),
    ],
)  # fmt: skip
def test_a_stream_that_has_said_nothing_is_asked_elsewhere(running, path, begins):
    last = [] if DONE in begins else [RuntimeError("on purpose")]
    fronted = pair(running, streaming(*begins, *last), GOOD_CHAT if "chat" in path else GOOD_STREAM)
    reply = fronted.ask(f"/v1/{path}", stream=True)
    assert reply.status_code == 200 and text_of(said(reply)) == "good"
    assert reply.text.count("assistant") == path.startswith("chat") and "error" not in reply.text
    assert fronted.entrance.fleet.again == 1 and len(fronted.replicas["well"].asked) == 1
    fronted.at_rest()


def test_a_stream_that_is_refused_elsewhere_ends_with_the_refusal(running):
    """Its head was sent as one that goes well."""
    fronted = pair(running, streaming(": keep-alive\n\n", RuntimeError("on purpose")), refusing(400, "no_such"))
    (last,) = said(fronted.ask(stream=True))
    assert last["error"]["code"] == "no_such"
    fronted.at_rest()


def test_a_stream_that_has_begun_ends_with_an_error(running):
    fronted = pair(running, streaming(EVENT % "wo", RuntimeError("on purpose")), GOOD_STREAM)
    *first, last = said(fronted.ask(stream=True))
    assert text_of(first) == "wo" and last["error"]["code"] == "replica_lost"
    assert not fronted.replicas["well"].asked
    fronted.at_rest()


@pytest.mark.parametrize("stream", [True, False])
def test_a_replica_that_hangs_loses_its_requests(running, stream):
    """It answers nothing, not even for its health: as a process that is stopped, or a link that is cut."""
    fronted = pair(running, never, GOOD_STREAM if stream else good, probe_limit_s=0.4)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fronted.ask, stream=stream)
        wait_until(lambda: fronted.replicas["bad"].asked)
        fronted.replicas["bad"].is_hung = True
        began = time.monotonic()
        reply = asked.result(10)
        assert reply.status_code == 200 and "go" in reply.text and time.monotonic() - began < 8
    assert fronted.ask(prompt="other").headers.get("x-slipstream-replica") == "well" or stream
    fronted.replicas["bad"].is_hung = False
    fronted.all_up(2)  # and is back
    fronted.at_rest()


def test_a_stream_that_falls_silent_is_lost(running):
    async def answer(_):
        async def body():
            yield b""
            await asyncio.sleep(30)

        return StreamingResponse(body(), media_type="text/event-stream")

    fronted = pair(running, answer, GOOD_STREAM, silence_s=0.3)
    assert text_of(said(fronted.ask(stream=True))) == "good"


def test_a_request_that_breaks_every_replica_is_given_up(running):
    fronted = running(Fronted, {f"r{i}": running(Scripted, breaking) for i in range(4)}, retries=2)
    fronted.all_up(4)
    reply = fronted.ask()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "replica_lost"
    assert fronted.entrance.fleet.lost == 3 and fronted.entrance.fleet.again == 2
    fronted.at_rest()


def test_a_pool_of_one_is_asked_again_when_it_is_well(running):
    """It broke off once, or was gone for a while: there is nobody else to wait for."""
    times = []

    async def once(request):
        times.append(1)
        return await (breaking if len(times) == 1 else good)(request)

    fronted = running(Fronted, {"one": running(Scripted, once)})
    fronted.all_up(1)
    assert fronted.ask().json()["choices"] == [{"text": "good"}] and len(times) == 2
    fronted.at_rest()


def test_a_replica_that_dies_before_it_answers_holds_nothing(running):
    class Deaf:
        """Well, but it hangs up on every request."""

        def __init__(self):
            async def talk(reader, writer):
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    await writer.drain()
                writer.close()

            async def serve():
                server = await asyncio.start_server(talk, "127.0.0.1", 0)
                self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
                await self.stop.wait()

            threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
            wait_until(lambda: hasattr(self, "stop"))

        def close(self):
            self.loop.call_soon_threadsafe(self.stop.set)

    fronted = running(Fronted, {"deaf": running(Deaf)}, retries=1)
    fronted.all_up(1)
    for stream in (True, False):
        reply = fronted.ask(stream=stream)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "replica_lost"
    assert fronted.entrance.fleet.lost == 4
    fronted.at_rest()


def test_all_full_is_told_at_once(running):
    fronted = pair(running, refusing(503, "queue_full"), refusing(503, "queue_full"))
    began = time.monotonic()
    reply = fronted.ask()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "queue_full" and time.monotonic() - began < 2
    assert reply.headers["retry-after"] == "7" and fronted.entrance.fleet.lost == 0
    fronted.at_rest()


def test_nobody_there_is_waited_for_and_then_told(running):
    fronted = running(Fronted, {"gone": Nobody()}, wait_s=0.5)
    assert fronted.http.get("/ready").status_code == 503
    for stream in (True, False):
        reply = fronted.ask(stream=stream)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "no_replica"
    fronted.entrance.fleet._config = fronted.entrance.config.model_copy(update={"wait_s": 10})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fronted.ask)
        time.sleep(0.2)
        fronted.tell({"late": running(Scripted, good)})
        assert asked.result(10).json()["choices"] == [{"text": "good"}]
    fronted.at_rest()


def test_who_is_leaving_gets_nothing_new_and_ends_what_it_has(running):
    release = asyncio.Event()

    async def slow(_):
        await release.wait()
        return await good(_)

    fronted = pair(running, slow, good)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fronted.ask)
        wait_until(lambda: fronted.replicas["bad"].asked)
        assert fronted.tell(fronted.replicas, leaving=["bad"])["bad"]["chains"] == 1
        for i in range(4):
            assert fronted.ask(prompt=f"{i}").headers["x-slipstream-replica"] == "well"
        release._loop.call_soon_threadsafe(release.set)
        assert asked.result(10).headers["x-slipstream-replica"] == "bad"
    assert fronted.tell({"well": fronted.replicas["well"]}).keys() == {"well"}


def test_a_replica_at_a_new_address_is_a_new_one(running):
    fronted = running(Fronted, {"a": running(Scripted, never)})
    fronted.all_up(1)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fronted.ask)
        wait_until(lambda: fronted.entrance.fleet.replicas["a"].chains)
        fronted.tell({"a": running(Scripted, good)})
        assert asked.result(10).json()["choices"] == [{"text": "good"}]
    fronted.at_rest()


def test_keys_of_clients_end_at_the_entrance(running, tmp_path):
    (tmp_path / "keys").write_text(f"client {KEY}")
    replica = running(Scripted, good)
    fronted = running(Fronted, {"a": replica}, api_key_file=str(tmp_path / "keys"))
    fronted.all_up(1)
    assert fronted.ask().status_code == 401
    fronted.http.headers["Authorization"] = "Bearer client"
    assert fronted.ask().status_code == 200 and replica.asked[0][1]["authorization"] == "Bearer theirs"
    assert fronted.http.put("/fleet", json={}).status_code == 403  # a client is no keeper
