"""What the cache rank is told in a step, and what it has answered: the bookkeeping of the inference rank, on the host.

Each chain is known by its seat and an epoch, a number that no other chain ever had. The rank must have every token of a
chain before it selects among them; so each step tells it the tokens that it lacks, whatever the reason: a prompt's
chunk, a prefix that came from the cache, everything after a connection was lost. In the common case that is one token
of each request, and those travel in one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.asyncspade.hello import CHUNK
from slipstream.asyncspade.protocol import Kind, Message
from slipstream.asyncspade.rank_link import RankLink
from slipstream.types import Batch

_REMEMBERED = 64  # steps; far more than a set may be late
Tokens = Callable[[int, int, int, int], tuple[Tensor, Tensor]]
"""(layer, request of the batch, first, last) -> its keys and values at these positions, each [last - first, Hk, D]."""
Newest = Callable[[int, "Tensor | None"], tuple[Tensor, Tensor]]
"""(layer, rows of the step or None for all) -> keys and values of the tokens in these rows, each [n, Hk, D]."""


class Place(NamedTuple):
    """Whose set is in a message: seat, epoch, length that it is for, row of the message."""

    seat: int
    epoch: int
    length: int
    row: int = 0


class _Told(NamedTuple):
    """What one request of the step tells: tokens first .. last, its queries from row ``query`` on."""

    b: int
    seat: int
    epoch: int
    first: int
    last: int
    query: slice
    wants: bool


class Feed:
    """Tells one cache rank what happens, and sorts what it answers. All by seat; the batch is that of :meth:`plan`."""

    def __init__(self, link: RankLink) -> None:
        config, spec = link.hello.config, link.hello.spec
        self.link, self._window, self._sends_values = link, config.window, config.transfer != "indices"
        self._num_layers, self._first_layer = spec.num_layers, config.dense_layers
        self._kept, self._num_kv = config.inner(config.spare).budget, spec.num_kv_heads
        self._session, self._step, self._next_epoch = 0, 0, 1
        self.epochs: dict[int, int] = {}
        self._stored: dict[int, int] = {}  # tokens that the rank has of a seat's chain, after the step at hand
        self._asked: dict[int, tuple[int, int, int]] = {}  # seat -> epoch, and for which lengths there are to be sets
        self._dropped: set[int] = set()  # epochs that the rank has no room for
        self._twins: dict[tuple[int, int, int], tuple[int, list[Place]]] = {}  # who gets copies of whose set, and since
        self._inbox: dict[int, list[Message]] = defaultdict(list)  # by layer
        self._alone: list[_Told] = []
        self._together: list[_Told] = []
        self._forks: list[list[int]] = []

    # -- once per step

    def plan(self, batch: Batch) -> None:
        """Who is told of what in this step. The link was polled."""
        self._step += 1
        closed = [[seat, self.epochs[seat]] for seat in batch.seated if seat in self.epochs]
        for seat in batch.seated:
            self.epochs[seat], self._next_epoch = self._next_epoch, self._next_epoch + 1
            self._forget(seat)
        if self.link.session != self._session:
            self._session = self.link.session
            for seat in self.epochs:
                self._forget(seat)
                self.epochs[seat], self._next_epoch = self._next_epoch, self._next_epoch + 1
            self._dropped.clear()
            self._inbox.clear()
        elif closed:
            self.link.send(Kind.CLOSE, (torch.tensor(closed),), self._step)
        self._alone, self._together, self._forks = [], [], []
        self._twins = {key: twins for key, twins in self._twins.items() if twins[0] + _REMEMBERED >= self._step}
        if self.link.is_up:
            self._plan_rows(batch)

    def _forget(self, seat: int) -> None:
        self._stored[seat] = 0
        self._asked.pop(seat, None)

    def _plan_rows(self, batch: Batch) -> None:
        seats, starts = batch.seats.tolist(), batch.query_start_host
        heirs = defaultdict(list)
        for b, heir in batch.heirs:
            heirs[b].append(heir)
        for b, (seat, length) in enumerate(zip(seats, batch.lengths_host, strict=True)):
            if seat == 0 or self.epochs[seat] in self._dropped:
                continue
            epoch, first = self.epochs[seat], self._stored[seat]
            query = slice(max(starts[b], starts[b + 1] - self._window), starts[b + 1])
            wants = b < batch.num_decodes or bool(heirs[b])
            told = _Told(b, seat, epoch, first, length, query, wants)
            (self._together if first == length - 1 and b < batch.num_decodes else self._alone).append(told)
            self._stored[seat] = length
            if wants:
                self._ask(seat, epoch, length + 1)
            others = [heir for heir in heirs[b] if heir != seat]
            if others:
                twins = [Place(other, self.epochs[other], length + 1) for other in others]
                self._twins[seat, epoch, length + 1] = self._step, twins
                self._forks += [[seat, epoch, other, self.epochs[other]] for other in others]
                for other in others:
                    self._stored[other] = length
                    self._ask(other, self.epochs[other], length + 1)
        self._rows = torch.tensor([[told.seat, told.epoch, told.last] for told in self._together])
        everyone = len(self._together) == batch.num_requests
        self._picked = None if everyone else torch.tensor([told.query.start for told in self._together])

    def _ask(self, seat: int, epoch: int, length: int) -> None:
        first = self._asked[seat][1] if seat in self._asked else length
        self._asked[seat] = epoch, first, length

    # -- once per layer

    def tell(self, layer: int, q: Tensor, newest: Newest, tokens: Tokens) -> None:
        """The step's keys and values are stored in this layer. q: [T, Hq, D] of the whole step."""
        if not self.is_current:
            return
        for told in self._alone:
            for first in range(told.first, told.last, CHUNK):
                last = min(told.last, first + CHUNK)
                k, v = tokens(layer, told.b, first, last)
                ends = last == told.last
                row = torch.tensor([told.seat, told.epoch, first, int(ends and told.wants)])
                queries = q[told.query] if ends else q[:0]
                self.link.send(Kind.PROMPT, (row, k, v if self._sends_values else v[:0], queries), self._step, layer)
        if self._together:
            k, v = newest(layer, self._picked)
            q = q if self._picked is None else q[self._picked]
            self.link.send(Kind.STEP, (self._rows, q, k, v if self._sends_values else v[:0]), self._step, layer)

    @property
    def is_current(self) -> bool:
        """Whether the rank is up, and knows what it was told of this step."""
        return self.link.is_up and self.link.session == self._session

    def finish(self) -> None:
        """The step is over: seats that go on from others do so now."""
        if self._forks and self.is_current:
            self.link.send(Kind.FORK, (torch.tensor(self._forks),), self._step)
        self._forks = []

    # -- answers

    def is_coming(self, seat: int, length: int) -> bool:
        """Whether a set for this length is on its way."""
        if not self.is_current or seat not in self._asked:
            return False
        epoch, first, last = self._asked[seat]
        return first <= length <= last and epoch not in self._dropped

    def wait(self, timeout_s: float) -> bool:
        """Sort what has come; if that is nothing, wait for it. False when nothing came in time."""
        message = self.link.receive(timeout_s)
        came = message is not None
        while message is not None:
            self._sort(message)
            message = self.link.receive(0.0)
        return came

    def take(self, layer: int) -> list[tuple[Message, list[Place]]]:
        """The sets for this layer that have come, oldest first, each with whose they are; each is handed out once.

        What is of an epoch that is over is left out; what a step that is not over has asked for stays for the next.
        """
        waiting = self._inbox[layer]
        if not waiting:
            return []
        found = [message for message in waiting if message.step <= self._step]
        self._inbox[layer] = [message for message in waiting if message.step > self._step]
        return [(message, places) for message in found if (places := self._places(message))]

    def _sort(self, message: Message) -> None:
        if message.kind == Kind.DROP:
            self._dropped.update(epoch for _, epoch in message.tensors[0].tolist())
        elif not self._first_layer <= message.layer < self._num_layers or not self._is_sound(message):
            self.link.lose(f"it sent a {message.kind.name} for layer {message.layer} that cannot be")
        else:
            self._inbox[message.layer].append(message)

    def _places(self, message: Message) -> list[Place]:
        places = []
        for row, (seat, epoch, length) in enumerate(message.tensors[0].tolist()):
            twins = self._twins.get((seat, epoch, length), (0, []))[1]
            for place in (Place(seat, epoch, length), *twins):
                epoch, first, last = self._asked.get(place.seat, (0, 0, 0))
                if epoch == place.epoch and first <= length <= last:
                    places.append(place._replace(row=row))
                else:
                    self.link.counts["strays"] += 1
        return places

    def _is_sound(self, message: Message) -> bool:
        """Whether what indexes something is in its range: a rank that goes wrong costs its sets, and nothing else."""
        rows = message.tensors[0]
        if message.kind == Kind.SETS:
            _, indices, counts = message.tensors
            is_token = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
            last = rows[:, 2].view(-1, 1, 1) - 1
            sound = ((indices >= 0) & (indices < last) | ~is_token).all()
        else:
            _, counts, sizes, places, *_ = message.tensors
            sound = (sizes >= 0).all() & (sizes.sum() == len(places))
            sound &= ((places >= 0) & (places < self._kept * self._num_kv)).all()
        return bool(sound & ((counts >= 1) & (counts <= self._kept)).all())
