"""How many pages fit, and the refusal of what never can."""

import pytest
import torch

from slipstream.kvcache import plan as plan_module
from slipstream.kvcache.plan import MemoryPlan, parse_bytes, plan_memory
from slipstream.types import ModelSpec

SPEC = ModelSpec("toy", 2, 64, 4, 2, 16, 100, 4096, torch.float32)
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of K and V of one token


@pytest.mark.parametrize(
    "text, value",
    [
        (4096, 4096),
        ("4096", 4096),
        ("16GiB", 16 * 2**30),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" 2KiB ", 2048),
        ("10b", 10),
    ],
)
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["16G1B", "GiB", "-1GiB", "1TiBs", "", "1 2", "1e9", 0, -5, 1.5, None, True, "0MiB"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def test_plan_counts_pages_and_tokens():
    plan = plan_memory(SPEC, page_size=8, kv_memory=10 * 8 * TOKEN + 5)
    assert plan == MemoryPlan(10, 8, 8 * TOKEN)
    assert plan.num_tokens == 72 and plan.bytes == 10 * 8 * TOKEN
    assert "72 tokens" in str(plan)


def test_plan_counts_what_the_method_keeps_beside_k_and_v_and_stops_at_what_is_of_use():
    assert plan_memory(SPEC, page_size=8, kv_memory=80 * TOKEN, extra_bytes_per_token=TOKEN).num_pages == 5
    assert plan_memory(SPEC, page_size=8, kv_memory="1GiB", most_tokens=17).num_pages == 4


def test_less_than_a_page_beside_the_null_page_is_refused_with_numbers():
    with pytest.raises(ValueError, match=rf"{8 * TOKEN:,} bytes .*8 tokens.*{16 * TOKEN - 1:,} bytes"):
        plan_memory(SPEC, page_size=8, kv_memory=16 * TOKEN - 1)
    assert plan_memory(SPEC, page_size=8, kv_memory=16 * TOKEN).num_tokens == 8
    with pytest.raises(ValueError, match="page_size"):
        plan_memory(SPEC, page_size=0)


def test_cpu_takes_a_gibibyte_but_at_most_half_of_what_there_is(monkeypatch):
    monkeypatch.setattr(plan_module, "available_host_bytes", lambda: 2**40)
    assert plan_memory(SPEC, page_size=8).num_pages == 2**30 // (8 * TOKEN)
    monkeypatch.setattr(plan_module, "available_host_bytes", lambda: 2**20)
    assert plan_memory(SPEC, page_size=8).num_pages == 2**19 // (8 * TOKEN)


def test_available_host_memory_is_plausible():
    assert 2**20 < plan_module.available_host_bytes() < 2**50


def test_cuda_takes_nine_tenths_less_the_reserve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * 8 * TOKEN, 10**12))
    plan = plan_memory(SPEC, page_size=8, device="cuda", reserve_bytes=100 * 8 * TOKEN)
    assert plan.num_pages == 800
    with pytest.raises(ValueError, match="free on cuda"):
        plan_memory(SPEC, page_size=8, device="cuda", reserve_bytes=10**9)
