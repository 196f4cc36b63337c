"""Free-running evaluation of the trained models: batched, a static cache, one CUDA graph per step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slipstream import tasks
from slipstream.tasks.problem import Problem

from .attention import attend
from .model import Decoder, rotary_table
from .tokenizer import IM_END, PAD, FastEncoder

PREFILL_TOKENS = 65536


@dataclass(frozen=True)
class Cell:
    """One number of the table: ``count`` problems of a task, greedy, or ``samples`` chains each at a temperature."""

    name: str
    kinds: tuple[tuple[str, dict[str, Any]], ...]
    temperature: float = 0.0
    samples: int = 1
    slack: int = 16


def cell(name: str, task: str, temperature: float = 0.0, samples: int = 1, **parameters: Any) -> Cell:
    slack = 120 if task == "search" else 16
    return Cell(name, ((task, parameters),), temperature, samples, slack)


def needles(length: int) -> Cell:
    kinds = ("needle_single", "needle_multikey", "needle_multiquery")
    return Cell(f"needles_{length}", tuple((kind, {"num_tokens": length - 100}) for kind in kinds))


BARS = {  # the bars on the target
    "needles_1024": 0.95,
    "needles_2048": 0.95,
    "needles_4096": 0.95,
    "needles_8192": 0.95,
    "program_100": 0.95,
    "program_200": 0.80,
    "shuffled_50": 0.80,
    "spread_8192_50": 0.80,
}
CORE = (
    *(needles(n) for n in (1024, 2048, 4096, 8192)),
    cell("program_100", "program", steps=100),
    cell("program_200", "program", steps=200),
    cell("shuffled_50", "program_shuffled", steps=50),
    Cell("spread_8192_50", (("program_spread", {"steps": 50, "num_tokens": 7100}),)),
)
FAMILIES = (
    cell("program_50", "program", steps=50),
    cell("expression_4", "expression", operations=4),
    cell("expression_8", "expression", operations=8),
    cell("expression_12", "expression", operations=12),
    cell("expression_16", "expression", operations=16),
    cell("search_6", "search", size=6, tries=8),
    cell("search_8", "search", size=8, tries=8),
)
EXTRA = (
    cell("recall_64", "recall", pairs=64),
    cell("shuffled_100", "program_shuffled", steps=100),
    cell("multivalue_4096", "needle_multivalue", num_tokens=4000),
    cell("tracking_2048", "variable_tracking", num_tokens=2000),
    cell("common_words_512", "common_words", num_tokens=500),
    cell("frequent_words_512", "frequent_words", num_tokens=500),
    needles(12288),
    cell("program_300", "program", steps=300),
)
SAMPLED = (
    cell("program_100_t08", "program", 0.8, 4, steps=100),
    cell("expression_8_t08", "expression", 0.8, 4, operations=8),
    cell("expression_12_t08", "expression", 0.8, 4, operations=12),
    cell("search_8_t08", "search", 0.8, 4, size=8, tries=8),
)
DRAFT = (cell("program_100", "program", steps=100), cell("program_200", "program", steps=200), *FAMILIES)
DRAFT_EXTRA = (needles(1024), cell("shuffled_50", "program_shuffled", steps=50), cell("recall_64", "recall", pairs=64))


@dataclass
class State:
    """The static buffers of one decoding batch."""

    cache: Tensor  # [L, 2, B, Hk, S, D]
    table: Tensor  # [S, 2, D/2]
    tokens: Tensor  # [B] int64, the last token of each row
    lengths: Tensor  # [B] int64, tokens in the cache
    out: Tensor  # [B, max_new] int64
    step: Tensor  # [1] int64
    done: Tensor  # [B] bool
    temperature: float
    rows: Tensor = field(init=False)
    logits: Tensor = field(init=False)  # [B, V] of the prompts' last tokens

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.tokens), device=self.tokens.device)


def _new_state(model: Decoder, batch: int, room: int, max_new: int, temperature: float) -> State:
    config, weight = model.config, model.model.norm.weight
    device = weight.device
    shape = (config.layers, 2, batch, config.kv_heads, room, config.head_dim)
    state = State(
        cache=torch.zeros(shape, dtype=weight.dtype, device=device),
        table=rotary_table(config, room, device),
        tokens=torch.zeros(batch, dtype=torch.int64, device=device),
        lengths=torch.zeros(batch, dtype=torch.int64, device=device),
        out=torch.full((batch, max_new), PAD, dtype=torch.int64, device=device),
        step=torch.zeros(1, dtype=torch.int64, device=device),
        done=torch.zeros(batch, dtype=torch.bool, device=device),
        temperature=temperature,
    )
    state.logits = torch.zeros(batch, config.vocab, device=device)
    return state


def _accept(state: State, logits: Tensor) -> None:
    """Choose and record each row's next token."""
    logits = logits.float()
    if state.temperature > 0:
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)))
        logits = logits / state.temperature + noise
    chosen = torch.where(state.done, PAD, logits.argmax(-1))
    state.out.index_copy_(1, state.step, chosen[:, None])
    state.tokens.copy_(chosen)
    state.done.logical_or_(chosen == IM_END)
    state.step.add_(1)


def _prefill(model: Decoder, state: State, prompts: list[list[int]], first: int) -> None:
    """Packed prompts of rows ``first`` and on: fill their cache, choose their first token (into ``tokens``)."""
    device = state.tokens.device
    cuts = [0]
    for prompt in prompts:
        cuts.append(cuts[-1] + len(prompt))
    ids = torch.tensor([i for prompt in prompts for i in prompt], device=device)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
    starts = torch.tensor(cuts, dtype=torch.int32, device=device)
    sizes = torch.tensor([len(prompts), max(map(len, prompts))])
    table, x = state.table[positions], model.model.embed_tokens(ids)
    for layer, block in enumerate(model.model.layers):
        q, k, v = block.self_attn.qkv(block.input_layernorm(x), table)
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
            state.cache[layer, 0, first + i, :, : b - a] = k[a:b].transpose(0, 1)
            state.cache[layer, 1, first + i, :, : b - a] = v[a:b].transpose(0, 1)
        x = block.finish(x, attend(q, k, v, starts, sizes).reshape(len(ids), -1))
    last = model.model.norm(x[starts[1:].long() - 1])
    rows = slice(first, first + len(prompts))
    state.lengths[rows] = starts.diff().long()
    state.logits[rows] = model.logits(last).float()


def _decode(model: Decoder, state: State) -> None:
    """One token for every row."""
    batch, config = len(state.tokens), model.config
    table, x = state.table[state.lengths], model.model.embed_tokens(state.tokens)
    room = state.cache.shape[4]
    seen = torch.arange(room, device=x.device) <= state.lengths[:, None]
    bias = torch.zeros(batch, room, device=x.device, dtype=x.dtype).masked_fill_(~seen, float("-inf"))[:, None, None]
    bias = bias.expand(-1, config.kv_heads, config.heads // config.kv_heads, -1)
    for layer, block in enumerate(model.model.layers):
        q, k, v = block.self_attn.qkv(block.input_layernorm(x), table)
        keys, values = state.cache[layer, 0], state.cache[layer, 1]
        keys[state.rows, :, state.lengths] = k
        values[state.rows, :, state.lengths] = v
        grouped = q.view(batch, config.kv_heads, -1, config.head_dim)  # the heads of a group as rows of one query
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias)
        x = block.finish(x, attended.reshape(batch, -1))
    state.lengths.add_((~state.done).long())
    _accept(state, model.logits(model.model.norm(x)))


@torch.inference_mode()
def generate(
    model: Decoder, prompts: list[list[int]], max_new: int, temperature: float = 0.0, deadline: float = float("inf")
) -> list[list[int]]:
    """Up to ``max_new`` tokens of each prompt (ids), cut before the end token; stops early at the deadline."""
    room = -(-(max(map(len, prompts)) + max_new + 1) // 64) * 64
    state = _new_state(model, len(prompts), room, max_new, temperature)
    first = 0
    while first < len(prompts):
        last, size = first + 1, len(prompts[first])
        while last < len(prompts) and size + len(prompts[last]) <= PREFILL_TOKENS:
            size += len(prompts[last])
            last += 1
        _prefill(model, state, prompts[first:last], first)
        first = last
    _accept(state, state.logits)
    _run_steps(model, state, max_new - 1, deadline)
    rows = state.out.tolist()
    return [row[: row.index(IM_END)] if IM_END in row else row for row in rows]


def _run_steps(model: Decoder, state: State, steps: int, deadline: float) -> None:
    if not state.tokens.is_cuda:
        for _ in range(steps):
            if bool(state.done.all()) or time.monotonic() > deadline:
                return
            _decode(model, state)
        return
    saved = [t.clone() for t in (state.tokens, state.lengths, state.out, state.step, state.done)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _decode(model, state)  # warm-up: libraries allocate outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _decode(model, state)
    for tensor, value in zip((state.tokens, state.lengths, state.out, state.step, state.done), saved, strict=True):
        tensor.copy_(value)
    for i in range(steps):
        if i % 64 == 0 and (bool(state.done.all()) or time.monotonic() > deadline):
            return
        graph.replay()


class Text:
    """Ids to text for the verifiers."""

    def __init__(self, encoder: FastEncoder) -> None:
        from .tokenizer import build

        self.encoder = encoder
        self.tokenizer = build()

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def problems_of(what: Cell, count: int, seed: int) -> list[Problem]:
    """Problems of the evaluation seeds (never used in training), the cell's kinds in turn."""
    made = []
    for i in range(count):
        task, parameters = what.kinds[i % len(what.kinds)]
        made.append(tasks.make(task, seed + i, **parameters))
    return made


def evaluate(
    model: Decoder, what: Cell, text: Text, count: int, deadline: float, seed: int = 10_000_000
) -> dict[str, Any]:
    """accuracy (pass@1), pass@k when sampled, the share of whole chains that equal the ideal one, seconds."""
    began = time.monotonic()
    problems = problems_of(what, count, seed)
    prompts = [text.encoder.prompt(p.prompt) for p in problems for _ in range(what.samples)]
    ideal = [text.encoder.completion(p.completion) for p in problems]
    max_new = max(map(len, ideal)) + what.slack
    outputs = [text.decode(ids) for ids in generate(model, prompts, max_new, what.temperature, deadline)]
    k = what.samples
    right = [[tasks.verify(p, o) for o in outputs[i * k : (i + 1) * k]] for i, p in enumerate(problems)]
    closed = sum("</think>" in o for o in outputs) / len(outputs)
    result: dict[str, Any] = {
        "accuracy": round(sum(map(sum, right)) / (k * len(right)), 4),
        "closed": round(closed, 4),
        "s": round(time.monotonic() - began, 2),
    }
    if k > 1:
        result[f"pass_at_{k}"] = round(sum(map(any, right)) / len(right), 4)
    else:
        exact = sum(o == p.completion for o, p in zip(outputs, problems, strict=True))
        result["chain"] = round(exact / len(problems), 4)
    return result
