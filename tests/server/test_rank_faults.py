"""A cache rank that dies or stops under the server: requests end or say why, and it is found again."""

import concurrent.futures
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from live_server import wait_until

sys.path.append(str(Path(__file__).parent.parent / "asyncspade"))
from ranks import Rank, load, prompts  # noqa: E402

BODY = {"max_tokens": 150, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
PROMPTS = prompts(90, 40, 70, 20)


@pytest.fixture(scope="module")
def rank():
    made = Rank()
    yield made
    made.kill()


@pytest.fixture
def serve(serving, rank):
    """A server before the rank, which is up."""
    if rank.process.poll() is not None:
        rank.start()

    def start(**method):
        return serving(load(**{"predictor": "last", "cache_rank": rank.address, "rank_timeout": 2} | method))

    return start


def ask_all(live, fault):
    """Four requests at once, half of them streamed; ``fault`` happens when they have begun. Their replies."""
    before = live.llm.stats()["decode_tokens"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(live.post, "/v1/completions", prompt=prompt, stream=i % 2 == 0, **BODY)
            for i, prompt in enumerate(PROMPTS)
        ]
        wait_until(lambda: live.llm.stats()["decode_tokens"] > before + 40)
        fault()
        return [future.result() for future in asked]


def tokens(reply):
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["token_ids"]
    events = [json.loads(block[6:]) for block in reply.text.split("\n\n") if block.startswith("data: {")]
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def kill(rank, live):
    rank.kill()


@contextlib.contextmanager
def stopped_for_five_seconds(rank):
    os.kill(rank.process.pid, signal.SIGSTOP)
    end = time.monotonic() + 5
    try:
        yield
        time.sleep(max(0, end - time.monotonic()))
    finally:
        os.kill(rank.process.pid, signal.SIGCONT)


def stop_for_five_seconds(rank, live):
    """Somebody who comes in the meantime is answered."""
    with stopped_for_five_seconds(rank):
        assert live.completions(prompt=[1], max_tokens=3)["choices"]


def stop_with_the_keys(rank, live):
    """Somebody who comes in the meantime is told to come again."""
    with stopped_for_five_seconds(rank):
        error = live.refused(live.post("/v1/completions", prompt=[1], max_tokens=3), 503)
        assert error["code"] == "peer_lost" and live.http.get("/health").status_code == 200


@pytest.mark.parametrize("fault", [kill, stop_for_five_seconds])
def test_requests_whose_keys_are_here_go_on_and_the_rank_is_found_again(serve, rank, fault):
    with serve() as live:
        alone = [live.completions(prompt=prompt, **BODY)["choices"][0]["token_ids"] for prompt in PROMPTS]
        found = [tokens(reply) for reply in ask_all(live, lambda: fault(rank, live))]
        assert [ids[:8] for ids in found] == [ids[:8] for ids in alone] and {len(ids) for ids in found} == {150}
        stats = live.llm.stats()
        assert stats["asyncspade_losses"] >= 1 and stats["asyncspade_fallbacks"] > 0 and stats["sparse_rows"] > 0
        if fault is kill:
            rank.start()
        wait_until(lambda: live.completions(prompt=[1]) and live.llm.stats()["asyncspade_connections"] == 2)
        fallbacks = live.llm.stats()["asyncspade_fallbacks"]
        assert live.completions(prompt=PROMPTS[0], **BODY)["choices"][0]["token_ids"] == alone[0]
        assert live.llm.stats()["asyncspade_fallbacks"] == fallbacks  # sparse again
        live.at_rest()


@pytest.mark.parametrize("fault", [kill, stop_with_the_keys])
def test_requests_whose_keys_the_rank_had_say_so_and_later_ones_are_served(serve, rank, fault):
    with serve(transfer="packed") as live:
        (alone,) = (live.completions(prompt=prompt, **BODY)["choices"][0]["token_ids"] for prompt in PROMPTS[:1])
        for i, reply in enumerate(ask_all(live, lambda: fault(rank, live))):
            if i % 2:
                error = live.refused(reply, 503)
            else:  # a stream that had begun
                *_, last, done, end = reply.text.split("\n\n")
                error = json.loads(last[6:])["error"]
                assert (done, end) == ("data: [DONE]", "")
            assert error["code"] == "peer_lost" and "try again" in error["message"]
        if fault is kill:
            reply = live.post("/v1/completions", prompt=PROMPTS[0], **BODY)
            assert live.refused(reply, 503)["code"] == "peer_lost" and reply.headers["Retry-After"]
            assert live.http.get("/health").status_code == 200
            rank.start()
        wait_until(lambda: live.post("/v1/completions", prompt=[1], max_tokens=1).status_code == 200)
        assert live.completions(prompt=PROMPTS[0], **BODY)["choices"][0]["token_ids"] == alone
        assert live.llm.stats()["asyncspade_bytes_in"] > 1_000_000  # keys and values, and not only indices
        live.at_rest()


def test_a_rank_with_the_keys_that_stops_for_less_than_its_timeout_is_waited_for(serve, rank):
    def stop():
        with stopped_for_five_seconds(rank):
            assert live.http.get("/health").status_code == 200

    with serve(transfer="packed", rank_timeout=30) as live:
        alone = [live.completions(prompt=prompt, **BODY)["choices"][0]["token_ids"] for prompt in PROMPTS]
        assert [tokens(reply) for reply in ask_all(live, stop)] == alone
        stats = live.llm.stats()
        assert stats["asyncspade_losses"] == 0 and stats["asyncspade_stall_s"] > 4
        live.at_rest()
