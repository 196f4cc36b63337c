"""Keeps as many replicas as there should be, of what they should be. What it knows is in the cluster, by names, so that
one which is started anew, or with another configuration, goes on with what is there."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from slipstream.deploy.config import Deployment, Pool, Range

TICK_S, TELL_S, WORST_PAUSE_S = 0.5, 5.0, 60.0


@dataclass
class Seat:
    """A replica of a pool, ``deployment/pool/number/digest``. facts: what it says, None while it is not up; is_up,
    chains, down_s: as the entrance sees it. leaving_s, pause_until_s, restarted_s: moments."""

    name: str
    facts: dict[str, Any] | None = None
    is_up: bool = False
    chains: int = 0
    down_s: float = 0.0
    leaving_s: float | None = None
    failure: str | None = None
    failures: int = 0
    pause_until_s: float = 0.0
    restarted_s: float = -math.inf

    def __post_init__(self) -> None:
        _, pool, number, self.digest = self.name.split("/")
        self.short, self.number = f"{pool}/{number}", int(number)

    @property
    def state(self) -> str:
        if self.failure is not None:
            return f"failed, will be tried again: {self.failure}"
        up = "starting" if self.facts is None else "up" if self.is_up else "not answering"
        return up if self.leaving_s is None else "leaving"


@dataclass
class Need:
    """How many replicas a pool should have by its load (:class:`Range`)."""

    range: Range
    count: int
    _since: dict[bool, float] = field(default_factory=dict)

    def decide(self, chains: int, now_s: float) -> int:
        wanted = min(max(math.ceil(chains / self.range.chains), self.range.least), self.range.most)
        for is_more, patience in ((True, self.range.up_s), (False, self.range.down_s)):
            if wanted == self.count or (wanted > self.count) != is_more:
                self._since.pop(is_more, None)
            elif now_s - self._since.setdefault(is_more, now_s) >= patience:
                self.count = wanted if is_more else self.count - 1
                del self._since[is_more]
        return self.count


class Keeper:
    """cluster: see :class:`slipstream.deploy.cluster.RayCluster`. stamp: another one starts every replica anew, one
    after the other. clock: of the keeper; without one it has a thread, and goes by the time."""

    def __init__(self, config: Deployment, stamp: str, cluster: Any, clock: Callable[[], float] | None = None) -> None:
        self._config, self._stamp, self._cluster = config, stamp, cluster
        self._clock, self._lock = clock or time.monotonic, threading.Lock()
        self._digests = {name: pool.digest(stamp) for name, pool in config.pools.items()}
        self._seats: dict[str, list[Seat]] = {name: [] for name in config.pools}
        self._front: dict[str, Any] | None = None
        self._trouble: str | None = None  # of the entrance
        self._http = httpx.Client(timeout=TELL_S, trust_env=False)
        self._adopt()
        self._needs = {
            name: Need(pool.replicas, min(max(len(self._seats[name]), pool.replicas.least), pool.replicas.most))
            for name, pool in config.pools.items()
            if isinstance(pool.replicas, Range)
        }
        if clock is None:
            threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                self.tick()
                time.sleep(TICK_S)
        except Exception:  # noqa: BLE001 - a keeper that cannot go on is started anew by Ray
            traceback.print_exc()
            os._exit(1)

    def _adopt(self) -> None:
        names = self._cluster.names()
        for name in names:
            kind, *rest = name.split("/")[1:]
            if kind in self._seats and len(rest) == 2:
                self._seats[kind].append(Seat(name))
            elif kind != "keeper" and name != self._config.front_name and rest[-1] != "rank":
                self._cluster.remove(name)  # of a pool that is no more, or an entrance as it was
        if self._config.front_name not in names:
            self._cluster.start_entrance()

    def tick(self) -> None:
        """One look at everything."""
        with self._lock:
            for name, pool in self._config.pools.items():
                for seat in self._seats[name]:
                    self._look(seat, pool)
            self._tell()
            for name in self._config.pools:
                self._change(name, self._seats[name], self._wanted(name))

    def _wanted(self, pool: str) -> int:
        replicas = self._config.pools[pool].replicas
        return replicas if isinstance(replicas, int) else self._needs[pool].count

    def _look(self, seat: Seat, pool: Pool) -> None:
        now = self._clock()
        if seat.failure is not None:
            if now >= seat.pause_until_s:
                seat.failure = None
                self._cluster.start(seat.name, pool)
            return
        try:
            seat.facts = self._cluster.facts(seat.name)
        except RuntimeError as error:
            seat.facts, seat.failure, seat.failures = None, str(error), seat.failures + 1
            seat.pause_until_s = now + min(2.0**seat.failures, WORST_PAUSE_S)
            self._cluster.remove(seat.name)
            return
        if seat.facts is None or now - seat.restarted_s < self._config.start_s:
            return
        if seat.facts["rank"] != seat.facts["new_rank"] or seat.down_s > self._config.hung_s:
            seat.restarted_s, seat.facts = now, None
            self._cluster.restart(seat.name)

    def _change(self, pool: str, seats: list[Seat], wanted: int) -> None:
        """Who is missing is started. Who is beyond need leaves, and of those of another configuration one at a time,
        while all others are up; the entrance gives them nothing new, and they have ``drain_s`` for what they have."""
        now, digest = self._clock(), self._digests[pool]
        old = [seat for seat in seats if seat.digest != digest]
        if old and all(seat.is_up and seat.leaving_s is None for seat in seats if seat is not old[0]):
            old[0].leaving_s = old[0].leaving_s or now
        for seat in list(seats):
            if seat.number >= wanted:
                seat.leaving_s = seat.leaving_s or now
            waited = 0.0 if seat.leaving_s is None else now - seat.leaving_s
            if waited > 2 * TICK_S and (seat.chains == 0 or waited >= self._config.drain_s):
                self._cluster.remove(seat.name)
                seats.remove(seat)
        for number in set(range(wanted)) - {seat.number for seat in seats}:
            seats.append(Seat(f"{self._config.name}/{pool}/{number}/{digest}"))
            self._cluster.start(seats[-1].name, self._config.pools[pool])
        if pool in self._needs:
            self._needs[pool].decide(sum(seat.chains for seat in seats), now)

    def _tell(self) -> None:
        """Say who there is to the entrance, and hear what it sees of them."""
        try:
            self._front = self._cluster.facts(self._config.front_name)
        except RuntimeError as error:
            self._trouble, self._front = str(error), None
            self._cluster.remove(self._config.front_name)
            self._cluster.start_entrance()
        if self._front is None:
            return
        rows = [
            {"name": seat.short, "pool": pool, "url": f"http://{seat.facts['address']}", "key": seat.facts["key"],
             "is_leaving": seat.leaving_s is not None}
            for pool, seats in self._seats.items() for seat in seats if seat.facts is not None
        ]  # fmt: skip
        said = {"models": {pool.served: name for name, pool in self._config.pools.items()}, "replicas": rows}
        head = {"Authorization": f"Bearer {self._front['key']}"}
        try:
            seen = self._http.put(f"http://{self._front['address']}/fleet", json=said, headers=head).json()
            self._see(seen["replicas"])
            self._trouble = None
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self._trouble = f"does not answer ({type(error).__name__})"

    def _see(self, seen: Mapping[str, Any]) -> None:
        for seat in (seat for seats in self._seats.values() for seat in seats):
            view = seen.get(seat.short, {"up": False, "chains": 0, "down_s": 0.0})
            seat.is_up, seat.chains, seat.down_s = view["up"], view["chains"], view["down_s"]
            seat.failures = 0 if seat.is_up else seat.failures

    def status(self) -> dict[str, Any]:
        """What there is. key: one that the entrance takes, for whoever the cluster trusts."""
        with self._lock:
            pools: dict[str, Any] = {}
            for name, pool in self._config.pools.items():
                seats = sorted(self._seats[name], key=lambda seat: seat.number)
                rows = [
                    {"replica": seat.short, "state": seat.state, "chains": seat.chains, **(seat.facts or {}), "key": ""}
                    for seat in seats
                ]
                good = [s for s in seats if s.is_up and s.leaving_s is None and s.digest == self._digests[name]]
                is_ready = len(good) == len(seats) == self._wanted(name)
                pools[name] = {"model": pool.served, "source": pool.model, "ready": is_ready, "replicas": rows}
            front = self._front or {"address": None, "key": None}
            is_ready = front["address"] and self._trouble is None and all(pool["ready"] for pool in pools.values())
            return {"deployment": self._config.name, "entrance": front["address"] and f"http://{front['address']}",
                    "ready": bool(is_ready), "trouble": self._trouble, "stamp": self._stamp, "key": front["key"],
                    "pools": pools}  # fmt: skip
