"""The third embedded model for training: latent attention (MLA) and a small mixture of experts, GLM-4.7-Flash's shape.

State-dict names are those of ``Glm4MoeLiteForCausalLM``. Training expands the latents to full heads, and every expert
computes every token (its weight is 0 where it was not chosen): at this size that is one dense MLP, without a sort.
RoPE turns halves here; the export writes pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Block, Decoder, Mlp, ModelConfig, RMSNorm, rotate

LATENT_EPS = 1e-6  # what transformers' models use for the norm of latents, whatever rms_norm_eps is
# Queries and keys are this many times what their weights make: no q/k norm sets their length, so the weights would have
# to be large, and Muon's steps, of one length whatever the weight, would be small beside them. The export multiplies.
# At 1 and 2 a rate of 0.01 finds retrieval, at 4 it does so too, but one of 0.015 or more does not.
GAIN = 2.0
MATCH = 32.0  # times 0.7 / sqrt(head_dim): the score of two equal tokens at the start
GROWTH = 2.5  # how far the weights of queries and keys may grow: see LatentAttention.clip
BALANCE_RATE = 1e-3  # step of the router's correction towards equal loads (DeepSeek-V3)


@dataclass(frozen=True)
class LatentConfig(ModelConfig):
    """Keys have ``nope + rope`` = ``head_dim`` dimensions a head, values ``head_dim``; ``kv_heads`` must be ``heads``.

    The first ``dense_layers`` have an MLP of width ``mlp``; the others ``experts`` of ``expert_width``, of which a
    token gets ``chosen`` (weights that sum to ``scaling``), and one more for all.
    """

    kv_lora: int = 128
    rope: int = 32
    experts: int = 8
    chosen: int = 2
    expert_width: int = 112
    dense_layers: int = 1
    scaling: float = 2.0

    @property
    def rotary_dim(self) -> int:
        return self.rope

    @property
    def nope(self) -> int:
        return self.head_dim - self.rope

    def num_parameters(self) -> int:
        width = self.heads * self.head_dim
        up = self.heads * (self.nope + self.head_dim) * self.kv_lora
        attention = 2 * self.hidden * width + self.hidden * (self.kv_lora + self.rope) + self.kv_lora + up
        mixture = 3 * self.hidden * self.expert_width * (self.experts + 1) + self.hidden * self.experts
        dense = self.dense_layers
        mlps = dense * 3 * self.hidden * self.mlp + (self.layers - dense) * mixture
        return self.vocab * self.hidden + self.layers * (attention + 2 * self.hidden) + mlps + self.hidden


def latent_config(vocab: int) -> LatentConfig:
    return LatentConfig(256, 6, 8, 768, vocab, kv_heads=8)


def tiny_latent_config(vocab: int) -> LatentConfig:
    """For tests on the CPU."""
    return LatentConfig(64, 2, 4, 128, vocab, kv_heads=4, head_dim=32, kv_lora=32, rope=16, experts=4, expert_width=32)


class LatentAttention(nn.Module):
    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden, config.kv_lora + config.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora, LATENT_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora, config.heads * (config.nope + config.head_dim), bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)
        self.bounds: list[Tensor] = []

    def qkv(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and v of all heads, expanded: [T, H, D] each."""
        config, rows = self.config, x.shape[0]
        q = GAIN * self.q_proj(x).view(rows, config.heads, -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora, config.rope], -1)
        up = self.kv_b_proj(self.kv_a_layernorm(latent)).view(rows, config.heads, -1)
        k_rope = rotate(k_rope[:, None], table).expand(-1, config.heads, -1)
        q = torch.cat([q[..., : config.nope], rotate(q[..., config.nope :], table)], -1)
        k, v = up.split([config.nope, config.head_dim], -1)
        return q, torch.cat([GAIN * k, k_rope], -1), v

    @torch.no_grad()
    def share(self, scale: float) -> None:
        """As the other models' (``model.Attention.share``), with the latent in between.

        The latent is an orthogonal projection of the input. A head's queries become mostly its keys' projection of
        that latent, so that the same content attends to the same content, but not so much that a token sees little
        beside itself; the output reads back what the values hold of the latent. On a toy (recall of 8 pairs, 60 steps)
        a third of this readback, or three times this match, is at chance.
        """
        config = self.config
        down = self.kv_a_proj_with_mqa.weight[: config.kv_lora]
        down.copy_(torch.linalg.qr(down.T)[0].T)
        up = self.kv_b_proj.weight.view(config.heads, -1, config.kv_lora)
        keys, values = up[:, : config.nope], up[:, config.nope :]
        keys.mul_((MATCH / (config.nope * config.kv_lora)) ** 0.5 / 0.02 / GAIN)
        values.mul_(1.5)
        q = self.q_proj.weight.view(config.heads, config.head_dim, config.hidden)
        q[:, : config.nope].mul_(0.3).add_(keys @ down, alpha=0.7)
        o = self.o_proj.weight.view(config.hidden, config.heads, config.head_dim)
        o.add_((values @ down).permute(2, 0, 1), alpha=24 * scale / config.heads)

    def heads(self) -> tuple[Tensor, ...]:
        """What makes the scores, by head: queries [H, D, n], keys [H, nope, kv_lora], and the shared key [1, R, n]."""
        config = self.config
        up = self.kv_b_proj.weight.view(config.heads, -1, config.kv_lora)
        q = self.q_proj.weight.view(config.heads, config.head_dim, -1)
        return q, up[:, : config.nope], self.kv_a_proj_with_mqa.weight[None, config.kv_lora :]

    @torch.no_grad()
    def clip(self) -> None:
        """After an update: no head's weights are longer than ``GROWTH`` times what they were at first, on average.

        Muon's steps add up, and no norm takes their length off these vectors as it does in the other models. Without
        this they grew ten times longer each, and what was found after 45 s was lost again by 150.
        """
        norms = [weights.norm(dim=(1, 2)) for weights in self.heads()]
        self.bounds = self.bounds or [GROWTH * norm.mean() for norm in norms]
        for weights, norm, bound in zip(self.heads(), norms, self.bounds, strict=True):
            weights.mul_((bound / norm).clamp(max=1.0)[:, None, None])

    @torch.no_grad()
    def look_back(self, common: Tensor, pairs: int = 3) -> None:
        """Half of the heads attend to the token before: as ``model.Attention.look_back``, through the shared key.

        No norm sets the length of these vectors, so it is set here: the token before scores 16.
        """
        config = self.config
        half = config.rope // 2
        step = config.theta ** (-torch.arange(pairs, dtype=torch.float64) / half)
        key, query = torch.zeros(config.rope), torch.zeros(config.rope)
        key[:pairs] = 1
        query[:pairs], query[half : half + pairs] = step.cos().float(), -step.sin().float()
        along = 0.7 / (1 + 0.7**2) ** 0.5 * config.hidden**0.5  # of a normed embedding, in the common direction
        gain = (16 * config.head_dim**0.5 / pairs) ** 0.5 / along
        self.kv_a_proj_with_mqa.weight[config.kv_lora :].mul_(0.1).add_(gain * key[:, None] * common)
        heads = self.q_proj.weight.view(config.heads, config.head_dim, config.hidden)[: config.heads // 2]
        heads.mul_(0.1)
        heads[:, config.nope :].add_(gain / GAIN * query[:, None] * common)


class Gate(nn.Module):
    """Scores in float32; the correction chooses and does not weigh (noaux_tc)."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.chosen, self.scaling = config.chosen, config.scaling
        self.weight = nn.Parameter(torch.zeros(config.experts, config.hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """The correction stays in float32, as it is stored."""
        correction = self.e_score_correction_bias
        super()._apply(fn, recurse)
        self.e_score_correction_bias = correction.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, E] float32 weights, 0 for experts that were not chosen."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.chosen, dim=-1).indices
        taken = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        if self.training:
            self.load += taken.detach().sum(0)
        weights = scores * taken
        return weights * (self.scaling / (weights.sum(-1, keepdim=True) + 1e-20))

    @torch.no_grad()
    def balance(self) -> None:
        """Move the correction a little towards equal loads of the experts since the last call."""
        self.e_score_correction_bias += BALANCE_RATE * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Mixture(nn.Module):
    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = nn.ModuleList([Mlp(config.hidden, config.expert_width) for _ in range(config.experts)])
        self.shared_experts = Mlp(config.hidden, config.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (
            torch.cat([getattr(expert, name).weight for expert in self.experts], dim)
            for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
        )
        inner = (F.silu(F.linear(x, gate)) * F.linear(x, up)).unflatten(-1, (len(self.experts), -1))
        weighted = (inner * self.gate(x).unsqueeze(-1).to(inner.dtype)).flatten(1)
        return F.linear(weighted, down) + self.shared_experts(x)


class LatentBlock(Block):
    def __init__(self, config: LatentConfig, index: int) -> None:
        super().__init__(config, index)
        self.self_attn = LatentAttention(config)
        if index >= config.dense_layers:
            self.mlp = Mixture(config)


class LatentDecoder(Decoder):
    """The whole model; ``state_dict()`` has the names of ``Glm4MoeLiteForCausalLM`` with tied embeddings."""

    block = LatentBlock

    def balance(self) -> None:
        for module in self.modules():
            if isinstance(module, Gate):
                module.balance()
            elif isinstance(module, LatentAttention):
                module.clip()


def hugging_face_config(config: LatentConfig) -> dict:
    """The fields of a ``Glm4MoeLiteForCausalLM`` config that differ from those of the other models."""
    sparse = config.layers - config.dense_layers
    return {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "head_dim": config.rope,
        "kv_lora_rank": config.kv_lora,
        "mlp_layer_types": ["dense"] * config.dense_layers + ["sparse"] * sparse,
        "moe_intermediate_size": config.expert_width,
        "n_group": 1,
        "n_routed_experts": config.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": config.chosen,
        "q_lora_rank": None,
        "qk_nope_head_dim": config.nope,
        "qk_rope_head_dim": config.rope,
        "rope_interleave": True,
        "routed_scaling_factor": config.scaling,
        "topk_group": 1,
        "v_head_dim": config.head_dim,
    }


def in_format(state: dict[str, Tensor], config: LatentConfig) -> dict[str, Tensor]:
    """A state dict with the gain inside the weights, whose RoPE turns neighbours (2i, 2i + 1), not (i, i + R / 2)."""
    order = torch.arange(config.rope).view(2, -1).T.flatten()
    changed = dict(state)
    for name, weight in state.items():
        if name.endswith("self_attn.q_proj.weight"):
            heads = GAIN * weight.view(config.heads, config.head_dim, -1)
            heads[:, config.nope :] = heads[:, config.nope :][:, order]
            changed[name] = heads.view_as(weight)
        elif name.endswith("kv_b_proj.weight"):
            heads = weight.clone().view(config.heads, config.nope + config.head_dim, -1)
            heads[:, : config.nope] *= GAIN
            changed[name] = heads.view_as(weight)
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            changed[name] = torch.cat([weight[: config.kv_lora], weight[config.kv_lora :][order]])
    return changed
