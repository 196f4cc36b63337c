"""The replicas as the entrance knows them: who is up, who gets a request, and how an answer is lost and asked again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from slipstream.deploy.config import Front
from slipstream.deploy.routing import Router
from slipstream.server.errors import ApiError

T = TypeVar("T")
_IDLE_S = 3.0  # a kept connection is not used again after so long: the replica's server drops it after 5 s
_MISSES = 2  # probes without an answer in time until a replica is down; one that is refused is enough
# refusals of one replica that another may not share
AGAIN = {"shutting_down", "peer_lost", "engine_error", "engine_lost"}


class ReplicaLost(Exception):
    """An answer was broken off, or never began."""


@dataclass(eq=False)
class Replica:
    """One engine's server. key: what it wants to hear. chains: that it has of this entrance. rises: how often it came
    up. doubt: it is to be asked for its health now."""

    name: str
    pool: str
    url: str
    key: str
    chains: int = 0
    rises: int = 0
    is_up: bool = False
    is_leaving: bool = False
    down_since_s: float = field(default_factory=time.monotonic)
    flights: set[Flight] = field(default_factory=set)
    doubt: asyncio.Event = field(default_factory=asyncio.Event)
    watcher: asyncio.Task[None] | None = None


@dataclass(eq=False)
class Ask:
    """A request on its way. path, body: as they came. tried: who is not asked again, unless it comes up once more."""

    pool: str
    path: str
    body: bytes
    request_id: str
    marks: Sequence[bytes] = ()
    chains: int = 1
    tried: set[tuple[Replica, int]] = field(default_factory=set)
    losses: int = 0

    def is_new_to(self, replica: Replica) -> bool:
        return (replica, replica.rises) not in self.tried


class Flight:
    """A request at a replica. Every wait has a deadline, and :meth:`cut` ends the one that is on."""

    def __init__(self, replica: Replica, chains: int) -> None:
        self.replica, self._chains = replica, chains
        self.refusal: bytes | None = None  # the body, where it was read already
        self._response: httpx.Response | None = None
        self._leash: asyncio.Timeout | None = None
        replica.chains += chains
        replica.flights.add(self)

    @property
    def response(self) -> httpx.Response:
        assert self._response is not None, "it was not sent"
        return self._response

    async def send(self, client: httpx.AsyncClient, request: httpx.Request, limit_s: float) -> None:
        """Until the answer's head is there."""
        self._response = await self._within(limit_s, client.send(request, stream=True))
        self._chunks = self._response.aiter_raw()

    async def read(self, limit_s: float) -> bytes | None:
        """What came next; None at the end."""
        return await self._within(limit_s, anext(self._chunks, None))

    async def rest(self, limit_s: float) -> bytes:
        """All of it."""
        if self.refusal is not None:
            return self.refusal
        until, parts = time.monotonic() + limit_s, []
        while (part := await self.read(until - time.monotonic())) is not None:
            parts.append(part)
        return b"".join(parts)

    async def _within(self, limit_s: float, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(limit_s) as self._leash:
                return await work
        except TimeoutError as error:
            raise ReplicaLost(f"{self.replica.name} fell silent") from error
        except httpx.TransportError as error:
            raise ReplicaLost(f"{self.replica.name} broke off ({type(error).__name__})") from error
        finally:
            self._leash = None

    def cut(self) -> None:
        if self._leash is not None:
            self._leash.reschedule(0)
            self._leash = None

    async def close(self) -> None:
        """Give its place back; a replica that is not done with it is left, and stops."""
        self.replica.chains -= self._chains
        self.replica.flights.discard(self)
        if self._response is not None:
            await self._response.aclose()


class Fleet:
    """Belongs to one event loop. :meth:`update` says who there is; everything else it finds out."""

    def __init__(self, config: Front) -> None:
        self._config = config
        self.router = Router(config.patience, config.slack)
        self.models: dict[str, str] = {}  # what clients say -> pool
        self.replicas: dict[str, Replica] = {}
        self.lost = self.again = 0
        self._changed = asyncio.Event()
        limits = httpx.Limits(max_keepalive_connections=1024, keepalive_expiry=_IDLE_S)
        timeout = httpx.Timeout(None, connect=config.probe_limit_s, write=config.silence_s)
        self.client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    # -- who there is

    def update(self, models: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        """models: name to pool. rows: name, pool, url, key, is_leaving (gets nothing new) of each replica."""
        self.models = dict(models)
        rest = dict(self.replicas)
        for row in rows:
            known = rest.pop(row["name"], None)
            if known is not None and known.url == row["url"]:
                known.is_leaving = row["is_leaving"]
                continue
            if known is not None:
                self._drop(known)
            replica = self.replicas[row["name"]] = Replica(row["name"], row["pool"], row["url"], row["key"])
            replica.is_leaving = row["is_leaving"]
            replica.watcher = asyncio.create_task(self._watch(replica))
        for replica in rest.values():
            self._drop(replica)
        self._tell()

    def _drop(self, replica: Replica) -> None:
        assert replica.watcher is not None
        replica.watcher.cancel()
        del self.replicas[replica.name]
        self.router.forget(replica.name)
        self._down(replica)

    @staticmethod
    def _set_down(replica: Replica) -> None:
        if replica.is_up:
            replica.is_up, replica.down_since_s = False, time.monotonic()

    def _down(self, replica: Replica) -> None:
        self._set_down(replica)
        for flight in replica.flights:
            flight.cut()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self, replica: Replica) -> None:
        misses = 0
        while True:
            replica.doubt.clear()
            fault = await self._fault(replica)
            misses = 0 if fault is None else misses + (1 if fault == "late" else _MISSES)
            if fault is None and not replica.is_up:
                replica.is_up, replica.rises = True, replica.rises + 1
                self._tell()
            if misses >= _MISSES:
                self._down(replica)
            try:
                async with asyncio.timeout(self._config.probe_s):
                    await replica.doubt.wait()
            except TimeoutError:
                continue

    async def _fault(self, replica: Replica) -> str | None:
        try:
            async with asyncio.timeout(self._config.probe_limit_s):
                answer = await self.client.get(replica.url + "/health")
        except (TimeoutError, httpx.TimeoutException):
            return "late"
        except httpx.TransportError:
            return "gone"
        return None if answer.status_code == 200 else "ill"

    async def close(self) -> None:
        self.update({}, [])
        await self.client.aclose()

    # -- requests

    def up(self, pool: str) -> dict[str, Replica]:
        return {r.name: r for r in self.replicas.values() if r.pool == pool and r.is_up and not r.is_leaving}

    async def _pick(self, ask: Ask) -> Replica:
        """Who gets it next; waits for somebody that has not lost it. ``ApiError`` when nobody comes."""
        until = time.monotonic() + self._config.wait_s
        while True:
            chains = {name: r.chains for name, r in self.up(ask.pool).items() if ask.is_new_to(r)}
            if chains:
                return self.replicas[self.router.choose(chains, ask.marks)]
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                raise ApiError(
                    503, f"no replica of {ask.pool} has come up within {self._config.wait_s:g} s: try again later",
                    code="no_replica", headers={"Retry-After": "5"},
                ) from None  # fmt: skip

    async def begin(self, ask: Ask) -> Flight:
        """A replica's answer, its head received; the caller closes it. ``ApiError`` when nobody gives one."""
        while True:
            flight, is_kept = Flight(await self._pick(ask), ask.chains), False
            try:
                await flight.send(self.client, self._request(ask, flight.replica), self._config.answer_s)
                is_kept = flight.response.status_code not in (500, 503) or await self._is_last_word(ask, flight)
                if is_kept:
                    return flight
            except ReplicaLost as error:
                self.note_loss(ask, flight.replica, error)
            finally:
                if not is_kept:
                    await flight.close()

    def _request(self, ask: Ask, replica: Replica) -> httpx.Request:
        head = {"Content-Type": "application/json", "X-Request-Id": ask.request_id}
        head["Authorization"] = f"Bearer {replica.key}"
        return self.client.build_request("POST", replica.url + ask.path, content=ask.body, headers=head)

    async def _is_last_word(self, ask: Ask, flight: Flight) -> bool:
        """Whether a refusal is the client's to hear. Others are asked first where they may know better."""
        flight.refusal = await flight.rest(self._config.probe_limit_s)
        code = code_of(flight.refusal)
        if code in AGAIN:
            raise ReplicaLost(f"{flight.replica.name} gave up ({code})")
        ask.tried.add((flight.replica, flight.replica.rises))
        return code != "queue_full" or not any(map(ask.is_new_to, self.up(ask.pool).values()))

    def note_loss(self, ask: Ask, replica: Replica, error: ReplicaLost) -> None:
        """The request is to be sent again. ``ApiError`` when that was often enough."""
        ask.tried.add((replica, replica.rises))
        ask.losses += 1
        self.doubt(replica)
        if ask.losses > self._config.retries:
            raise ApiError(503, f"{error}, and {ask.losses - 1} tries before: try again later", code="replica_lost")
        self.again += 1

    def doubt(self, replica: Replica) -> None:
        """It has lost an answer: it is down until it says that it is well."""
        self.lost += 1
        self._set_down(replica)
        replica.doubt.set()


def code_of(body: bytes) -> str | None:
    """Of an error in OpenAI's format, as a whole body or as an event."""
    try:
        code = json.loads(body.removeprefix(b"data: "))["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None
