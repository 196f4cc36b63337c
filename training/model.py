"""A Qwen3 decoder for training: packed documents in, per-token losses out. State-dict names are Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of one model; the defaults are what both embedded models share."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    kv_heads: int = 2
    head_dim: int = 64
    theta: float = 1e6
    eps: float = 1e-6

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return self.head_dim

    def num_parameters(self) -> int:
        attention = self.head_dim * self.hidden * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        block = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * block + self.hidden


def target_config(vocab: int) -> ModelConfig:
    return ModelConfig(384, 8, 8, 1152, vocab)


def draft_config(vocab: int) -> ModelConfig:
    return ModelConfig(192, 4, 4, 576, vocab)


def tiny_config(vocab: int) -> ModelConfig:
    """For tests on the CPU."""
    return ModelConfig(64, 2, 4, 128, vocab)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """[length, 2, D/2] float32: cosines and sines."""
    half = config.rotary_dim // 2
    frequency = config.theta ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], 1).float()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: [T, H, D]; table: [T, 2, D/2]. Half rotation (neox), in float32."""
    first, second = x.float().chunk(2, -1)
    cos, sin = table[:, None, 0], table[:, None, 1]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv, bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.eps)
        self.k_norm = RMSNorm(config.head_dim, config.eps)

    def qkv(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated q [T, Hq, D], k [T, Hk, D], and v [T, Hk, D]."""
        rows, dim = x.shape[0], self.config.head_dim
        q = self.q_norm(self.q_proj(x).view(rows, -1, dim))
        k = self.k_norm(self.k_proj(x).view(rows, -1, dim))
        return rotate(q, table), rotate(k, table), self.v_proj(x).view(rows, -1, dim)

    @torch.no_grad()
    def share(self, scale: float) -> None:
        """Keys become mostly their group's mean query, queries follow; the output reads back what the values hold."""
        config = self.config
        group = config.heads // config.kv_heads
        q = self.q_proj.weight.view(config.kv_heads, group, config.head_dim, config.hidden)
        k = self.k_proj.weight.view(config.kv_heads, config.head_dim, config.hidden)
        shared = q.mean(1) * group**0.5  # the mean query, back at the scale of one projection
        k.mul_(0.3).add_(shared, alpha=0.7)
        q.mul_(0.3).add_(shared[:, None], alpha=0.7)
        v = self.v_proj.weight.view(config.kv_heads, config.head_dim, config.hidden)
        o = self.o_proj.weight.view(config.hidden, config.kv_heads, group, config.head_dim)
        o.add_(v.permute(2, 0, 1)[:, :, None], alpha=3 * scale)

    @torch.no_grad()
    def look_back(self, common: Tensor, pairs: int = 3) -> None:
        """KV head 0 attends to the token before, through the fastest rotary pairs, excited by what embeddings share.

        common: the direction that they share, [hidden].
        """
        config = self.config
        half, group = config.head_dim // 2, config.heads // config.kv_heads
        step = config.theta ** (-torch.arange(pairs, dtype=torch.float64) / half)
        key, query = torch.zeros(config.head_dim), torch.zeros(config.head_dim)
        key[:pairs] = 1
        query[:pairs], query[half : half + pairs] = step.cos().float(), -step.sin().float()
        self.k_proj.weight[: config.head_dim].mul_(0.1).add_(key[:, None] * common)
        for head in range(group):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            self.q_proj.weight[rows].mul_(0.1).add_(query[:, None] * common)


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Layer ``index`` of a model."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn: nn.Module = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp: nn.Module = Mlp(config.hidden, config.mlp)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream after attention's output projection and the MLP. attended: [T, Hq * D]."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, table: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), table)
        return self.finish(x, attend(q, k, v, starts, sizes).reshape(x.shape[0], -1))


class Body(nn.Module):
    def __init__(self, config: ModelConfig, block: type[Block]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList([block(config, index) for index in range(config.layers)])
        self.norm = RMSNorm(config.hidden, config.eps)


class Decoder(nn.Module):
    """The whole model; ``state_dict()`` has the names of ``Qwen3ForCausalLM`` with tied embeddings."""

    block: type[Block] = Block

    def __init__(self, config: ModelConfig, seed: int = 0, scale: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config, self.block)
        _initialise(self, seed, scale)

    def balance(self) -> None:
        """After an update: what keeps a model in bounds; nothing here."""

    def hidden(self, tokens: Tensor, table: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
        """Final normed states [T, H]. table: [T, 2, D/2] of the tokens' positions; starts, sizes: see ``attend``."""
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, table, starts, sizes)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


def token_losses(hidden: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy [T] float32 of every token, and whether the argmax is right [T] bool."""
    logits = F.linear(hidden, embedding).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def _initialise(model: Decoder, seed: int, scale: float) -> None:
    """Normal weights, and the three parts of lookup by content in place from the first step on.

    A lookup ("what followed this key?") needs a head that carries each token to its successor, a copy that keeps what
    is carried readable, and queries that look like the keys they seek. Left to chance each of them waits for the
    others, and at this size the wait is longer than the run; with all three a toy model finds one of 8 pairs after 60
    steps.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        weight.normal_(0, 0.02 / (2 * config.layers) ** 0.5 if residual else 0.02, generator=generator)
    common = _embed(model, scale, generator)
    for block in model.model.layers:
        block.self_attn.share(scale)
    model.model.layers[0].self_attn.look_back(common)


def _embed(model: Decoder, scale: float, generator: torch.Generator) -> Tensor:
    """Embeddings of standard deviation ``scale`` with one direction in common; returns that direction [hidden].

    The final norm starts smaller by as much, so that the tied logits start out small.
    """
    weight = model.model.embed_tokens.weight
    weight.normal_(0, scale, generator=generator)
    common = torch.randn(weight.shape[1], generator=generator)
    common /= common.norm()
    weight.sub_((weight @ common)[:, None] * common)
    weight.add_(common * (0.7 * scale * weight.shape[1] ** 0.5))
    model.model.norm.weight.fill_(0.02 / scale)
    return common
