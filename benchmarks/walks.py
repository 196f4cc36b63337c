"""Sets of blocks with a known locality, in the place of those that a selector would find over random keys."""

from __future__ import annotations

import numpy as np
import torch

from slipstream import LLM

ROUNDS = 512


class Walk:
    """Stands in for a selector's first level: sets of blocks that change by a given share in every step.

    Rounds are walked to and fro. The buffer stays where it is: captured steps read it.
    """

    def __init__(self, llm: LLM) -> None:
        selector, device = llm.engine.backend.selector, llm.device
        self._llm, self._scored, self._selector, config = llm, selector.blocks, selector, selector._config
        self._size, self._blocks = config.block, config.blocks
        self._num = config.blocks - 3  # without the first and the newest two
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._rounds = self._drawn = torch.zeros((ROUNDS, 1, 1, self._num), dtype=torch.int32, device=device)
        self._now: list[torch.Tensor] = []
        selector.blocks = self

    def follow(self, context: int, overlap: float, seed: int = 0) -> None:
        """From now on each step keeps this share of the blocks."""
        last = context // self._size - 3
        rng, rounds = np.random.default_rng(seed), []
        current = rng.choice(np.arange(1, last), self._num, replace=False)
        for _ in range(ROUNDS):
            fresh = round((1 - overlap) * self._blocks)
            left = np.setdiff1d(np.arange(1, last), current)
            current = np.concatenate((rng.permutation(current)[fresh:], rng.choice(left, fresh, replace=False)))
            rounds.append(np.sort(current))
        self._drawn.copy_(torch.tensor(np.stack(rounds), dtype=torch.int32).view(self._drawn.shape))
        self._walk(self._drawn)

    def replay(self, sets: np.ndarray) -> None:
        """From now on these, [R, L', H', M]; other layers and heads get those of the ones that there are, in turn."""
        self._walk(torch.tensor(sets[..., : self._num].astype(np.int32), device=self._drawn.device))

    def _walk(self, rounds: torch.Tensor) -> None:
        if rounds is not self._rounds:
            self._llm.engine.runner._steps.clear()  # captured steps read the others
        self._rounds = rounds

    def __call__(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        scored = self._scored(layer, query)
        if scored.shape[2] < self._num + 3:  # a rehearsal, or a prompt: nothing to walk over
            return scored
        if layer == 0:
            self._now = self._choose(scored)
        return self._now[layer % len(self._now)]

    def _choose(self, scored: torch.Tensor) -> list[torch.Tensor]:
        """The sets of this step, for the layers in turn."""
        rounds, lengths, (requests, num_kv, width) = self._rounds, self._selector._lengths, scored.shape
        self._step += 1
        period = 2 * len(rounds) - 2
        at = (self._step + 37 * torch.arange(requests, device=scored.device)) % period
        at = torch.minimum(at, period - at)
        newest = (lengths.view(-1, 1) - 1) // self._size
        chosen = rounds[at].transpose(1, 2)  # [B, H', L', M]
        heads = torch.arange(num_kv, device=scored.device) % chosen.shape[1]
        wide = chosen.index_select(1, heads)
        first, last = (x.view(-1, 1, 1, x.shape[1]).expand(*wide.shape[:3], -1) for x in (
            torch.zeros_like(newest), torch.cat((newest - 1, newest), dim=1),
        ))  # fmt: skip
        rows = torch.cat((first, wide, last), dim=3).int()
        rows = torch.where(lengths.view(-1, 1, 1, 1) > self._size * width, rows, scored.unsqueeze(2))
        return [rows[:, :, layer].contiguous() for layer in range(rows.shape[2])]
