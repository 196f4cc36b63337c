"""What may go wrong between two ranks: no wrong token is ever emitted silently.

Where the fault only costs time, tokens are those of one device. Where sets are lost, the run is replayed on one device
that attends to everything in just the layers that had to; with predictor ``last`` no other memory is lost.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from ranks import SOURCE, Proxy, Rank, by_row, load, params, prompts, raw, tokens

from slipstream.asyncspade.protocol import Kind
from slipstream.asyncspade.remote import RemoteBackend
from slipstream.kernels import ops

LAST = {"predictor": "last"}
(PROMPT,) = prompts(90)


@pytest.fixture(scope="module")
def rank():
    made = Rank()
    yield made
    made.kill()


@pytest.fixture
def proxy(rank):
    made = []

    def make(change=lambda towards, message: [(0, raw(message))], target=None):
        made.append(Proxy(target or (lambda: rank.address), change))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def alone():
    """Tokens of two prompts at once, on one device."""
    with load() as llm:
        return tokens(llm, prompts(90, 40))


def fallbacks_of(llm):
    """For every later call of a sparse layer, whether its only request attended to everything."""
    backend, seen = llm.engine.backend, []
    attend = backend._select_and_attend

    def watched(layer, q):
        before = backend._num_fallbacks
        out = attend(layer, q)
        seen.append(backend._num_fallbacks > before)
        return out

    backend._select_and_attend = watched
    return seen


def replay(seen, max_tokens, **method):
    """The tokens of PROMPT on one device that is dense where ``seen`` says so."""
    with load(**LAST, **method) as llm:
        backend, calls = llm.engine.backend, iter(seen)
        attend = backend._select_and_attend

        def told(layer, q):
            if not next(calls):
                return attend(layer, q)
            batch, pool = backend._decodes, backend.pool
            return ops.decode_attention(
                q, pool.k[layer], pool.v[layer], batch.page_table, batch.lengths, llm.spec.scale
            )

        backend._select_and_attend = told
        return tokens(llm, [PROMPT], params(max_tokens))[0][0]


def stream(llm, max_tokens, at):
    """Tokens of PROMPT; ``at``: number of tokens -> what happens then."""
    found = []
    for chunk in llm.stream(PROMPT, params(max_tokens)):
        found += chunk.token_ids
        if len(found) in at:
            at[len(found)]()
    return found


# -- time


def test_any_message_may_be_delayed(proxy, alone):
    noise = random.Random(1)
    slow = proxy(
        lambda towards, message: [(noise.random() * 0.02, raw(message))] if not towards else [(0, raw(message))]
    )
    with load(cache_rank=slow.address) as llm:
        assert tokens(llm, prompts(90, 40)) == alone
        stats = llm.stats()
    assert stats["asyncspade_stalls"] and stats["asyncspade_stall_s"] > 0.05 and not stats["asyncspade_fallbacks"]


def test_answers_of_requests_may_overtake_each_other(proxy, alone):
    noise = random.Random(2)

    def shuffle(towards, message):
        return [(0 if towards else noise.random() * 0.01, raw(part)) for part in by_row(message)]

    with load(cache_rank=proxy(shuffle).address) as llm:
        assert tokens(llm, prompts(90, 40)) == alone and not llm.stats()["asyncspade_fallbacks"]


def test_a_rank_that_stops_for_a_moment_is_waited_for(rank):
    stop = lambda: (os.kill(rank.process.pid, signal.SIGSTOP), threading.Timer(0.4, wake).start())  # noqa: E731
    wake = lambda: os.kill(rank.process.pid, signal.SIGCONT)  # noqa: E731
    with load(**LAST) as llm:
        expected = tokens(llm, [PROMPT], params(12))[0][0]
    with load(**LAST, cache_rank=rank.address) as llm:
        assert stream(llm, 12, {5: stop}) == expected
        assert llm.stats()["asyncspade_stall_s"] > 0.2 and llm.stats()["asyncspade_losses"] == 0


@pytest.mark.parametrize("transfer", ["indices", "delta"])
def test_a_late_set_may_be_stood_in_for_by_the_one_before(rank, proxy, transfer):
    """Every answer takes longer than a step: sets are one step old, with all newer tokens, and counted."""
    slow = proxy(lambda towards, message: [(0 if towards else 0.05, raw(message))])
    method = {"late": "stale", "max_stale": 2, "budget": 26, "transfer": transfer}
    with load(**LAST, cache_rank=slow.address, **method) as llm:
        found = stream(llm, 12, {})
        stats = llm.stats()
    assert len(found) == 12 and stats["asyncspade_late"] > 0 and stats["asyncspade_losses"] == 0
    with load(**LAST, cache_rank=rank.address, **method) as llm:  # in time
        assert len(stream(llm, 3, {})) == 3


def test_stale_sets_get_the_newer_tokens():
    class Sets(RemoteBackend):
        def __init__(self):
            self.indices = torch.tensor([[[[-1] * 4], [[0, 5, 9, -1]], [[0, 1, 2, 7]]]], dtype=torch.int32)
            self.counts = torch.tensor([[[0], [3], [4]]], dtype=torch.int32)

    lengths, seats = torch.tensor([12, 8], dtype=torch.int32), torch.tensor([1, 2])
    indices, counts = Sets()._with_newer(0, seats, lengths, [2, 0])
    assert counts.tolist() == [[5], [4]]
    assert indices[0, 0].tolist() == [0, 5, 9, 10, 11, -1] and indices[1, 0].tolist() == [0, 1, 2, 7, -1, -1]


# -- loss


def test_a_killed_rank_costs_its_sets_and_the_rest_is_exact():
    own = Rank()
    with load(**LAST, cache_rank=own.address) as llm:
        seen = fallbacks_of(llm)
        found = stream(llm, 16, {6: own.kill})
        stats = llm.stats()
    assert found == replay(seen, 16)
    assert not any(seen[:8]) and all(seen[-16:]) and stats["asyncspade_fallbacks"] == sum(seen)
    assert stats["asyncspade_losses"] == 1 and stats["finished_requests"] == 1


@pytest.mark.parametrize("transfer", ["packed", "delta"])
def test_a_killed_rank_that_has_the_keys_fails_its_requests_and_the_engine_lives(transfer):
    own = Rank()
    with load(**LAST) as llm:
        expected = tokens(llm, [PROMPT])
    with load(**LAST, cache_rank=own.address, transfer=transfer, rank_timeout=1) as llm:
        with pytest.raises(RuntimeError, match=rf"cache rank {own.address} .*lost|sent no set"):
            stream(llm, 16, {6: own.kill})
        with pytest.raises(RuntimeError, match="is lost .*nothing can be decoded"):
            tokens(llm, [PROMPT])
        own.start()
        assert tokens(llm, [PROMPT]) == expected
        assert llm.stats()["running"] == 0 and llm.stats()["pages_used"] == 0
    own.kill()


def test_a_cut_connection_is_dialled_again_and_the_rank_told_everything_anew(proxy):
    line = proxy()
    with load(**LAST, cache_rank=line.address) as llm:
        seen = fallbacks_of(llm)
        # A handshake goes on at the beginning of steps, and these are faster than the rank's answers.
        dialling = dict.fromkeys(range(8, 38), lambda: time.sleep(0.02))
        found = stream(llm, 60, {6: line.cut} | dialling)
        stats = llm.stats()
    assert found == replay(seen, 60)
    assert stats["asyncspade_connections"] == 2 and stats["asyncspade_losses"] == 1
    assert any(seen) and not any(seen[-20:])  # sparse again


def test_a_rank_that_never_wakes_is_given_up(rank):
    own = Rank()
    with load(**LAST, cache_rank=own.address, rank_timeout=1) as llm:
        seen = fallbacks_of(llm)
        start = time.monotonic()
        found = stream(llm, 10, {5: lambda: os.kill(own.process.pid, signal.SIGSTOP)})
        assert time.monotonic() - start < 10 and any(seen)
        assert found == replay(seen, 10)
    own.kill()


def test_a_full_rank_says_so():
    small = Rank(kv_memory="96KiB")
    try:
        with load(**LAST, cache_rank=small.address) as llm:
            seen = fallbacks_of(llm)
            found = stream(llm, 8, {})
            assert found == replay(seen, 8) and all(seen) and llm.stats()["asyncspade_losses"] == 0
        with load(**LAST, cache_rank=small.address, transfer="packed") as llm:
            with pytest.raises(RuntimeError, match="no room for a request"):
                tokens(llm, [PROMPT])
    finally:
        small.kill()


# -- messages that are not for now, or for nobody


def test_what_carries_another_tag_is_never_used(proxy, alone):
    """Answers come three times: of another session, of an epoch long over, and, a step later, once more."""
    old = []

    def repeat(towards, message):
        if towards or message.kind != Kind.SETS:
            return [(0, raw(message))]
        rows, indices, counts = message.tensors
        wrong = torch.randint_like(indices, 5).sort().values
        others = torch.stack((rows[:, 0], rows[:, 1] - 1, rows[:, 2]), 1)
        parts = [
            message._replace(session=message.session + 2, tensors=(rows, wrong, counts)),
            message._replace(tensors=(others, wrong, counts)),
            *old[-2:],
            message,
        ]
        old.append(message)
        return [(0, raw(part)) for part in parts]

    with load(cache_rank=proxy(repeat).address) as llm:
        assert tokens(llm, prompts(90, 40)) == alone
        assert llm.stats()["asyncspade_strays"] > 50 and not llm.stats()["asyncspade_fallbacks"]


@pytest.mark.parametrize("spoil", ["range", "count", "layer", "bytes"])
def test_an_answer_that_cannot_be_costs_the_rank(proxy, spoil):
    def change(towards, message):
        if towards or message.kind != Kind.SETS or message.step < 5:
            return [(0, raw(message))]
        rows, indices, counts = message.tensors
        if spoil == "bytes":
            return [(0, b"\0" * 200)]
        if spoil == "layer":
            return [(0, raw(message._replace(layer=7)))]
        changed = (rows, indices + 1000, counts) if spoil == "range" else (rows, indices, counts + 99)
        return [(0, raw(message._replace(tensors=changed)))]

    with load(**LAST, cache_rank=proxy(change).address) as llm:
        seen = fallbacks_of(llm)
        assert stream(llm, 10, {}) == replay(seen, 10)
        assert any(seen) and llm.stats()["asyncspade_losses"] >= 1


def test_a_rank_refuses_what_is_no_protocol_and_lives_on(rank, alone):
    host, port = rank.address.split(":")
    for garbage in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 100, os.urandom(500), b"SSPD\1\0\1\0" + b"\xff" * 60):
        with socket.create_connection((host, int(port))) as sock:
            sock.settimeout(10)
            sock.sendall(garbage)
            while sock.recv(1 << 16):  # it answers, and hangs up
                pass
    assert rank.says("no message of Slipstream's")
    with load(cache_rank=rank.address) as llm:
        assert tokens(llm, prompts(90, 40)) == alone


def test_keys_must_be_the_same(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text("0123456789abcdef")
    theirs.write_text("fedcba9876543210")
    guarded = Rank(key_file=str(theirs))
    try:
        for key in ({}, {"rank_key": str(ours)}):
            with pytest.raises(ValueError, match="does not have our key"):
                load(cache_rank=guarded.address, **key)
        with load(cache_rank=guarded.address, rank_key=str(theirs)) as llm:
            assert tokens(llm, [PROMPT])
    finally:
        guarded.kill()


def test_the_command():
    def run(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "slipstream", "cache-rank", *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)},
        )  # fmt: skip

    bad, process = run("--listen", "0.0.0.0:0"), run("--listen", "127.0.0.1:0")
    ready = process.stdout.readline().split()
    assert ready[0] == "READY" and int(ready[1].rsplit(":", 1)[1])
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert bad.wait(60) == 2 and "key file" in bad.stderr.read()
