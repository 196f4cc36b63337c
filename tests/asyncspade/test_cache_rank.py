"""The cache rank: two ranks are one device, whatever travels; and what it refuses."""

import dataclasses

import pytest
import torch
from ranks import INDEX, METHOD, Rank, load, params, prompts, tokens

from slipstream.asyncspade.cache_rank import CacheRank
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.protocol import Kind, ProtocolError
from slipstream.kvcache.plan import MemoryPlan
from slipstream.types import ModelSpec


@pytest.fixture(scope="module")
def rank():
    made = Rank()
    yield made
    made.kill()


ASKED = [*prompts(150, 30), {"prompt_token_ids": prompts(60)[0], "dense_tokens": 20}]


@pytest.mark.parametrize("transfer", ["indices", "packed", "delta"])
def test_two_ranks_are_one_device(rank, transfer):
    """Prompts in chunks, siblings, prompts with forced rows, prefixes from the cache, seats used again."""
    with load() as llm:
        expected = [tokens(llm, ASKED, params(n=2)) for _ in range(2)]
    with load(cache_rank=rank.address, transfer=transfer) as llm:
        assert [tokens(llm, ASKED, params(n=2)) for _ in range(2)] == expected
        stats = llm.stats()
    assert stats["cached_tokens"] and stats["asyncspade_bytes_in"] and stats["asyncspade_bytes_out"]
    assert not stats.get("asyncspade_fallbacks") and not stats["asyncspade_losses"]


@pytest.mark.parametrize(
    "method",
    [
        {"scoring": "index", "aggregate": "peak", **INDEX},  # calibrated on the way
        {"scoring": "index", "aggregate": "sum", **INDEX},
        {"predictor": "ridge", "dense_layers": 1, "min_context": 100},
    ],
)
def test_so_it_is_with_an_index_that_is_kept_there(rank, method):
    with load(**method) as llm:
        expected = tokens(llm, ASKED)
    with load(**method, cache_rank=rank.address) as llm:
        assert tokens(llm, ASKED) == expected
        assert llm.engine.backend.index is None and not llm.stats()["asyncspade_fallbacks"]


def test_a_delta_is_less_than_the_whole(rank):
    sizes = {}
    for transfer in ("packed", "delta", "indices"):
        with load(cache_rank=rank.address, transfer=transfer) as llm:
            tokens(llm, ASKED, params(40))
            sizes[transfer] = llm.stats()["asyncspade_bytes_in"]
            assert transfer == "indices" or llm.stats()["pages_left"] > 0
    assert sizes["indices"] < 0.7 * sizes["delta"] < 0.6 * sizes["packed"]


def test_seats_are_used_again_and_cancelled_chains_leave_nothing(rank):
    with load(max_num_seqs=1) as llm:
        expected = [tokens(llm, ids)[0] for ids in prompts(70, 40, 55)]
    for transfer in ("indices", "delta"):
        with load(max_num_seqs=1, cache_rank=rank.address, transfer=transfer) as llm:
            found = []
            for ids in prompts(70, 40, 55):
                stream = llm.stream(prompts(90)[0], params(30))
                for _ in range(4):
                    next(stream)
                stream.close()  # cancels
                found.append(tokens(llm, ids)[0])
            assert found == expected and llm.stats()["running"] == 0


def test_another_model_is_refused_by_both_names():
    own = load().identity
    picky = Rank(identity=dataclasses.replace(own, name="the other", weights="0" * 16))
    try:
        with pytest.raises(ValueError, match=rf"refused.*runs .*{own.weights}.*is for the other .*weights 0000"):
            load(cache_rank=picky.address)
        assert picky.says("the other")
    finally:
        picky.kill()
    fitting = Rank(identity=own)
    try:
        with load(cache_rank=fitting.address) as llm:
            assert tokens(llm, prompts(20))
    finally:
        fitting.kill()


def test_options_that_cannot_be_had_from_afar():
    for method in ({"predictor": "oracle"}, {"measure": 2}, {"transfer": "delta", "dense_layers": 1}):
        with pytest.raises(ValueError, match="cache_rank|dense_layers"):
            AsyncSpade(cache_rank="127.0.0.1:1", **method)


def test_nobody_there_is_a_clear_error():
    with pytest.raises(ValueError, match=r"cache rank 127.0.0.1:9.*start one with `slipstream cache-rank"):
        load(cache_rank="127.0.0.1:9", rank_timeout=1)
    with pytest.raises(ValueError, match="HOST:PORT"):
        load(cache_rank="nowhere")


def test_a_second_engine_is_told_that_the_rank_is_taken(rank):
    with load(cache_rank=rank.address) as llm:
        with pytest.raises(ValueError, match="serves another inference rank"):
            load(cache_rank=rank.address)
        assert tokens(llm, prompts(40))


def test_packed_labels_need_a_calibration(rank):
    with pytest.raises(ValueError, match="slipstream calibrate"):
        load(cache_rank=rank.address, transfer="packed", scoring="index", aggregate="peak", **INDEX)


# -- the object itself

SPEC = ModelSpec("tiny", 2, 32, 4, 2, 16, 64, 512, torch.float32)


def make(num_pages=9, **method):
    config = AsyncSpade(**METHOD | {"scoring": "keys", "aggregate": "sum"} | method)
    return CacheRank(config, SPEC, MemoryPlan(num_pages, 16, 1), 4, torch.randn(512, 16), 0)


def told(rank, seat, epoch, first, count, layers=(0, 1)):
    for layer in layers:
        k = torch.randn(count, 2, 16)
        answer = rank.prompt(layer, [seat, epoch, first, 1], k, k[:0], torch.randn(min(count, 16), 4, 16))
    return answer


def test_tokens_must_come_gapless_in_every_layer():
    rank = make()
    kind, (rows, indices, counts) = told(rank, 1, 5, 0, 30)
    assert kind == Kind.SETS and rows.tolist() == [[1, 5, 31]] and (counts == 23).all() and indices.max() == 29
    with pytest.raises(ProtocolError, match="out of turn"):
        told(rank, 1, 5, 31, 2)
    with pytest.raises(ProtocolError, match="out of turn"):
        told(rank, 1, 5, 30, 2, layers=(0, 0))
    with pytest.raises(ProtocolError, match="no chain of epoch 6"):
        told(rank, 1, 6, 30, 2)
    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    with pytest.raises(ProtocolError, match="no chain of epoch 7"):
        rank.step(0, 3, [[2, 7, 31]], q, k, k[:0])


def test_a_full_rank_drops_who_was_told_of_least_lately_and_says_so():
    rank = make(num_pages=9)  # 8 pages of 16 tokens
    told(rank, 1, 1, 0, 60)
    told(rank, 2, 2, 0, 60)
    q, k = torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    for layer in (0, 1):
        rank.step(layer, 1, [[1, 1, 61], [2, 2, 61]], q, k, k[:0])
    assert told(rank, 3, 3, 0, 30) is not None and rank.dropped == [(1, 1)]
    for layer in (0, 1):  # what is said of the dropped one is not an error: nobody could know yet
        kind, (rows, *_) = rank.step(layer, 2, [[1, 1, 62], [2, 2, 62]], q, k, k[:0])
        assert rows.tolist() == [[2, 2, 63]]
    assert told(rank, 4, 4, 0, 200) is None  # more than there is, whoever goes
    assert set(rank.dropped) == {(1, 1), (2, 2), (3, 3), (4, 4)}
    rank.table.check_integrity()
    assert rank.table.num_used == 0


def test_forks_share_pages_and_diverge():
    rank = make(num_pages=30, transfer="delta")
    for layer in (0, 1):
        k = torch.randn(40, 2, 16)
        rank.prompt(layer, [1, 1, 0, 1], k, k, torch.randn(16, 4, 16))
    rank.fork([[1, 1, 2, 2]])
    used = rank.table.num_used
    q, k = torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    kind, (rows, counts, sizes, places, packed, _) = rank.step(0, 1, [[1, 1, 41], [2, 2, 41]], q, k, k)
    assert kind == Kind.PACK and rank.table.num_used == used + 1  # the last page was copied for one of them
    assert counts.tolist() == [23, 23] and len(places) == sizes.sum() == len(packed) < 2 * 2 * 23
    rank.close([[1, 1], [2, 9]])
    rank.close([[2, 2]])
    assert rank.table.num_used == 0
