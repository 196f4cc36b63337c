"""AsyncSpade by definition, for one chain and without an engine: lists of keys, values and queries, and plain torch."""

import torch
from tiny_decoder import tiny_model

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.kernels import ops, reference_predict
from slipstream.types import Batch

MODEL = tiny_model()


class OneChain(AttentionBackend):
    """Every key is scored with the predicted query, softmax weights are summed over a KV head's group.

    sets: [layer][KV head] tokens for the step at ``made_for`` tokens. repaired: KV heads whose prediction failed.
    """

    def __init__(self, config, spec, cos_sin, gate):
        self.config, self.spec, self.cos_sin, self.gate = config, spec, cos_sin, gate
        self.kept = [[] for _ in range(spec.num_layers)]
        self.queries = [[] for _ in range(spec.num_layers)]
        self.sets, self.guess = [None] * spec.num_layers, [None] * spec.num_layers
        self.made_for = [0] * spec.num_layers
        self.repaired = self.sparse_steps = 0

    def view(self, layer):
        count, (heads, dim) = self.count, (self.spec.num_kv_heads, self.spec.head_dim)
        self.new = KVView(*torch.zeros(2, 1, heads, count, dim), torch.arange(count))
        return self.new

    def attend(self, layer, q):
        kept, out = self.kept[layer], []
        for t in range(self.count):
            kept.append((self.new.k[0, :, t].clone(), self.new.v[0, :, t].clone()))
            self.queries[layer].append(q[t].clone())
            is_sparse = self.is_decode and len(kept) > self.gate
            assert not is_sparse or self.made_for[layer] == len(kept)
            self.sparse_steps += is_sparse
            out.append(self.attend_one(layer, q[t], self.sets[layer] if is_sparse else None))
        if len(kept) >= self.gate:
            self.select(layer)
        return torch.stack(out)

    def attend_one(self, layer, q, chosen):
        k, v = (torch.stack(x, 1) for x in zip(*self.kept[layer], strict=True))
        out = []
        for head, queries in enumerate(q.unflatten(0, (self.spec.num_kv_heads, -1))):
            tokens = slice(None)
            if chosen is not None and not self.fails(layer, head, queries):
                tokens = chosen[head]
            elif chosen is not None and self.config.repair == "select":
                tokens = self.best(q, torch.stack([k for k, _ in self.kept[layer]], 1), 0)[head].sort().values
            weights = (queries @ k[head, tokens].T * self.spec.scale).softmax(-1)
            out.append(weights @ v[head, tokens])
        return torch.cat(out)

    def fails(self, layer, head, queries):
        if self.config.confidence is None:
            return False
        expected = self.guess[layer].unflatten(0, (self.spec.num_kv_heads, -1))[head]
        failed = bool(torch.cosine_similarity(expected, queries, dim=-1).mean() < self.config.confidence)
        self.repaired += failed
        return failed

    def select(self, layer):
        own, size, length = self.config, self.config.window, len(self.kept[layer])
        window = torch.zeros(1, size, self.spec.num_heads, self.spec.head_dim)
        positions = torch.arange(max(0, length - size), length)
        latest = torch.stack(self.queries[layer][-size:])
        rows = torch.zeros_like(positions)
        reference_predict.push_queries(latest, positions, rows, self.cos_sin, window, own.rotate)
        strength = {"ridge": own.ridge, "analog": own.beta, "ema": own.decay}.get(own.predictor, 0.0)
        at = torch.tensor([length - 1])
        guess = reference_predict.predict_queries(
            window, rows[:1], at, rows[:1], self.cos_sin, own.predictor, strength, own.rotate
        )[0]
        k = torch.stack([k for k, _ in self.kept[layer]], 1)
        self.sets[layer] = [torch.cat((row.sort().values, torch.tensor([length]))) for row in self.best(guess, k, 1)]
        self.guess[layer], self.made_for[layer] = guess, length + 1

    def best(self, query, k, spare):
        own, length = self.config, k.shape[1]
        logits = torch.einsum("hgd,hnd->hgn", query.unflatten(0, (k.shape[0], -1)), k) * self.spec.scale
        score = logits.softmax(-1).sum(1)
        always = [t for t in range(length) if t < own.sink or t >= length - max(own.recent - spare, 1)]
        score[:, always] = torch.inf
        return score.sort(dim=-1, descending=True, stable=True).indices[:, : own.budget - spare]


@torch.inference_mode()
def truth(config, gate, ids, params, index=0, dense=None):
    """(tokens of one chain, its backend): its prompt densely (or so much of it), then token by token."""
    network, spec = MODEL
    backend, known, done = OneChain(config, spec, network.cos_sin, gate), list(ids), 0
    while len(known) < len(ids) + params.max_tokens:
        end = (dense or len(known)) if done == 0 else done + 1
        none, positions = torch.zeros(0), torch.arange(done, end)
        backend.count, backend.is_decode, done = end - done, done > 0, end
        hidden = network.forward(
            Batch(torch.tensor(known)[positions], positions, *[none] * 6, [end], [0, len(positions)], [[]], 0), backend
        )
        if end == len(known):
            one = {"dtype": torch.float32}
            token = ops.sample(
                network.logits(hidden[-1:]),
                torch.tensor([params.temperature], **one),
                torch.tensor([params.top_k], dtype=torch.int32),
                torch.tensor([params.top_p], **one),
                torch.tensor([params.min_p], **one),
                torch.tensor([(params.seed or 0) + index]),
                torch.tensor([len(known)]),
            )
            known.append(int(token))
    return known[len(ids) :], backend
