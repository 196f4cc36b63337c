"""Which replica gets a prompt: the one that has its keys and values, unless that one has too much to do."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

_FIRST, _GROWTH, _TOKEN_BYTES = 16, 8, 4  # marks at 16 tokens, then 16 or an eighth further each; text: 4 bytes a token
_HOLDERS = 4  # replicas that are remembered of one mark


def marks(prompt: Any, salt: str = "") -> list[bytes]:
    """Digests of a prompt's beginnings, short to long: prompts that begin alike share the first of them.

    prompt: text, token ids, a list of either (the first counts), or messages. What is none of it has no marks: the
    replica will say what is wrong with it.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        data = array("i", prompt).tobytes()
    else:
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        data = text.encode("utf-8", "surrogatepass")
    digest, found, at = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=12), [], 0
    while at < len(data):
        step = max(_FIRST, at // _TOKEN_BYTES // _GROWTH) * _TOKEN_BYTES
        digest.update(data[at : at + step])
        at += step
        found.append(digest.digest())
    return found


class Router:
    """Remembers who got which beginnings. patience, slack: see :class:`slipstream.deploy.config.Front`. size: marks."""

    def __init__(self, patience: float = 2.0, slack: int = 4, size: int = 1 << 17) -> None:
        self._patience, self._slack, self._size = patience, slack, size
        self._holders: OrderedDict[bytes, list[str]] = OrderedDict()  # the last that got it is last
        self._last: dict[str, int] = {}  # replica -> the number of the choice that it last was
        self.hits = self.misses = 0

    def choose(self, chains: Mapping[str, int], prompt: Sequence[bytes]) -> str:
        """One of the replicas that ``chains`` (those in flight) names, the last word about where the prompt is."""
        idlest = min(chains, key=lambda name: (chains[name], self._last.get(name, -1)))  # in turn, where all are idle
        home = self._home(chains, prompt)
        if home is not None and chains[home] <= self._patience * chains[idlest] + self._slack:
            chosen, self.hits = home, self.hits + 1
        else:
            chosen, self.misses = idlest, self.misses + 1
        self._last[chosen] = self.hits + self.misses
        for mark in prompt:
            holders = self._holders.setdefault(mark, [])
            if chosen in holders:
                holders.remove(chosen)
            holders.append(chosen)
            del holders[:-_HOLDERS]
            self._holders.move_to_end(mark)
        while len(self._holders) > self._size:
            self._holders.popitem(last=False)
        return chosen

    def _home(self, chains: Mapping[str, int], prompt: Sequence[bytes]) -> str | None:
        for mark in reversed(prompt):
            known = [name for name in self._holders.get(mark, ()) if name in chains]
            if known:
                return min(known, key=lambda name: chains[name])
        return None

    def forget(self, name: str) -> None:
        """A replica's cache is gone."""
        self._last.pop(name, None)
        for holders in self._holders.values():
            if name in holders:
                holders.remove(name)
