"""Every op of the catalogue in plain torch: the definition, the test oracle and the CPU path in one.

Same names and signatures as :mod:`slipstream.kernels.ops`. Written for the CPU (attention and sampling may look at
lengths and parameters on the host); on CUDA tensors it is correct but synchronises, so only tests use it there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
MAX_INVERSE_TEMPERATURE = 1e20
_MASK32 = 0xFFFFFFFF


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., H], weight: [H] or broadcastable -> [..., H]: ``weight * (x * rsqrt(mean(x^2) + eps))``.

    fp32 inside; the normalised value is rounded to the dtype before the weight, as transformers does.
    """
    return _unit_rms(x, eps).mul_(weight)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    """x: [..., H] -> a new [..., H], :func:`rms_norm` without its weight."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(torch.full((), eps, device=x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x.float() * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, H] -> (norm of the sum, the sum), both [T, H]; the sum is rounded to the dtype first."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2I] -> [T, I]: ``silu(gate_up[:, :I]) * gate_up[:, I:]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox-style rotation of the first ``2 * cos.shape[-1]`` of D. x: [T, heads, D]; cos, sin: [T, 1, R/2] fp32."""
    half = cos.shape[-1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = ((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin), rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _norm_heads(heads: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, num_q: int, eps: float) -> Tensor:
    """heads: [T, Hq + Hk, D], q before k -> the same, normed where there is a weight."""
    if q_weight is None and k_weight is None:
        return heads
    normed = _unit_rms(heads, eps)
    for weight, part in ((q_weight, slice(num_q)), (k_weight, slice(num_q, None))):
        if weight is None:
            normed[:, part] = heads[:, part]
        else:
            normed[:, part].mul_(weight)
    return normed


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """Per-head RMSNorm of q and k (where a weight is given), RoPE, and the scatter of K and V into their pages.

    qkv: [T, (Hq + 2 Hk) * D].  q_weight, k_weight: [D] or None.  cos_sin: [max_position, R] fp32, cosines then sines,
    R <= D even.  positions, slots: [T] int64.  k_pages, v_pages: [P, Hk, S, D], written in place at ``slots``.
    Returns q: [T, Hq, D].
    """
    num_kv, page_size, dim = k_pages.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    num_q = heads.shape[1] - 2 * num_kv
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    turned = _rotate(_norm_heads(heads[:, : num_q + num_kv], q_weight, k_weight, num_q, eps), cos, sin)
    pages = torch.div(slots, page_size, rounding_mode="floor")
    first_rows = torch.add(slots, pages, alpha=(num_kv - 1) * page_size).unsqueeze(1)
    rows = (first_rows + torch.arange(0, num_kv * page_size, page_size, device=slots.device)).view(-1)
    k_pages.view(-1, dim).index_copy_(0, rows, turned[:, num_q:].reshape(-1, dim))
    v_pages.view(-1, dim).index_copy_(0, rows, heads[:, num_q + num_kv :].reshape(-1, dim))
    return turned[:, :num_q]


def shares_rows(k: Tensor, v: Tensor) -> bool:
    """Whether values are the first columns of the keys (a latent cache) and not a store of their own."""
    return k.shape[-1] != v.shape[-1]


def stored(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What there is memory for: keys and values, or in a latent cache its rows alone."""
    return (k,) if shares_rows(k, v) else (k, v)


def _gather_rows(page_table: Tensor, num_kv: int) -> Tensor:
    """page_table: [B, N] -> [B, Hk, N] int64 rows of ``pages.view(P * Hk, S * D)``: one copy gives [Hk, tokens, D]."""
    heads = torch.arange(num_kv, device=page_table.device)
    return (page_table.long() * num_kv).unsqueeze(1) + heads.unsqueeze(1)


def _gather(pages: Tensor, rows: Tensor, length: int) -> Tensor:
    """pages: [P, Hk, S, D], rows: [Hk, N] of :func:`_gather_rows` -> [Hk, length, D]."""
    num_pages, num_kv, page_size, dim = pages.shape
    used = rows[:, : -(-length // page_size)].reshape(-1)
    flat = pages.view(num_pages * num_kv, page_size * dim).index_select(0, used)
    return flat.view(num_kv, -1, dim)[:, :length]


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """One query token per request over its pages. A request of length 0 (a padding row) gives zeros.

    q: [B, Hq, D].  k_pages: [P, Hk, S, D].  v_pages: [P, Hk, S, Dv], Dv = D or, in a latent cache, a view of the first
    Dv columns of ``k_pages``.  page_table: [B, N] int32.  lengths: [B] int32.  -> [B, Hq, Dv].
    Requests with equally many pages are computed together, over the width of those pages: a result depends, to the last
    bit, on its own request only, never on what else is in the batch.
    """
    page_size = k_pages.shape[2]
    out = q.new_zeros((*q.shape[:2], v_pages.shape[3]))
    groups: dict[int, list[int]] = {}
    for b, length in enumerate(lengths.tolist()):
        if length:
            groups.setdefault(-(-length // page_size), []).append(b)
    for num_pages, members in groups.items():
        if len(members) == q.shape[0]:
            return _decode_group(q, k_pages, v_pages, page_table[:, :num_pages], lengths, scale)
        rows = torch.tensor(members, device=q.device)
        table = page_table.index_select(0, rows)[:, :num_pages]
        out[rows] = _decode_group(q[rows], k_pages, v_pages, table, lengths[rows], scale)
    return out


def _decode_group(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """:func:`decode_attention` of requests whose tokens fill all columns of the page table but the last."""
    num_requests, (num_kv, page_size, dim) = q.shape[0], k_pages.shape[1:]
    rows = _gather_rows(page_table, num_kv).reshape(-1)
    held = [
        pages.view(-1, page_size * dim).index_select(0, rows).view(num_requests, num_kv, -1, dim)
        for pages in stored(k_pages, v_pages)
    ]
    k, v = held[0], held[-1][..., : v_pages.shape[3]]
    seen = torch.arange(k.shape[2], device=q.device) < lengths.unsqueeze(1)
    # Slots behind the last token hold anything, NaN too, and 0 * NaN would reach the result.
    unseen = ~seen[:, None, -page_size:, None]
    k[:, :, -page_size:].masked_fill_(unseen, 0)
    v[:, :, -page_size:].masked_fill_(unseen, 0)
    # The heads of one group are the query rows of their KV head: no head is repeated in memory.
    group = q.reshape(num_requests, num_kv, -1, dim)
    attended = F.scaled_dot_product_attention(group, k, v, attn_mask=seen.view(num_requests, 1, 1, -1), scale=scale)
    return attended.reshape(num_requests, -1, v.shape[3])


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    scale: float,
    max_query: int,
) -> Tensor:
    """Ragged causal attention over the paged cache, which already holds this step's K and V.

    q: [T, Hq, D].  v_pages: [P, Hk, S, Dv] as in :func:`decode_attention`.  page_table: [B, N] int32.
    query_start: [B + 1] int32.  lengths: [B] int32 including this step.
    max_query: most query rows of one request (a host int that shapes the device grid).
    Row i of request b sits at position ``lengths[b] - num_queries[b] + i`` and sees positions up to its own.
    Returns [T, Hq, Dv]; rows that belong to no request are zero here and undefined on the device.
    """
    num_kv = k_pages.shape[1]
    rows = _gather_rows(page_table, num_kv)
    starts = query_start.tolist()
    out = q.new_zeros((*q.shape[:2], v_pages.shape[3]))
    for b, length in enumerate(lengths.tolist()):
        first, last = starts[b], starts[b + 1]
        if last == first or not length:
            continue
        k = _gather(k_pages, rows[b], length)
        # Values as wide as keys, though the last columns mean nothing: torch is three times as fast with equal widths.
        v = k if shares_rows(k_pages, v_pages) else _gather(v_pages, rows[b], length)
        query = q[first:last].transpose(0, 1)
        out[first:last] = _causal(query, k, v, scale)[..., : out.shape[2]].transpose(0, 1)
    return out


def _causal(query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """query: [Hq, M, D] is the end of the sequence k: [Hk, length, D], v: [Hk, length, Dv]. Returns [Hq, M, Dv]."""
    num_kv, length, dim = k.shape
    num_queries = query.shape[1]
    grouped = query.reshape(num_kv, -1, num_queries, dim)
    # Heads of one group read their KV head through a stride of 0: no head is repeated in memory.
    k, v = (x.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    if num_queries == length:
        out = F.scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=scale)
    else:
        position = torch.arange(length - num_queries, length, device=k.device)
        seen = torch.arange(length, device=k.device) <= position.unsqueeze(1)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen, scale=scale)
    return out.reshape(-1, num_queries, v.shape[-1])


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words; broadcasts. Four output words.

    Words 0 and 2 live in one tensor and swap places every round, so that a round is six operations. The products wrap
    around 2^63, but their 64 bits are right; bits above 32 are masked where they would matter.
    """
    even = torch.stack(torch.broadcast_tensors(counter[0], counter[2], counter[1])[:2])
    odd = torch.stack(torch.broadcast_tensors(counter[3], counter[1]))
    multiplier = torch.tensor(PHILOX_MULTIPLIERS, device=even.device).view(2, *[1] * (even.dim() - 1))
    multipliers = (multiplier, multiplier.flip(0))
    for i, round_key in enumerate(_round_keys(key)):
        product = even * multipliers[i % 2]
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK32)
        odd = product.flip(0)
    odd &= _MASK32
    return even[0], odd[1], even[1], odd[0]


def _round_keys(key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten tensors [2, ...]: (k1, k0) of round 0, (k0, k1) of round 1, and so on; bits above 32 are not masked."""
    low, high = torch.broadcast_tensors(*key)
    rounds = torch.arange(PHILOX_ROUNDS, device=low.device).view(-1, *[1] * low.dim())
    low, high = low + rounds * PHILOX_KEY_STEPS[0], high + rounds * PHILOX_KEY_STEPS[1]
    even, odd = torch.stack((high, low), dim=1), torch.stack((low, high), dim=1)
    return tuple((odd if i % 2 else even)[i] for i in range(PHILOX_ROUNDS))


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """seeds, positions: [B] int64 -> [B, V] fp32 Gumbel(0, 1) noise that only (seed, position, token) decide.

    ``u = ((word >> 9) + 0.5) * 2^-23`` is exact in fp32 and strictly inside (0, 1). One bit more would round the
    largest u to 1, and its infinite noise would win against any logit about once in 2^24 draws, that is in 1 % of
    the samples of a vocabulary of 150,000.
    """
    token = torch.arange(vocab_size, device=seeds.device)
    seeds, positions = seeds.unsqueeze(1), positions.unsqueeze(1)
    counter = (token, positions & _MASK32, (positions >> 32) & _MASK32, torch.zeros_like(positions))
    word = philox(counter, (seeds & _MASK32, (seeds >> 32) & _MASK32))[0]
    uniform = ((word >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _threshold(x: Tensor, inverse: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Smallest kept logit of each row, [B, 1]: top-k, then top-p of what is left, then min-p; ties are kept."""
    vocab = x.shape[1]
    ordered = x.sort(dim=-1, descending=True).values
    top = ordered[:, :1]
    k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).long().unsqueeze(1)
    kth = ordered.gather(1, k - 1)
    log_weight = (ordered - top) * inverse
    weight = log_weight.double().exp().masked_fill(ordered < kth, 0)
    before = weight.cumsum(-1) - weight
    p = top_p.double().unsqueeze(1)
    in_top_p = (before < p * weight.sum(-1, keepdim=True)) | (p >= 1)
    in_min_p = log_weight >= min_p.float().log().unsqueeze(1)
    kept = (ordered >= kth) & in_top_p & in_min_p
    # The best token always stays, also where rounding or a row of NaN or -inf would leave nothing.
    return torch.where(kept, ordered, top).amin(-1, keepdim=True)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    until: Tensor | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """One token per row by the Gumbel-max trick with counter-based noise: [B] int64.

    logits: [B, V] of any float dtype.  temperature, top_p, min_p: [B] fp32.  top_k: [B] int32 (<= 0 means all).
    seeds, positions: [B] int64.  Temperature 0 is argmax; the lowest index wins ties.  Else the token is the argmax
    of ``logits / temperature + gumbel`` over the tokens that top-k, then top-p (on the renormalised rest: the smallest
    set with mass >= p), then min-p (relative to the best token) keep; ties at a threshold are kept.
    NaN counts as -inf; a row without any number above -inf gives token 0.
    until: [B] int64, banned: [B, E] int32, both or none: where ``positions < until`` the row's ``banned`` tokens count
    as -inf (the logits themselves stay as they are); entries of -1 are none.
    """
    x = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
    if until is not None and banned is not None and bool((held := positions < until).any()):
        off = (banned >= 0) & (banned < x.shape[1]) & held.unsqueeze(1)
        extended = torch.nn.functional.pad(x, (0, 1))  # a column for entries that ban nothing
        x = extended.scatter(1, torch.where(off, banned.long(), x.shape[1]), -torch.inf)[:, :-1]
    greedy = temperature <= 0
    if bool(greedy.all()):
        return x.argmax(-1)
    inverse = torch.where(greedy, 1.0, temperature.float().reciprocal()).clamp(max=MAX_INVERSE_TEMPERATURE).unsqueeze(1)
    noise = gumbel(seeds, positions, x.shape[1]).masked_fill(greedy.unsqueeze(1), 0)
    score = x * inverse + noise
    if bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any()):
        threshold = _threshold(x, inverse, top_k, top_p, min_p)
        score = score.masked_fill((x < threshold) & ~greedy.unsqueeze(1), -torch.inf)
    return score.argmax(-1)


def token_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Natural-log probability and rank (from 1; ties share the best rank) of ``tokens``, and the k best tokens.

    logits: [R, V], tokens: [R] int64 -> (logprob [R] fp32, rank [R] int64, values [R, k] fp32, ids [R, k] int64).
    """
    x = logits.float()
    normaliser = x.logsumexp(-1, keepdim=True)
    chosen = x.gather(1, tokens.unsqueeze(1))
    rank = (x > chosen).sum(-1) + 1
    values, ids = x.topk(k, dim=-1)
    return (chosen - normaliser).squeeze(1), rank, values - normaliser, ids


def list_pages(page_table: Tensor, lengths: Tensor, page_size: int, indices: Tensor, last_page_len: Tensor) -> None:
    """Flat page lists of a ragged batch, in place: the ids of the pages that hold tokens, request after request.

    page_table: [B, N] int32.  lengths: [B] int32, each at least 1.  indices: [n] int32 with room for all pages.
    last_page_len: [B] int32, tokens in the last page of each request.
    """
    counts = (lengths + (page_size - 1)) // page_size
    used = torch.arange(page_table.shape[1], device=page_table.device) < counts.unsqueeze(1)
    pages = page_table[used]
    indices[: pages.numel()] = pages
    last_page_len.copy_((lengths - 1) % page_size + 1)


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """pages: [L, P, Hk, S, D]; page ``dst[i]`` becomes page ``src[i]`` in every layer. src, dst: [n] int64."""
    pages[:, dst] = pages[:, src]
