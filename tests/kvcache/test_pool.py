"""The pool: layout, copies, sizes; on the CPU, pinned, and (with a GPU) on the device."""

import pytest
import torch

from slipstream.kvcache.pool import KVPool

DEVICES = [
    ("cpu", False),
    pytest.param("cpu", True, marks=pytest.mark.gpu),
    pytest.param("cuda", False, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device, pinned", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_read_everything_before_they_write(device, pinned, dtype):
    pool = KVPool(2, 6, 3, 4, 8, dtype, device, pinned)
    assert pool.k.shape == pool.v.shape == (2, 6, 3, 4, 8) and pool.k.is_pinned() == pinned
    assert not pool.k.any() and not pool.v.any()
    values = torch.arange(6, dtype=dtype, device=device).view(1, 6, 1, 1, 1)
    pool.k[:] = values
    pool.v[:] = -values
    pool.copy_pages([(1, 2), (2, 3), (5, 4)])
    expected = [0, 1, 1, 2, 5, 5]
    assert pool.k[1, :, 2, 3, 7].tolist() == expected
    assert pool.v[0, :, 0, 0, 0].tolist() == [-x for x in expected]
    pool.copy_pages([])


def test_attached_stores_are_copied_along():
    pool = KVPool(2, 6, 3, 4, 8, torch.float32)
    labels, scales = torch.zeros(2, 6, 3, dtype=torch.uint8), torch.zeros(2, 6, dtype=torch.float16)
    labels[:, 1], scales[:, 1] = 7, 0.5
    pool.attach(labels, scales)
    pool.copy_pages([(1, 2)])
    assert labels[1, :, 2].tolist() == [0, 7, 7, 0, 0, 0] and scales[0].tolist() == [0, 0.5, 0.5, 0, 0, 0]
    with pytest.raises(AssertionError, match="paged like"):
        pool.attach(torch.zeros(2, 5, 3))


def test_sizes():
    pool = KVPool(2, 5, 3, 4, 8, torch.bfloat16)
    assert pool.bytes == 2 * 2 * 5 * 3 * 4 * 8 * 2
    assert pool.num_tokens == 16


def test_values_of_a_latent_cache_are_columns_of_its_keys():
    pool = KVPool(2, 5, 1, 4, 8, torch.float32, value_dim=6)
    assert pool.v.shape == (2, 5, 1, 4, 6) and pool.v.data_ptr() == pool.k.data_ptr()
    assert pool.bytes == 2 * 5 * 4 * 8 * 4
    pool.k[:, 1] = 3.0
    pool.copy_pages([(1, 2)])
    assert (pool.v[:, 2] == 3).all() and not pool.v[:, 3].any()


def test_refusals():
    with pytest.raises(ValueError, match="null page"):
        KVPool(1, 1, 1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="sizes"):
        KVPool(1, 4, 0, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="pinned"):
        KVPool(1, 4, 1, 4, 8, torch.float32, "cuda", pinned=True)
