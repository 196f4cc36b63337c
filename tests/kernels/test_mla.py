"""Kernels of a latent cache = their references: store, decode, selection, seats, prefill; nothing is read twice."""

from __future__ import annotations

import pytest
import torch
from paged_cache import make_cache, oracle
from tolerances import assert_equal

from slipstream.kernels import (
    expanded,
    reference,
    reference_mla,
    reference_select,
    triton_mla,
    triton_mla_prefill,
    triton_mla_rope,
    triton_tova,
)

DTYPES = (torch.float32, torch.bfloat16)
# (Hq, Dv, R): heads that fill a block of 16 or not, more than one block, widths that are powers of two or not
SHAPES = ((5, 32, 8), (16, 24, 8), (20, 64, 16), (37, 48, 6))
LENGTHS = (70, 1, 0, 33, 128)
GLM = (20, 512, 64)


@pytest.fixture(autouse=True)
def whole_rows(request, device):
    """Devices read rows 16 bytes at a time: others are refused there, and are for the interpreter."""
    shape = getattr(request.node, "callspec", None) and request.node.callspec.params.get("shape")
    if device.type == "cuda" and shape == SHAPES[3]:
        pytest.skip("rows of 54 columns are refused on a device")


def latent_cache(lengths, shape, page, dtype, device):
    """(q, k_pages, v_pages, page_table, lengths), values a view of the keys."""
    num_q, value, rope = shape
    cache = make_cache(lengths, 1, page, value + rope, dtype, device)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(len(lengths), num_q, value + rope, generator=generator).to(device, dtype)
    return q, cache.k_pages, cache.k_pages[..., :value], cache.page_table, cache.lengths


def latent_oracle(op, q, k_pages, v_pages, *args):
    """As ``oracle``, with values that stay a view."""

    def run(q, k, *rest):
        return op(q, k, k[..., : v_pages.shape[3]], *rest)

    return oracle(run, q, k_pages, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page", [16, 64])
def test_decode(shape, page, dtype, device):
    inputs = latent_cache(LENGTHS, shape, page, dtype, device)
    assert_equal(
        triton_mla.decode_attention(*inputs, 0.2),
        latent_oracle(reference.decode_attention, *inputs, 0.2),
        "attention",
    )


def selections(lengths, budget, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((len(lengths), 1, budget), -1, dtype=torch.int32)
    counts = torch.zeros((len(lengths), 1), dtype=torch.int32)
    for b, length in enumerate(lengths):
        count = min(length, budget - 7 * b)
        indices[b, 0, :count] = torch.randperm(length, generator=generator)[:count].sort().values
        counts[b] = count
    return indices.to(device), counts.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [40, 100])
def test_selection(shape, budget, dtype, device):
    q, k, v, table, lengths = latent_cache(LENGTHS, shape, 16, dtype, device)
    indices, counts = selections(LENGTHS, budget, device)
    out = torch.full((*q.shape[:2], v.shape[3]), 7.0, dtype=dtype, device=device)
    expected = out.clone()
    triton_mla.sparse_attention(q, k, v, table, indices, counts, 0.2, out)

    def op(q, k, v, table, indices, counts, kept):
        reference_select.sparse_attention(q, k, v, table, indices, counts, 0.2, kept)
        return kept

    expected = latent_oracle(op, q, k, v, table, indices, counts, expected)
    assert bool((out[2] == 7).all())
    assert_equal(out, expected, "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_seats(shape, dtype, device):
    num_q, value, rope = shape
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(6, 1, 70, value + rope, generator=generator).to(device, dtype)
    q = torch.randn(4, num_q, value + rope, generator=generator).to(device, dtype)
    rows = torch.tensor([5, 1, 3, 2], device=device)
    filled = torch.tensor([70, 3, 0, 33], dtype=torch.int32, device=device)
    out, weights = triton_tova.tova_attention(q, k, k[..., :value], rows, filled, 0.2)
    victims = triton_tova.lowest_slots(weights, filled)
    host = (x.cpu() for x in (q.float(), k.float(), rows, filled))
    q32, k32, rows32, filled32 = host
    expected, chosen = reference_select.tova_attention(q32, k32, k32[..., :value], rows32, filled32, 0.2)
    chosen = reference_select.lowest_slots(chosen, filled32)
    assert_equal(out.cpu(), expected.to(dtype), "attention")
    assert victims.tolist() == chosen.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape, dtype, device):
    num_q, value, rope = shape
    _, k, v, table, lengths = latent_cache((40, 9, 3), shape, 16, dtype, device)
    counts = (13, 9, 1)
    starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(sum(counts), num_q, value + rope, generator=generator).to(device, dtype)
    found = triton_mla_prefill.prefill_attention(q, k, v, table, starts, lengths, 0.2, max(counts))
    expected = latent_oracle(reference.prefill_attention, q, k, v, table, starts, lengths, 0.2, max(counts))
    assert_equal(found, expected, "attention")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [12, 20])
def test_expanded_prompts_are_absorbed_ones(value, dtype, device, monkeypatch):
    """In two parts of the heads, too; of chunks and of whole prompts. A head's keys and values may differ in width."""
    monkeypatch.setattr(expanded, "EXPANDED_BYTES", 40 * (20 + value) * dtype.itemsize * 3)
    num_q, latent, rope, nope = 5, 32, 8, 12
    _, k, v, table, lengths = latent_cache((40, 9, 3), (num_q, latent, rope), 16, dtype, device)
    generator = torch.Generator().manual_seed(7)
    counts = (13, 9, 1)
    starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
    heads, key_up, value_up = (
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((sum(counts), num_q, nope + rope), (num_q, nope, latent), (num_q, latent, value))
    )
    found = expanded.expanded_attention(heads, k, table, starts.tolist(), lengths.tolist(), key_up, value_up, 0.1)
    absorbed = torch.bmm(heads[..., :nope].transpose(0, 1).float(), key_up.float()).transpose(0, 1)
    q = torch.cat((absorbed, heads[..., nope:].float()), dim=-1).cpu()
    pages = k.float().cpu()
    args = (table.cpu(), starts.cpu(), lengths.cpu(), 0.1, max(counts))
    latents = reference.prefill_attention(q, pages, pages[..., :latent], *args)
    expected = torch.bmm(latents.transpose(0, 1), value_up.float().cpu()).transpose(0, 1)
    worst = (found.float().cpu() - expected).abs().max() / expected.abs().max()
    assert worst < (
        2e-6 if dtype == torch.float32 and device.type == "cpu" else 1e-4 if dtype == torch.float32 else 0.02
    )


def store_inputs(shape, tokens, dtype, device, page=4, pages=6):
    num_q, value, rope = shape
    generator = torch.Generator().manual_seed(value)
    head = 10 + rope
    merged = torch.randn(tokens, num_q * head + value + rope, generator=generator).to(device, dtype)
    heads, latent = merged.tensor_split([num_q * head], dim=1)  # strided rows, as the model has them
    weight = torch.randn(value, generator=generator).to(device, dtype)
    angle = torch.arange(40)[:, None] * 100.0 ** (-torch.arange(0, rope, 2) / rope)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).to(device)
    positions = torch.randint(0, 40, (tokens,), generator=generator).to(device)
    slots = torch.randperm(pages * page, generator=generator)[:tokens].to(device)
    k_pages = torch.full((pages, 1, page, value + rope), torch.nan, dtype=dtype, device=device)
    return heads.unflatten(1, (num_q, head)), latent, weight, 1e-6, cos_sin, positions, slots, k_pages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_store(shape, tokens, dtype, device):
    *inputs, k_pages = store_inputs(shape, tokens, dtype, device)
    expected_pages, rope = k_pages.clone(), shape[2]
    q = triton_mla_rope.mla_rope_store(*inputs, k_pages)
    expected = reference_mla.mla_rope_store(*inputs, expected_pages)
    assert_equal(q[..., -rope:], expected[..., -rope:], "rope")
    assert_equal(k_pages, expected_pages, "rope")
    assert int((~k_pages.isnan()).sum()) == tokens * k_pages.shape[3]
    heads, cos_sin, positions = inputs[0], inputs[4], inputs[5]
    for op in (reference_mla.mla_rope, triton_mla_rope.mla_rope):  # the same without a store
        assert_equal(op(heads, cos_sin, positions, k_pages.shape[3])[..., -rope:], expected[..., -rope:], "rope")


def test_reference_is_transformers_interleaved_rotation():
    """The model halves the pairs of its weights; the rotation of what they make is then that of the pairs."""
    from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import apply_rotary_pos_emb_interleave

    heads, latent, weight, eps, cos_sin, positions, slots, k_pages = store_inputs(
        SHAPES[0], 5, torch.float32, torch.device("cpu")
    )
    pairs = torch.randn(5, 6, 8)
    halved = torch.cat((pairs[..., 0::2], pairs[..., 1::2]), dim=-1)
    heads[..., -8:], latent[:, -8:] = halved[:, :5], halved[:, 5]
    q = reference_mla.mla_rope_store(heads, latent, weight, eps, cos_sin, positions, slots, k_pages)
    cos, sin = (torch.cat((half, half), dim=1)[None] for half in cos_sin[positions].chunk(2, dim=1))
    turned = pairs.transpose(0, 1)[None]
    expected_q, expected_k = apply_rotary_pos_emb_interleave(turned[:, :5], turned[:, 5:], cos, sin)
    torch.testing.assert_close(q[..., -8:], expected_q[0].transpose(0, 1))
    torch.testing.assert_close(k_pages[slots // 4, 0, slots % 4, -8:], expected_k[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", (GLM, (16, 512, 64), (128, 512, 64), (8, 128, 32)))
def test_large(shape, dtype, device):
    lengths = [1, 9000, 64, 65, 0, 4096, 333, 2000]
    inputs = latent_cache(lengths, shape, 64, dtype, device)
    scale = 0.06
    found = triton_mla.decode_attention(*inputs, scale)
    assert_equal(found, latent_oracle(reference.decode_attention, *inputs, scale), "attention")
    q, k, v, table, _ = inputs
    indices, counts = selections(lengths, 1024, device)
    out, expected = (torch.zeros_like(found) for _ in range(2))
    triton_mla.sparse_attention(q, k, v, table, indices, counts, scale, out)

    def op(q, k, v, table, indices, counts, kept):
        reference_select.sparse_attention(q, k, v, table, indices, counts, scale, kept)
        return kept

    assert_equal(out, latent_oracle(op, q, k, v, table, indices, counts, expected), "attention")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_prefill(dtype, device):
    num_q, value, rope = GLM
    _, k, v, table, lengths = latent_cache((3000, 129, 65), GLM, 64, dtype, device)
    counts = (500, 129, 1)
    starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
    q = torch.randn(sum(counts), num_q, value + rope, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    found = triton_mla_prefill.prefill_attention(q, k, v, table, starts, lengths, 0.06, max(counts))
    expected = latent_oracle(reference.prefill_attention, q, k, v, table, starts, lengths, 0.06, max(counts))
    assert_equal(found, expected, "attention")


@pytest.mark.gpu
def test_pages_beyond_32_bits(device):
    pages = 2**31 // (64 * 576) + 8
    q, k, _, table, lengths = latent_cache((300,), GLM, 64, torch.bfloat16, device)
    expected = latent_oracle(reference.decode_attention, q, k, k[..., :512], table, lengths, 0.06)
    pool = torch.zeros((pages, 1, 64, 576), dtype=torch.bfloat16, device=device)
    shift = pages - k.shape[0]
    pool[shift:] = k
    found = triton_mla.decode_attention(q, pool, pool[..., :512], table + shift, lengths, 0.06)
    assert_equal(found, expected, "attention")


@pytest.mark.gpu
def test_one_graph_serves_any_lengths(device):
    q, k, v, table, _ = latent_cache((700, 64, 1, 3000), GLM, 64, torch.bfloat16, device)
    lengths = torch.ones(4, dtype=torch.int32, device=device)
    triton_mla.decode_attention(q, k, v, table, lengths, 0.06)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_mla.decode_attention(q, k, v, table, lengths, 0.06)
    for current in ((700, 64, 1, 3000), (0, 3, 1, 65), (64, 64, 0, 2048)):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        assert_equal(out, latent_oracle(reference.decode_attention, q, k, v, table, lengths, 0.06), "attention")
