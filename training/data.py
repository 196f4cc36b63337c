"""Training documents: the tasks' own problems, tokenised, weighted and packed, by worker processes.

Every family aims at a share of the tokens. A batch is one pack of ``capacity`` tokens; the last document is cut off at
its end. The stage (which families, how long) is a shared integer that the workers read before each batch.
"""

from __future__ import annotations

import multiprocessing as mp
import queue
import signal
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import numpy as np

from slipstream import tasks
from slipstream.tasks.lexicon import FILLER, KEYS
from slipstream.tasks.problem import Problem

from .tokenizer import END_THINK, FastEncoder

FAMILIES = (
    "program",
    "shuffled",
    "spread",
    "needles",
    "recall",
    "expression",
    "search",
    "tracking",
    "counting",
)
OVERHEAD = 72  # chat frame, instructions and question of a program
STEP = 30  # tokens of one program step: 9 in the prompt, 21 in the chain
MAX_DOCUMENTS = 2048


@dataclass(frozen=True)
class Stage:
    """Shares of the tokens by family, and the longest document."""

    shares: dict[str, float]
    longest: int


RETRIEVAL = Stage({"shuffled": 0.35, "needles": 0.20, "recall": 0.45}, 512)
MIX = {
    "program": 0.17,
    "shuffled": 0.28,
    "spread": 0.15,
    "needles": 0.20,
    "recall": 0.03,
    "expression": 0.06,
    "search": 0.04,
    "tracking": 0.05,
    "counting": 0.02,
}
STAGES = (RETRIEVAL, Stage(MIX, 2048), Stage(MIX, 4096), Stage(MIX, 8192))


def _steps(rng: np.random.Generator, tokens: int, most: int) -> int:
    return int(np.clip((tokens - OVERHEAD - 40) // STEP, 2, most))


def draw(family: str, rng: np.random.Generator, tokens: int, first_stage: bool = False) -> Problem:
    """A problem of the family of about ``tokens`` tokens, prompt and completion together.

    In the first stage nothing can be solved by elimination: programs have decoys, pairs are drawn with repetition; and
    lists are often short, because one right key among four is easier to find than among sixty.
    """
    asked = int(rng.choice((1, 1, 2, 4)))
    if family == "program":
        return tasks.generate("program", rng, steps=_steps(rng, tokens, 400), asked=asked)
    if family == "shuffled":
        decoys = int(rng.integers(0, 13)) if first_stage or rng.random() < 0.2 else 0
        steps = _steps(rng, tokens - 9 * decoys, 400)
        return tasks.generate("program_shuffled", rng, steps=steps, asked=asked, decoys=decoys)
    if family == "spread":
        steps = int(rng.integers(2, _steps(rng, tokens, 120) + 1))
        order = "random" if rng.random() < 0.3 else "sequential"
        room = max(tokens - 20 * steps - 20, 1)
        return tasks.generate("program_spread", rng, steps=steps, asked=asked, order=order, num_tokens=room)
    if family == "needles":
        return _needles(rng, tokens)
    if family == "recall":
        pairs = int(np.clip((tokens - 25) // 9, 2, 160))
        if not first_stage:
            return tasks.generate("recall", rng, pairs=pairs)
        few = int(np.exp(rng.uniform(np.log(2), np.log(pairs + 1))))
        return tasks.generate("recall", rng, pairs=few, draws=max(few, 8))
    if family == "expression":
        most = int(np.clip(((tokens - 50) / 3.6) ** 0.5, 1, 16))
        return tasks.generate("expression", rng, operations=int(rng.integers(1, most + 1)))
    if family == "search":
        return tasks.generate("search", rng, size=int(rng.integers(5, 11)), tries=int(rng.integers(4, 10)))
    if family == "tracking":
        hops = int(rng.integers(2, 7))
        chains = int(rng.integers(1, max(2, min(6, tokens // (16 * (hops + 1))))))
        return tasks.generate("variable_tracking", rng, chains=chains, hops=hops, num_tokens=tokens - 14 * hops)
    words = int(min(tokens, 1024))
    if rng.random() < 0.5:
        return tasks.generate("common_words", rng, num_tokens=words, ratio=int(rng.integers(4, 11)))
    return tasks.generate("frequent_words", rng, num_tokens=words)


def _needles(rng: np.random.Generator, tokens: int) -> Problem:
    room = max((tokens - 40) // 14, 2)
    keys = int(rng.integers(1, min(room, 32) + 1))
    queries = int(rng.integers(1, min(keys, 8) + 1))
    values = int(rng.integers(2, 5)) if rng.random() < 0.2 else 1
    queries = queries if values == 1 else min(queries, 2)
    task = "needle_multivalue" if values > 1 else "needle_multiquery"
    budget = max(tokens - 22 * queries * values - 12, 0)
    return tasks.generate(task, rng, keys=keys, queries=queries, values=values, num_tokens=budget)


class Weights:
    """Loss weight of every completion token, from its id and the id before it: a few tokens carry the difficulty."""

    def __init__(self, encoder: FastEncoder) -> None:
        size = encoder.size
        ids = encoder.id
        self.operator = np.zeros(size, bool)
        self.operator[[ids(f" {op} ") for op in ("add", "sub", "max", "mul")] + [ids(" halt")]] = True
        self.digit = np.zeros(size, bool)
        self.digit[[ids(d) for d in "0123456789"]] = True
        self.key = np.zeros(size, bool)
        self.key[[ids(word) for word in KEYS]] = True
        self.word = np.zeros(size, bool)
        self.word[[ids(" " + word) for word in FILLER]] = True
        self.label = np.zeros(size, bool)
        self.label[[ids(f"L{i:03d}") for i in range(500)]] = True
        self.is_, self.equals = ids(" is "), ids("=")

    def of(self, family: str, tokens: np.ndarray) -> np.ndarray:
        """float32 weights of a completion's tokens (1 unless the family says otherwise)."""
        weights = np.ones(len(tokens), np.float32)
        before = np.concatenate([[0], tokens[:-1]])
        if family in ("program", "shuffled", "spread"):
            weights[self.operator[tokens]] = 4
        elif family == "needles":
            weights[self.digit[tokens]] = 4
            weights[before == self.is_] = 8
        elif family == "recall":
            weights[self.word[tokens]] = 6
            weights[self.key[tokens] | self.label[tokens]] = 0
        elif family == "tracking":
            weights[self.key[tokens]] = 8
        elif family == "expression":
            weights[before == self.equals] = 4
        elif family == "search":
            past_chain = np.cumsum(tokens == END_THINK) > 0
            weights[past_chain] = 2
        return weights


class Packer:
    """Draws documents until a pack is full."""

    def __init__(self, seed: int, capacity: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.encoder = FastEncoder()
        self.weights = Weights(self.encoder)
        self.capacity = capacity
        self.made = dict.fromkeys(FAMILIES, 0.0)
        self.first_stage = False

    def document(self, family: str, tokens: int) -> tuple[list[int], np.ndarray]:
        """Ids of a chat-rendered problem, and the loss weight of each token as a *target*."""
        problem = draw(family, self.rng, tokens, self.first_stage)
        prompt = self.encoder.prompt(problem.prompt)
        completion = self.encoder.completion(problem.completion)
        weights = np.zeros(len(prompt) + len(completion), np.float32)
        weights[len(prompt) :] = self.weights.of(family, np.array(completion))
        return prompt + completion, weights

    def _pick(self, shares: dict[str, float]) -> str:
        """The family that is furthest behind its share, with a little noise."""
        return min(shares, key=lambda f: self.made[f] / shares[f] * (1 + 0.02 * self.rng.random()))

    def pack(self, stage: Stage) -> dict[str, np.ndarray]:
        """tokens, targets [C] int16; weights [C] float32; family [C] uint8; positions, starts (padded) int32; sizes."""
        size = self.capacity
        self.first_stage = stage is RETRIEVAL
        tokens = np.zeros(size, np.int16)
        weights = np.zeros(size, np.float32)
        family = np.zeros(size, np.uint8)
        starts, used = [0], 0
        while used < size and len(starts) < MAX_DOCUMENTS:
            room = size - used
            if room < 100:
                starts.append(size)
                used = size
                break
            name = self._pick(stage.shares)
            shortest = min(160, stage.longest)
            length = min(int(self.rng.integers(shortest, stage.longest + 1)), room)
            ids, w = self.document(name, length)
            n = min(len(ids), room)
            self.made[name] += n
            tokens[used : used + n] = ids[:n]
            weights[used : used + n - 1] = w[1:n]  # the token before predicts it
            family[used : used + n] = FAMILIES.index(name)
            used += n
            starts.append(used)
        if starts[-1] < size:
            starts.append(size)
        cuts = np.array(starts, np.int32)
        positions = np.arange(size, dtype=np.int32) - np.repeat(cuts[:-1], np.diff(cuts))
        targets = np.concatenate([tokens[1:], [0]]).astype(np.int16)
        longest = np.diff(cuts).max()
        padded = np.full(MAX_DOCUMENTS + 2, size, np.int32)
        padded[: len(cuts)] = cuts
        return {
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
            "family": family,
            "starts": padded,
            "positions": positions,
            "sizes": np.array([len(cuts) - 1, longest], np.int64),
        }


def _work(seed: int, capacity: int, stage: Synchronized, stop: Event, out: mp.Queue) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    packer = Packer(seed, capacity)
    current = -1
    while not stop.is_set():
        index = stage.value
        if index != current:
            current = index
            packer.made = dict.fromkeys(FAMILIES, 0.0)
        batch = packer.pack(STAGES[index])
        batch["stage"] = np.array(index)
        while not stop.is_set():
            try:
                out.put(batch, timeout=0.5)
                break
            except queue.Full:
                continue


class Feed:
    """Worker processes and their queue. ``close`` kills them by handle: a left-over worker would hold the pipe open."""

    def __init__(self, workers: int, capacity: int, seed: int, depth: int = 24) -> None:
        context = mp.get_context("fork")  # before CUDA and threads begin: nothing is imported again
        self.stage = context.Value("i", 0)
        self.stop = context.Event()
        self.queue = context.Queue(depth)
        self.processes = [
            context.Process(
                target=_work, args=(seed * 1000 + i, capacity, self.stage, self.stop, self.queue), daemon=True
            )
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def next(self) -> dict[str, np.ndarray]:
        """The next pack of the current stage; packs left over from an earlier stage are dropped."""
        while True:
            batch = self.queue.get(timeout=120)
            if int(batch["stage"]) == self.stage.value:
                return batch

    def close(self) -> None:
        self.stop.set()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(5)
        self.queue.cancel_join_thread()
