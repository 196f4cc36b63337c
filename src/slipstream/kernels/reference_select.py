"""Selection and attention over a selection, in plain torch: the definition, the test oracle and the CPU path in one.

Every choice here is an exact top-k of fp32 scores that orders totally: NaN ranks as -inf, -0 equals +0, ties go to the
lowest index, and -inf is still chosen when nothing better is left, so a result is always full. All tensors are of one
layer; B requests with one query token each; ``lengths`` [B] int32 count this step's token, 0 means "not this row".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream.kernels.reference import stored

FLOAT_MAX = torch.finfo(torch.float32).max
FORCED = torch.iinfo(torch.int32).max  # image of what is always in: above that of +inf
ABSENT = torch.iinfo(torch.int32).min  # image of what may not be chosen: below that of -inf


def _image(x: Tensor) -> Tensor:
    """fp32 -> int32 that orders like the numbers, with -0 = +0 and NaN = -inf."""
    x = torch.where(x == 0, 0.0, torch.where(x.isnan(), -torch.inf, x))
    bits = x.contiguous().view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def _best(image: Tensor, num: int) -> Tensor:
    """image: [..., C] int32 -> [..., num] int64 ascending positions of the ``num`` best that are not absent, then C."""
    width = image.shape[-1]
    order = torch.arange(width - 1, -1, -1, device=image.device)
    # An integer of the image and, below it, how early the position is: no two are equal, so topk cannot err on ties.
    best = ((image.long() << 32) | order).topk(min(num, width), dim=-1, sorted=False).indices
    best = best.masked_fill(image.gather(-1, best) == ABSENT, width).sort(dim=-1).values
    return F.pad(best, (0, num - best.shape[-1]), value=width)


def _is_forced(first: Tensor, last: Tensor, lengths: Tensor, sink: int, recent: int) -> Tensor:
    """Whether the tokens first .. last of a candidate overlap the sinks or the recent tokens. lengths: [B, 1, 1]."""
    return (first < sink) | (last >= lengths - max(recent, 1))


def top_blocks(scores: Tensor, lengths: Tensor, block_size: int, num_blocks: int, sink: int, recent: int) -> Tensor:
    """The blocks with the sinks and the recent tokens, then the best others, until there are ``num_blocks``.

    scores: [B, Hk, M] fp32; those of blocks that are not complete are never read as scores.  lengths: [B] int32.
    num_blocks: at least as many as are always in.  -> [B, Hk, num_blocks] int32, ascending, then -1.
    """
    starts = torch.arange(0, scores.shape[-1] * block_size, block_size, device=scores.device)
    lengths = lengths.view(-1, 1, 1)
    forced = _is_forced(starts, starts + block_size - 1, lengths, sink, recent)
    image = _image(scores.float()).masked_fill(forced, FORCED).masked_fill(starts >= lengths, ABSENT)
    best = _best(image, num_blocks)
    return best.masked_fill(best == scores.shape[-1], -1).int()


def _candidates(blocks: Tensor | None, lengths: Tensor, block_size: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens of the candidates, [B, Hk or 1, C] int64, and which of them exist."""
    if blocks is None:
        tokens = torch.arange(width, device=lengths.device).expand(len(lengths), 1, -1)
    else:
        tokens = blocks.long().unsqueeze(-1) * block_size + torch.arange(block_size, device=blocks.device)
        tokens = tokens.flatten(2)
    return tokens, (tokens >= 0) & (tokens < lengths.view(-1, 1, 1))


def token_scores(logits: Tensor, exists: Tensor, num_kv: int, aggregate: str) -> Tensor:
    """Logarithm of the aggregated softmax weights: [B, Hq, C] -> [B, Hk, C] fp32, -inf where a candidate is not.

    exists: [B, Hk or 1, C] bool.  aggregate: "sum" or "max" over the query heads of a KV head.  Everything stays
    relative to a peak and in the log domain, so weights that fp32 cannot hold still rank by their logits.
    NaN counts as -inf, +inf as the largest float. A head that is alone in its group ranks by its logits as they are.
    """
    x = logits.float().unflatten(1, (num_kv, -1))
    x = x.nan_to_num(nan=-torch.inf, posinf=FLOAT_MAX, neginf=-torch.inf).masked_fill(~exists.unsqueeze(2), -torch.inf)
    if x.shape[2] == 1:
        return x.squeeze(2)
    peak = x.amax(-1, keepdim=True).clamp_min(-FLOAT_MAX)
    x = x - peak
    # Summed in fp64, so that how many absent candidates follow, which others in the batch decide, changes no bit.
    x = x - x.exp().sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1).log().float()
    if aggregate == "max":
        return x.amax(2)
    assert aggregate == "sum"
    peak = x.amax(2).clamp_min(-FLOAT_MAX)
    return peak + (x - peak.unsqueeze(2)).exp().sum(2).log()


def group_peak(logits: Tensor, num_kv: int) -> Tensor:
    """logits: [B, Hq, C] -> [B, Hk, C]: of each KV head's group the largest, NaN least of all. Needs no softmax."""
    return logits.unflatten(1, (num_kv, -1)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(2)


def top_tokens(
    logits: Tensor,
    blocks: Tensor | None,
    lengths: Tensor,
    num_kv: int,
    block_size: int,
    budget: int,
    sink: int,
    recent: int,
    aggregate: str,
    *,
    unread: int = 0,
) -> tuple[Tensor, Tensor]:
    """The sinks and the recent tokens among the candidates, then those of most attention, up to ``budget``.

    logits: [B, Hq, C] fp32.  blocks: [B, Hk, C / block_size] int32, -1 padded: candidates are their tokens; or None:
    candidate j is token j.  Tokens >= length do not exist.  Every query head's softmax runs over its candidates;
    ``aggregate`` ("sum" or "max") joins the weights of the heads of one KV head: see :func:`token_scores`.
    unread: no softmax sees so many of the newest tokens, all of them recent ones; their logits may be anything.
    Returns indices [B, Hk, budget] int32, ascending tokens, then -1; counts [B, Hk] int32.
    """
    width = logits.shape[-1]
    tokens, exists = _candidates(blocks, lengths, block_size, width)
    forced = _is_forced(tokens, tokens, lengths.view(-1, 1, 1), sink, recent)
    known = exists & (tokens < lengths.view(-1, 1, 1) - unread)
    image = _image(token_scores(logits, known, num_kv, aggregate))
    best = _best(image.masked_fill(forced, FORCED).masked_fill(~exists, ABSENT), budget)
    chosen = best < width
    tokens = tokens.expand(-1, num_kv, -1).gather(-1, best.clamp_max(width - 1))
    return tokens.masked_fill(~chosen, -1).int(), chosen.sum(-1, dtype=torch.int32)


def block_tokens(blocks: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """All tokens of chosen blocks. blocks: [B, Hk, M] int32, ascending, then -1; lengths: [B] int32.

    Returns indices [B, Hk, M * block_size] int32, ascending, then -1; counts [B, Hk] int32.
    """
    tokens, exists = _candidates(blocks, lengths, block_size, 0)
    return tokens.masked_fill(~exists, -1).int(), exists.sum(-1, dtype=torch.int32)


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Softmax attention over selected tokens, into ``out``; what has count 0 keeps what ``out`` holds.

    q: [B, Hq, D].  k_pages: [P, Hk, S, D].  v_pages: [P, Hk, S, Dv], out: [B, Hq, Dv] (see
    :func:`slipstream.kernels.reference.decode_attention`).  page_table: [B, N] int32.  indices: [B, Hk, K] int32, of
    which the first ``counts`` [B, Hk] int32 are tokens; where ``rows`` [B] int64 is given they have any number of rows,
    and request b uses row ``rows[b]``.  Always over K places: a result depends, to the last bit, on its own request
    (and K) only, never on what else is in the batch.
    """
    num_kv, page_size, dim = k_pages.shape[1:]
    if rows is not None:
        indices, counts = indices.index_select(0, rows), counts.index_select(0, rows)
    live = counts.any(-1).nonzero().squeeze(1)
    if not len(live):
        return
    if len(live) < len(counts):
        q, page_table, indices, counts = (x.index_select(0, live) for x in (q, page_table, indices, counts))
    seen = torch.arange(indices.shape[-1], device=q.device) < counts.unsqueeze(-1)
    tokens = indices.long().masked_fill(~seen, 0)
    pages = page_table.long().gather(1, (tokens // page_size).flatten(1)).view_as(tokens).masked_fill(~seen, 0)
    heads = torch.arange(num_kv, device=q.device).view(-1, 1)
    slots = ((pages * num_kv + heads) * page_size + tokens % page_size).flatten()
    unseen = ~seen.unsqueeze(-1)
    # What stands in for a missing token may be NaN, and 0 * NaN would reach the result.
    held = [
        pages.view(-1, dim).index_select(0, slots).view(*seen.shape, dim).masked_fill_(unseen, 0)
        for pages in stored(k_pages, v_pages)
    ]
    k, v = held[0], held[-1][..., : v_pages.shape[3]]
    # The heads of one group are the query rows of their KV head: no head is repeated in memory.
    group = q.reshape(len(q), num_kv, -1, dim)
    # One request at a time: the library sums in an order that may depend on how many there are.
    each = [
        F.scaled_dot_product_attention(
            group[b : b + 1], k[b : b + 1], v[b : b + 1], seen[b : b + 1, :, None], scale=scale
        )
        for b in range(len(q))
    ]
    attended = torch.cat(each)
    kept = out.view(-1, num_kv, *attended.shape[2:])
    kept[live] = torch.where((counts > 0).view(*counts.shape, 1, 1), attended, kept[live])


def tova_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, filled: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over whole seats, and what each slot weighs there (TOVA, arXiv 2401.06104).

    q: [B, Hq, D].  k: [M, Hk, C, D].  v: [M, Hk, C, Dv], Dv = D or columns of k (see :func:`sparse_attention`).
    rows: [B] int64 seats.  filled: [B] int32 slots in use, the first ones.
    Returns out [B, Hq, Dv], zeros where nothing is filled, and the slots' softmax weights, summed over all query heads:
    [B, C] fp32, undefined where a slot is not filled.
    """
    num_kv, dim = k.shape[1], k.shape[3]
    seen = torch.arange(k.shape[2], device=q.device) < filled.unsqueeze(1)
    k, v = (x.index_select(0, rows).masked_fill_(~seen[:, None, :, None], 0) for x in (k, v))
    scores = torch.matmul(q.reshape(len(q), num_kv, -1, dim), k.transpose(2, 3)).float() * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill((filled == 0).view(-1, 1, 1, 1), 0)
    out = torch.matmul(weights.to(v.dtype), v)
    return out.reshape(*q.shape[:2], v.shape[3]), weights.sum((1, 2))


def lowest_slots(weights: Tensor, filled: Tensor) -> Tensor:
    """weights: [B, C] fp32 of seats -> [B] int64: the filled slot that weighs least, whom TOVA evicts.

    filled: [B] int32 slots in use, the first ones. NaN is lowest of all; the first of equal ones; 0 where none is.
    """
    seen = torch.arange(weights.shape[1], device=weights.device) < filled.unsqueeze(1)
    return weights.nan_to_num(nan=-1.0).masked_fill(~seen, torch.inf).argmin(-1)
