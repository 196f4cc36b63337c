"""Causal attention over packed documents: flash attention with its own gradient on CUDA, a dense mask elsewhere.

One opaque operator, because the number of documents and the longest one change with every batch: as host integers in a
compiled graph they would recompile it, as a small CPU tensor they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

MODE = {"cuda": "flash"}  # "flash", "flash_expanded" (KV heads repeated), or "dense"; set by ``choose``


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """q: [T, Hq, D], k, v: [T, Hk, D] -> [T, Hq, D].

    starts: [>= n + 1] int32 on the device, document i owns rows starts[i]:starts[i + 1].
    sizes: int64 CPU tensor (n, longest).
    """
    return _packed(q, k, v, starts, sizes)[0]


def _is_flash(q: Tensor) -> bool:
    return q.is_cuda and MODE["cuda"] != "dense"


def _probabilities(q: Tensor, k: Tensor, starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention weights [Hq, T, T] over the same document's earlier tokens, and q, wide k as [Hq, T, D]."""
    rows = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(rows, starts[1 : int(sizes[0]) + 1].long(), right=True)
    mask = (document[:, None] == document) & (rows[:, None] >= rows)
    q, k = q.transpose(0, 1), k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype), q, k


def dense(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
    """The definition."""
    weights, _, _ = _probabilities(q, k, starts, sizes)
    return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)).transpose(0, 1).contiguous()


def _dense_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weights, wide_q, wide_k = _probabilities(q, k, starts, sizes)
    wide_v = v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
    grad = grad.transpose(0, 1)
    dv = weights.mT @ grad
    dp = grad @ wide_v.mT
    ds = weights * (dp - (dp * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq, dk = ds @ wide_k, ds.mT @ wide_q
    fold = [t.transpose(0, 1).reshape(*k.shape[:2], -1, k.shape[2]).sum(2) for t in (dk, dv)]
    return dq.transpose(0, 1).contiguous(), fold[0], fold[1]


@torch.library.custom_op("slipstream_training::packed", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_flash(q):
        lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)
        return dense(q, k, v, starts, sizes), lse, q.new_zeros((2,), dtype=torch.uint64)
    documents, longest = int(sizes[0]), int(sizes[1])
    cut = starts[: documents + 1]
    k, v = _expand(k, q).contiguous(), _expand(v, q).contiguous()
    out, lse, rng, _, _ = torch.ops.aten._flash_attention_forward(
        q.contiguous(), k, v, cut, cut, longest, longest, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )
    return out, lse, rng


@_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, q.new_empty((2,), dtype=torch.uint64)


@torch.library.custom_op("slipstream_training::packed_backward", mutates_args=())
def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor, starts: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_flash(q):
        return _dense_backward(grad, q, k, v, starts, sizes)
    documents, longest = int(sizes[0]), int(sizes[1])
    cut = starts[: documents + 1]
    wide_k, wide_v = _expand(k, q).contiguous(), _expand(v, q).contiguous()
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q.contiguous(), wide_k, wide_v, out, lse, cut, cut, longest, longest, 0.0, True, rng, unused,
        scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    if dk.shape != k.shape:
        dk = dk.view(k.shape[0], k.shape[1], -1, k.shape[2]).sum(2)
        dv = dv.view(v.shape[0], v.shape[1], -1, v.shape[2]).sum(2)
    return dq, dk.contiguous(), dv.contiguous()


@_packed_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor, starts: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    plain = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=plain),
        torch.empty_like(k, memory_format=plain),
        torch.empty_like(v, memory_format=plain),
    )


def _expand(kv: Tensor, q: Tensor) -> Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], 1) if MODE["cuda"] == "flash_expanded" else kv


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, starts, sizes = inputs
    out, lse, rng = output
    ctx.save_for_backward(q, k, v, out, lse, rng, starts, sizes)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, rng, starts, sizes = ctx.saved_tensors  # type: ignore[attr-defined]
    return (*_packed_backward(grad, q, k, v, out, lse, rng, starts, sizes), None, None)


_packed.register_autograd(_backward, setup_context=_save)


def choose(device: torch.device) -> str:
    """Check flash attention's output and gradient against the dense definition; keep the first mode that agrees."""
    if device.type != "cuda":
        return "dense"
    generator = torch.Generator(device).manual_seed(0)
    starts = torch.tensor([0, 5, 200, 201, 512], dtype=torch.int32, device=device)
    sizes = torch.tensor([4, 311])
    shapes = [(512, 8, 64), (512, 2, 64), (512, 2, 64), (512, 8, 64)]
    q, k, v, g = (torch.randn(s, device=device, generator=generator).bfloat16() for s in shapes)
    wanted = _gradients(dense, [t.float() for t in (q, k, v)], g.float(), starts, sizes)
    for mode in ("flash", "flash_expanded"):
        MODE["cuda"] = mode
        try:
            found = _gradients(attend, [q, k, v], g, starts, sizes)
        except RuntimeError as error:
            print(f"attention mode {mode} refused: {error}", flush=True)
            continue
        worst = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))
        print(f"attention mode {mode}: worst relative difference to dense {worst:.4f}", flush=True)
        if worst < 0.03:
            return mode
    MODE["cuda"] = "dense"
    print("WARNING: no flash attention works here; dense masks will be very slow", flush=True)
    return "dense"


def _gradients(function, inputs: list[Tensor], grad: Tensor, starts: Tensor, sizes: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs, starts, sizes)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]
