"""Long contexts without their prefill: KV pages of random numbers that the engine believes to be those of some prompts.

Prefilling 8 x 64k tokens of an 8B model takes half a minute of an H200 and changes nothing about how long a decode
step takes. The pages are committed to the prefix cache as if a request had left them there; a request with the same
prompt then computes its last token only. With random keys every selection method finds its tokens scattered: no
locality helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from slipstream import LLM


def fill_pool(llm: LLM, seed: int = 0) -> None:
    """Random normal keys and values in every page, layer by layer."""
    generator = torch.Generator(llm.device).manual_seed(seed)
    for pages in (llm.pool.k, llm.pool.v):
        for layer in pages:
            layer.normal_(generator=generator)
    if (keys := keys_of(llm)) is not llm.pool.k:
        keys.copy_(llm.pool.k)


def keys_of(llm: LLM) -> torch.Tensor:
    """Those that an index is made of: on a cache rank's device, where there is one."""
    far = getattr(llm.engine.backend, "far", None)
    return llm.pool.k if far is None else far.replica.k


def remember(llm: LLM, prompts: Sequence[Sequence[int]], *, index: bool = True) -> None:
    """Give each prompt's whole pages to the prefix cache, and extend the method's index over them, if it is not yet."""
    table, size = llm.engine.table, llm.pool.page_size
    assert table.reuse, "remembered contexts live in the prefix cache: build the LLM with prefix_cache=True"
    for prompt in prompts:
        length = (len(prompt) - 1) // size * size
        lease = table.allocate()
        assert table.can_append(lease, length), f"{length} tokens do not fit the cache: {llm.memory}"
        table.append(lease, length)
        if index:
            index_pages(llm, lease.pages, length)
        table.commit(lease, list(prompt), length)
        table.free(lease)


def index_pages(llm: LLM, pages: Sequence[int], length: int) -> None:
    """What a prefill would have written beside these pages."""
    index = getattr(llm.engine.backend, "index", None)
    if index is None:
        return
    keys = keys_of(llm)
    row = torch.tensor([pages], dtype=torch.int32, device=keys.device)
    start = torch.tensor([0, length], dtype=torch.int32, device=keys.device)
    lengths = torch.tensor([length], dtype=torch.int32, device=keys.device)
    with torch.cuda.device(keys.device) if keys.is_cuda else nullcontext():  # kernels of Triton go to the current one
        for layer in range(llm.spec.num_layers):
            index.extend(layer, keys[layer], row, start, lengths, length)
    if keys.device != llm.pool.k.device:
        torch.cuda.synchronize(keys.device)  # the lanes of that device know nothing of the stream that this ran on
