"""What a user may get wrong, and what fits."""

from __future__ import annotations

import pytest
import torch
from engines import CPU, PAGE, latent_model
from tiny_decoder import tiny_model

from slipstream import AsyncTLS
from slipstream.asynctls import config as module
from slipstream.asynctls.assembly import check_offload
from slipstream.asynctls.config import plan_offload
from slipstream.asynctls.offload import HostMemory, HostPool, HotBuffer, Stage, choose_lane
from slipstream.asynctls.residency import Residency
from slipstream.build import parse_attention
from slipstream.kernels.ops import stored
from slipstream.kvcache.index import KeyIndex
from slipstream.types import ModelSpec

FITTING = {"budget": 11, "blocks": 4, "block": 4, "channels": 8, "sink": 2, "recent": 3}


@pytest.mark.parametrize(
    "options, words",
    (
        ({"candidates": "curent"}, "did you mean 'current'"),
        ({"transfer": "magic"}, "transfer 'magic' is unknown"),
        ({"lane": "fast"}, "lane 'fast' is unknown"),
        ({"predictor": "oracle"}, "predictor 'oracle' is unknown"),
        ({"slots": 1.2}, "at least 1.25 x blocks"),
        ({"slots": "many"}, "slots must be a number"),
        ({"drift": 1.5}, "between 0 and 1"),
        ({"drift": True}, "between 0 and 1"),
        ({"margin": -0.1}, "margin must be a share between 0 and 1"),
        ({"offload": True, "gpu_kv": "16 giraffes"}, "cannot read '16 giraffes' as a size"),
        ({"offload": True, "host_kv": -5}, "a size must be positive"),
        ({"offload": True, "host_kv": "-5GiB"}, "cannot read '-5GiB' as a size"),
        ({"gpu_kv": "1GiB"}, "set offload=True"),
        ({"host_file": "/tmp"}, "set offload=True"),
        ({"offload": True, "dense_layers": 2}, "dense_layers=0"),
        ({"blocks": 2}, "hold fewer than budget"),
    ),
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        AsyncTLS(**{**FITTING, **options})


def test_by_name_and_misspelled():
    config = parse_attention({"method": "asynctls", **FITTING, "candidates": "previous"})
    assert isinstance(config, AsyncTLS) and config.candidates == "previous" and not config.offload
    with pytest.raises(TypeError, match="did you mean 'candidates'"):
        parse_attention({"method": "asynctls", "candidate": "previous"})
    with pytest.raises(TypeError, match="no option 'offload'"):
        parse_attention({"method": "two_level", "offload": True})


def plan(config=None, model=tiny_model, **more):
    _, spec = model()
    given = {"page_size": PAGE, "max_num_seqs": 6, "max_model_len": 256, "device_bytes": 1 << 22} | more
    return plan_offload(config or AsyncTLS(**FITTING, offload=True), spec, **given)


def size_of(*stores):
    return sum(x.numel() * x.element_size() for k, v in stores for x in stored(k, v))


@pytest.mark.parametrize("model", (tiny_model, latent_model))
def test_a_plan_is_what_is_allocated(model):
    _, spec = model()
    config = AsyncTLS(**FITTING, offload=True)
    for room in (300_000, 500_000, 1 << 22):
        found = plan(config, model, device_bytes=room)
        pool = HostPool(spec, found.num_pages, PAGE, CPU)
        index = KeyIndex(pool, config.index)
        slots = config.num_slots(found.num_seats)
        hot = HotBuffer(spec, PAGE, config.block, slots, found.num_seats, CPU)
        stage = Stage(spec, found.stage_pages, PAGE, found.num_seats, CPU)
        staged = size_of((stage.k._buffers, stage.v._buffers))
        assert hot.bytes == size_of((hot.k, hot.v))
        residency = Residency(
            spec, num_pages=found.num_pages, page_size=PAGE, block=config.block, most=config.blocks, num_slots=slots,
            num_seats=found.num_seats, device=CPU,
        )  # fmt: skip
        used = index.bytes + hot.bytes + staged + residency.bytes
        assert used <= found.device_bytes <= room and found.device_bytes - used < 0.05 * room
        assert found.host_bytes == pool.bytes == size_of((pool.k, pool.v)) and 1 <= found.num_seats <= 6
        assert sum(len(memory.bytes) for memory in pool._memory) == pool.bytes, "no more is pinned than is used"
        assert pool.bytes == found.num_pages * PAGE * spec.kv_bytes_per_token()


def test_more_room_is_more_chains_and_then_no_more_than_are_asked_for():
    seats = [plan(device_bytes=room).num_seats for room in range(220_000, 1_200_000, 100_000)]
    assert seats == sorted(seats) and seats[0] < seats[-1] == 6
    assert plan(device_bytes=1 << 30).num_pages == 6 * 256 // PAGE + 1  # nobody could use more


@pytest.mark.parametrize("model", (tiny_model, latent_model))
@pytest.mark.parametrize(
    "options, more, words",
    (
        ({}, {"device_bytes": 20_000}, "one chain of 256 tokens needs .* raise gpu_kv"),
        ({"host_kv": 100}, {}, "host_kv holds 0 pages"),
        ({"host_kv": "9000GB"}, {}, "the host has only"),
    ),
)
def test_caps_that_cannot_hold_what_they_must(options, more, words, model, monkeypatch):
    monkeypatch.setattr(module, "available_host_bytes", lambda: 1 << 30)
    with pytest.raises(ValueError, match=words):
        plan(AsyncTLS(**FITTING, offload=True, **options), model, **more)


def test_too_many_chains_for_one_program():
    with pytest.raises(ValueError, match="set max_num_seqs to at most 128"):
        AsyncTLS().check_seats(129)
    AsyncTLS().check_seats(128)


def test_the_plan_of_a_large_latent_cache(monkeypatch):
    """GLM-4.7-Flash at 96k: 8 GiB hold the rows of one chain, or what four chains need beside those on the host."""
    monkeypatch.setattr(module, "available_host_bytes", lambda: 64 << 30)
    spec = ModelSpec("glm", 47, 2048, 20, 1, 576, 154880, 98816, torch.bfloat16, value_dim=512)
    config = AsyncTLS(offload=True, host_kv="64GiB").for_model(spec)
    found = plan_offload(config, spec, page_size=64, max_num_seqs=16, max_model_len=98816, device_bytes=8 << 30)
    row = 47 * 576 * 2  # bytes of a token
    pages = 98816 // 64
    index = 64 * config.index.bytes_per_token(spec) + 4 * 47  # of a page, with the slot of its block in every layer
    remembered = 4 * 47 * (128 + 1 + pages + 2 * 256)  # of a chain: a set, when it wanted which block, two for a slot
    expected = 2 * (pages + 1) * 64 * row // 47 + 64 * row + 4 * (256 + 1) * 64 * row + found.num_pages * index
    expected += (4 + 1) * remembered
    assert found.num_seats == 4 and found.num_pages > 4 * pages
    assert found.device_bytes == expected <= 8 << 30 and found.host_bytes == found.num_pages * 64 * row
    with pytest.raises(ValueError, match="one chain of 98816 tokens needs"):
        plan_offload(config, spec, page_size=64, max_num_seqs=16, max_model_len=98816, device_bytes=1 << 30)


def test_a_latent_cache_is_one_store_everywhere():
    """Half of what keys and values of that width would take, and values that are columns of the keys."""
    _, spec = latent_model()
    pool, stage = HostPool(spec, 5, PAGE, CPU), Stage(spec, 4, PAGE, 2, CPU)
    hot = HotBuffer(spec, PAGE, 4, 6, 2, CPU)
    for k, v in (pool.layer(1), hot.layer(1), hot.tails(1), stage.layer(1)):
        k.fill_(1.0)
        assert v.shape == (*k.shape[:-1], 24) and (v == 1).all() and v.data_ptr() == k.data_ptr()


@pytest.mark.parametrize(
    "options, device, words",
    (
        ({"transfer": "pooled"}, "cuda", "cuda_graphs=False"),
        ({"host_file": "/tmp"}, "cuda", "cannot be pinned"),
        ({"min_context": 100}, "cpu", "blocks x block = 16 tokens"),
    ),
)
def test_options_that_do_not_go_together(options, device, words):
    with pytest.raises(ValueError, match=words):
        check_offload(AsyncTLS(**FITTING, offload=True, **options), torch.device(device), True)


@pytest.mark.parametrize("lane, device", (("stream", "cpu"), ("thread", "cuda")))
def test_lanes_are_of_devices(lane, device):
    with pytest.raises(ValueError, match="is not for"):
        choose_lane(lane, torch.device(device))


def test_a_pin_that_fails_frees_what_was_pinned(monkeypatch):
    """The second of two registrations is refused: the first is undone, and the error says what to lower."""
    from slipstream.asynctls import offload

    pinned = []

    def register(memory):
        pinned.append(memory.data_ptr())
        return 2 if len(pinned) == 2 else 0

    monkeypatch.setattr(offload, "_register", register)
    monkeypatch.setattr(offload, "_unregister", lambda memory: pinned.remove(memory.data_ptr()))
    _, spec = tiny_model()
    with pytest.raises(ValueError, match="refuses to pin .* lower host_kv"):
        HostPool(spec, 9, PAGE, torch.device("cuda"))
    assert len(pinned) == 1  # the refused one was never pinned


def test_memory_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be had .* lower host_kv"):
        HostMemory(1 << 60, CPU)
    with pytest.raises(ValueError, match="cannot be had"):
        HostMemory(4096, CPU, str(tmp_path / "nowhere"))
    mapped = HostMemory(4096, CPU, str(tmp_path))
    mapped.bytes[7] = 3
    assert mapped.bytes.sum() == 3 and not list(tmp_path.iterdir())  # the file has no name and goes with its last use


@pytest.mark.parametrize("model", (tiny_model, latent_model))
def test_copied_pages_are_read_before_any_is_written(model):
    _, spec = model()
    pool = HostPool(spec, 6, PAGE, CPU)
    beside = torch.arange(2 * 6.0).view(2, 6, 1)
    pool.attach(beside)
    pool.k.copy_(torch.randn_like(pool.k))
    if spec.value_dim is None:
        pool.v.copy_(torch.randn_like(pool.v))
    before = [x.clone() for x in (pool.k, pool.v, beside)]
    pool.copy_pages([(1, 2), (2, 3), (5, 1)])
    for now, old in zip((pool.k, pool.v, beside), before, strict=True):
        assert torch.equal(now[:, [2, 3, 1]], old[:, [1, 2, 5]]) and torch.equal(now[:, [0, 4, 5]], old[:, [0, 4, 5]])
