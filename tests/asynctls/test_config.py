"""What a user may get wrong, and what fits."""

from __future__ import annotations

import pytest
import torch
from engines import CPU, PAGE
from tiny_decoder import tiny_model

from slipstream import AsyncTLS
from slipstream.asynctls import config as module
from slipstream.asynctls.assembly import check_offload
from slipstream.asynctls.config import plan_offload
from slipstream.asynctls.offload import HostMemory, HostPool, HotBuffer, Stage, choose_lane
from slipstream.build import parse_attention
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
        ({"slots": 1.5}, "at least 2 x blocks"),
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


def plan(config=None, **more):
    _, spec = tiny_model()
    given = {"page_size": PAGE, "max_num_seqs": 6, "max_model_len": 256, "device_bytes": 1 << 22} | more
    return plan_offload(config or AsyncTLS(**FITTING, offload=True), spec, **given)


def test_a_plan_is_what_is_allocated():
    _, spec = tiny_model()
    config = AsyncTLS(**FITTING, offload=True)
    for room in (300_000, 500_000, 1 << 22):
        found = plan(config, device_bytes=room)
        pool = HostPool(spec, found.num_pages, PAGE, CPU)
        index = KeyIndex(pool, config.index)
        slots = config.num_slots(found.num_seats)
        hot = HotBuffer(spec, PAGE, config.block, slots, found.num_seats, CPU)
        stage = Stage(spec, found.stage_pages, PAGE, found.num_seats, CPU)
        staged = 2 * stage.k._buffers.numel() * 4
        entries = 4 * spec.num_layers * spec.num_kv_heads * found.num_pages * PAGE // config.block
        used = index.bytes + hot.bytes + staged + entries
        assert used <= found.device_bytes <= room and found.device_bytes - used < 0.05 * room
        assert found.host_bytes == pool.k.numel() * 8 and 1 <= found.num_seats <= 6


def test_more_room_is_more_chains_and_then_no_more_than_are_asked_for():
    seats = [plan(device_bytes=room).num_seats for room in range(220_000, 1_200_000, 100_000)]
    assert seats == sorted(seats) and seats[0] < seats[-1] == 6
    assert plan(device_bytes=1 << 30).num_pages == 6 * 256 // PAGE + 1  # nobody could use more


@pytest.mark.parametrize(
    "options, more, words",
    (
        ({}, {"device_bytes": 20_000}, "one chain of 256 tokens needs .* raise gpu_kv"),
        ({"host_kv": 100}, {}, "host_kv holds 0 pages"),
        ({"host_kv": "9000GB"}, {}, "the host has only"),
    ),
)
def test_caps_that_cannot_hold_what_they_must(options, more, words, monkeypatch):
    monkeypatch.setattr(module, "available_host_bytes", lambda: 1 << 30)
    with pytest.raises(ValueError, match=words):
        plan(AsyncTLS(**FITTING, offload=True, **options), **more)


def test_too_many_chains_for_one_program():
    with pytest.raises(ValueError, match="set max_num_seqs to at most 128"):
        AsyncTLS().check_seats(129)
    AsyncTLS().check_seats(128)


def test_a_latent_cache_stays_on_the_device():
    spec = ModelSpec("mla", 2, 64, 4, 1, 48, 32, 256, torch.float32, value_dim=32)
    with pytest.raises(ValueError, match="offload=False"):
        AsyncTLS(**FITTING, offload=True).check_model(spec)
    AsyncTLS(**FITTING).check_model(spec)


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


def test_copied_pages_are_read_before_any_is_written():
    _, spec = tiny_model()
    pool = HostPool(spec, 6, PAGE, CPU)
    beside = torch.arange(2 * 6.0).view(2, 6, 1)
    pool.attach(beside)
    pool.k.copy_(torch.randn_like(pool.k))
    pool.v.copy_(torch.randn_like(pool.v))
    before = [x.clone() for x in (pool.k, pool.v, beside)]
    pool.copy_pages([(1, 2), (2, 3), (5, 1)])
    for now, old in zip((pool.k, pool.v, beside), before, strict=True):
        assert torch.equal(now[:, [2, 3, 1]], old[:, [1, 2, 5]]) and torch.equal(now[:, [0, 4, 5]], old[:, [0, 4, 5]])
