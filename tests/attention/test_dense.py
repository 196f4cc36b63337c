"""DenseBackend: every row sees exactly its own past, through prompts, chunks, mixed steps and decode steps."""

from __future__ import annotations

import pytest
import torch
from steps import Requests, make_spec

from slipstream.attention.dense import DenseBackend, Full
from slipstream.kvcache.pool import KVPool

STEPS = ((9, 0, 3), (1, 5, 1), (0, 17, 1), (1, 1, 1), (8, 1, 0), (1, 1, 1), (0, 1, 1))


def _make(num_q, num_kv, dim, dtype, device, page=4, width=10):
    spec = make_spec(num_q, num_kv, dim, dtype)
    pool = KVPool(spec.num_layers, 1 + 3 * width, num_kv, page, dim, dtype, device)
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    return DenseBackend(pool, spec), Requests(pool, spec, 3, width)


@pytest.mark.parametrize("shape", ((1, 1, 16), (6, 2, 27), (5, 1, 64), (8, 1, 63)))
def test_every_row_sees_its_past(shape):
    backend, requests = _make(*shape, torch.float32, "cpu")
    for counts in STEPS:
        requests.run(backend, counts)


def test_bfloat16():
    backend, requests = _make(6, 2, 32, torch.bfloat16, "cpu")
    for counts in STEPS:
        requests.run(backend, counts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_on_the_gpu(dtype):
    backend, requests = _make(32, 8, 128, dtype, "cuda", page=64, width=12)
    for counts in ((300, 0, 64), (1, 500, 1), (0, 100, 1), (1, 1, 1), (200, 1, 0), (1, 1, 1)):
        requests.run(backend, counts)


def test_plan_comes_first():
    backend, _ = _make(2, 1, 16, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="plan"):
        backend.view(0)
    with pytest.raises(AssertionError, match="plan"):
        backend.attend(0, torch.zeros(1, 2, 16))


def test_full_has_no_options():
    assert Full() == Full()
    with pytest.raises(TypeError):
        Full(budget=3)
