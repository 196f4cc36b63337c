"""Packed attention: every document by itself, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F

from training import attention

CUTS = [0, 1, 9, 32, 33, 70]


def inputs(dtype=torch.float32, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(CUTS[-1], h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def cuts(device="cpu"):
    """starts (with padding beyond the last document, as the packer gives it) and sizes."""
    starts = torch.tensor([*CUTS, CUTS[-1], CUTS[-1]], dtype=torch.int32, device=device)
    return starts, torch.tensor([len(CUTS) - 1, 37])


def one_by_one(q, k, v):
    """[T, Hq, D]: torch's own causal attention on each document alone."""
    outs = []
    for a, b in zip(CUTS, CUTS[1:], strict=False):
        rows = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


def gradients(function, tensors, grad):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (8, 1)])
def test_packed_is_per_document(heads, kv_heads):
    *tensors, grad = inputs(heads=heads, kv_heads=kv_heads)
    wanted = gradients(one_by_one, tensors, grad)
    found = gradients(lambda q, k, v: attention.attend(q, k, v, *cuts()), tensors, grad)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_own_gradient_is_that_of_the_definition():
    """Finite differences of the float32 scores would be too coarse; autograd through the definition is exact."""
    *tensors, grad = inputs(seed=1)
    wanted = gradients(lambda q, k, v: attention.dense(q, k, v, *cuts()), tensors, grad)
    found = gradients(lambda q, k, v: attention.attend(q, k, v, *cuts()), tensors, grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


def test_gradient_by_finite_differences():
    *tensors, grad = inputs(dtype=torch.float64, seed=2)
    found = gradients(lambda q, k, v: attention.attend(q, k, v, *cuts()), tensors, grad)[1:]
    direction = inputs(dtype=torch.float64, seed=3)[:3]
    step = 1e-3

    def loss(sign):
        moved = [t + sign * step * d for t, d in zip(tensors, direction, strict=True)]
        return (one_by_one(*moved) * grad).sum()

    slope = (loss(1) - loss(-1)) / (2 * step)
    assert sum((f * d).sum() for f, d in zip(found, direction, strict=True)).item() == pytest.approx(
        slope.item(), rel=1e-4
    )


def test_documents_do_not_see_each_other_or_the_future():
    q, k, v, _ = inputs()
    before = attention.attend(q, k, v, *cuts())
    k[20:], v[20:] = 9.0, 9.0
    after = attention.attend(q, k, v, *cuts())
    torch.testing.assert_close(after[:20], before[:20])
    assert not torch.allclose(after[20:], before[20:])
    k[:9], v[:9] = -9.0, -9.0
    torch.testing.assert_close(attention.attend(q, k, v, *cuts())[9:], after[9:])


def test_the_operator_can_be_compiled():
    """Fake kernels, schemas and autograd registration agree with the real ones."""
    tensors = [t.requires_grad_() for t in inputs()[:3]]
    torch.library.opcheck(torch.ops.slipstream_training.packed.default, (*tensors, *cuts()))


@pytest.mark.gpu
def test_flash_attention_is_chosen_where_it_agrees():
    assert attention.choose(torch.device("cuda")).startswith("flash")


def test_cpu_is_dense():
    assert attention.choose(torch.device("cpu")) == "dense"
