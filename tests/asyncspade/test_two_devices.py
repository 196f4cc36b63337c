"""The cache rank on a device of its own. On a CPU both are that CPU, with two pools: it tests who knows what."""

import pytest
import torch
from ranks import INDEX, KEYS, METHOD, MODEL, load, params, prompts, tokens

from slipstream import LLM
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.two_devices import TwoDeviceBackend

ASKED = [*prompts(150, 30), {"prompt_token_ids": prompts(60)[0], "dense_tokens": 20}]
METHODS = [
    {},
    {"scoring": "index", "aggregate": "peak", **INDEX},
    {"scoring": "index", "aggregate": "sum", **INDEX},
    {"predictor": "ridge", "dense_layers": 1, "min_context": 100},
]


@pytest.mark.parametrize("method", METHODS)
def test_two_devices_are_one(method):
    """Prompts in chunks, siblings whose pages are copied, forced rows, cached prefixes, seats used again."""
    expected, found = (
        [tokens(llm, ASKED, params(n=2)) for _ in range(2)]
        for llm in (load(**method), load(**method, cache_device="cpu"))
    )
    assert found == expected


def test_the_far_side_has_the_keys_and_no_values():
    llm = load(cache_device="cpu")
    tokens(llm, ASKED, params(n=2))
    backend = llm.engine.backend
    assert isinstance(backend, TwoDeviceBackend) and llm.stats()["copied_pages"]
    assert torch.equal(backend.replica.k[:, 1:], llm.pool.k[:, 1:]) and llm.pool.k[:, 1:].any()
    assert backend.replica.v.data_ptr() == backend.replica.k.data_ptr()
    assert llm.stats()["asyncspade_predictions"] and not llm.stats()["asyncspade_late"]


def test_what_it_does_not_do_is_refused():
    for option in ({"transfer": "packed"}, {"late": "stale"}, {"confidence": 0.5}, {"cache_rank": "127.0.0.1:1"}):
        with pytest.raises(ValueError, match="cache_device"):
            AsyncSpade(cache_device="cpu", **option)
    with pytest.raises(ValueError, match="device 'tpu'"):
        load(cache_device="tpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_are_one(method):
    def on(**more):
        attention = {"method": "asyncspade", **METHOD, **KEYS}
        llm = LLM(
            MODEL, device="cuda:0", load_format="dummy", page_size=16, kv_memory="64MiB", max_num_seqs=8,
            max_batch_tokens=100, cuda_graphs=False, dtype="float32", attention=attention | method | more,
        )  # fmt: skip
        return [tokens(llm, ASKED, params(n=2, temperature=0)) for _ in range(2)]

    assert on(cache_device="cuda:1") == on()
