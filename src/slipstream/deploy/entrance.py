"""One OpenAI-compatible address before all replicas. Answers pass as the bytes that replicas send, in their bundles."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Send

from slipstream.deploy.config import Front
from slipstream.deploy.fleet import AGAIN, Ask, Fleet, Flight, Replica, ReplicaLost, code_of
from slipstream.deploy.routing import marks
from slipstream.server.app import live_page
from slipstream.server.config import ServerConfig
from slipstream.server.door import Door, Gate
from slipstream.server.errors import ApiError, on_http_error
from slipstream.server.streaming import DONE, EventStream, unless_gone

_KEPT = ("content-type", "retry-after")  # headers of a replica's answer that its client gets
_ASIDE_S = 5.0  # for a replica's metrics, statistics or card


class Relayed(EventStream):
    """A replica's events, with its end; where it has none, ours."""

    async def _end(self, send: Send, last: bytes) -> None:
        await send({"type": "http.response.body", "body": last and last + DONE, "more_body": False})


class Counts:
    """The entrance's own numbers; ``http`` is what the door counts with."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self.registry = fleet, CollectorRegistry()
        self.http = Counter(
            "slipstream_entrance_http_requests", "By status.", ["route", "status"], registry=self.registry
        )
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterable[Metric]:
        fleet, router = self._fleet, self._fleet.router
        for name, value in {"prefix_hits": router.hits, "prefix_misses": router.misses, "lost": fleet.lost,
                            "sent_again": fleet.again}.items():  # fmt: skip
            yield GaugeMetricFamily(f"slipstream_entrance_{name}", "Requests so far.", value=value)
        for name, figure in (("up", "is_up"), ("chains", "chains")):
            family = GaugeMetricFamily(f"slipstream_replica_{name}", "As the entrance sees it.", labels=["replica"])
            for replica in fleet.replicas.values():
                family.add_metric([replica.name], float(getattr(replica, figure)))
            yield family


class Entrance:
    """key: of whoever may say which replicas there are (``PUT /fleet``)."""

    def __init__(self, config: Front, key: str) -> None:
        self.config, self.fleet = config, Fleet(config)
        self._server = ServerConfig(
            host=config.host, port=config.port, api_key_file=config.api_key_file, max_queue=config.max_queue
        )
        self._gate, self._counts = Gate(self._server), Counts(self.fleet)
        self._word = f"Bearer {key}".encode()

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.fleet.close()

        page, headers = live_page()

        async def live(_: Request) -> Response:
            return HTMLResponse(page, headers=headers)

        routes = [
            Route(path, self.generate, methods=["POST"])
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
        ]
        routes += [
            Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.models), Route("/", live),
            Route("/health", self.health), Route("/ready", self.ready), Route("/stats", self.stats),
            Route("/metrics", self.metrics), Route("/fleet", self.update, methods=["PUT"]),
        ]  # fmt: skip
        door = Middleware(Door, config=self._server, gate=self._gate, metrics=self._counts)  # type: ignore[arg-type]
        handlers: Any = {HTTPException: on_http_error}
        return Starlette(routes=routes, middleware=[door], exception_handlers=handlers, lifespan=lifespan)

    # -- answers

    async def generate(self, http: Request) -> Response:
        body = await http.body()
        try:
            given = json.loads(body)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error
        if not isinstance(given, dict) or not http.headers.get("content-type", "").startswith("application/json"):
            raise ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
        ask = self._ask(http, body, given)
        self._gate.hold(http.scope["slipstream.call"], ask.chains, 0)
        if given.get("stream") is not True or not http.url.path.startswith("/v1/"):
            return await unless_gone(http.receive, self._whole(ask))
        flight = await unless_gone(http.receive, self.fleet.begin(ask))
        if flight.response.status_code != 200:
            return await unless_gone(http.receive, self._whole(ask, flight))
        return Relayed(self._events(ask, flight), self._server)

    def _ask(self, http: Request, body: bytes, given: dict[str, Any]) -> Ask:
        pool = self._pool(given.get("model"))
        prompt = given.get("prompt", given.get("messages"))
        several = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
        n = given.get("n")
        chains = several * n if type(n) is int and n > 0 else several
        found = marks(prompt, f"{pool} {given.get('cache_salt')}") if http.url.path.startswith("/v1/") else []
        call = http.scope["slipstream.call"]
        return Ask(pool, http.url.path, body, call.request_id, found, min(chains, self.config.max_queue))

    def _pool(self, model: Any) -> str:
        models = self.fleet.models
        if model is None and models:
            return next(iter(models.values()))
        if not isinstance(model, str) or model not in models:
            known = ", ".join(map(repr, models)) or "none yet"
            raise ApiError(
                404, f"The model {model!r} does not exist; there is {known}", code="model_not_found", param="model"
            )
        return models[model]

    async def _whole(self, ask: Ask, flight: Flight | None = None) -> Response:
        """An answer, or a refusal, that is read to its end before any of it is passed on."""
        while True:
            flight = flight or await self.fleet.begin(ask)
            try:
                body = await flight.rest(self.config.answer_s)
                break
            except ReplicaLost as error:
                self.fleet.note_loss(ask, flight.replica, error)
            finally:
                await flight.close()
            flight = None
        head = {name: flight.response.headers[name] for name in _KEPT if name in flight.response.headers}
        return Response(body, flight.response.status_code, head | {"X-Slipstream-Replica": flight.replica.name})

    async def _events(self, ask: Ask, flight: Flight) -> AsyncGenerator[bytes, None]:
        """Until something that says more than how an answer begins has been passed on, the request can be lost and
        asked again without its client's knowledge."""
        while True:
            held: bytes | None = b""  # None: something was passed on
            try:
                while (chunk := await flight.read(self.config.silence_s)) is not None:
                    if held is not None and not chunk.startswith(b":"):
                        if code_of(chunk.partition(b"\n\n")[0]) in AGAIN:
                            raise ReplicaLost(f"{flight.replica.name} gave up")
                        held += chunk
                        if _is_opening(held):
                            continue
                        chunk, held = held, None
                    yield chunk
                if held:
                    yield held
                return
            except ReplicaLost as error:
                if held is None:
                    self.fleet.doubt(flight.replica)
                    raise ApiError(503, f"{error} in mid-answer: ask again", code="replica_lost") from None
                self.fleet.note_loss(ask, flight.replica, error)
            finally:
                await flight.close()
            flight = await self.fleet.begin(ask)
            if flight.response.status_code != 200:
                refusal = await self._whole(ask, flight)
                yield b"data: " + bytes(refusal.body) + b"\n\n" + DONE
                return

    # -- state

    async def update(self, http: Request) -> Response:
        """Who there is, from the keeper; back goes what the entrance sees of them."""
        if not hmac.compare_digest(http.headers.get("authorization", "").encode(), self._word):
            raise ApiError(403, "this is for the deployment's keeper")
        said = await http.json()
        self.fleet.update(said["models"], said["replicas"])
        return JSONResponse({"replicas": self._seen(), "queued_chains": self._gate.chains})

    def _seen(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            r.name: {"up": r.is_up, "chains": r.chains, "down_s": 0.0 if r.is_up else now - r.down_since_s}
            for r in self.fleet.replicas.values()
        }

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        pools = set(self.fleet.models.values())
        if missing := sorted(pool for pool in pools if not self.fleet.up(pool)) or not pools:
            raise ApiError(503, f"no replica is up of: {missing}", code="no_replica", headers={"Retry-After": "5"})
        return JSONResponse({"status": "ready"})

    async def _each(self, path: str, replicas: Iterable[Replica]) -> list[tuple[Replica, bytes]]:
        """What replicas that are up and answer in time say to GET."""

        async def one(replica: Replica) -> tuple[Replica, bytes] | None:
            flight, head = Flight(replica, 0), {"Authorization": f"Bearer {replica.key}"}
            try:
                request = self.fleet.client.build_request("GET", replica.url + path, headers=head)
                await flight.send(self.fleet.client, request, _ASIDE_S)
                body = await flight.rest(_ASIDE_S)
                return (replica, body) if flight.response.status_code == 200 else None
            except ReplicaLost:
                return None
            finally:
                await flight.close()

        said = await asyncio.gather(*[one(replica) for replica in replicas if replica.is_up])
        return [found for found in said if found is not None]

    async def models(self, http: Request) -> Response:
        """One card per pool that is up."""
        name = http.path_params.get("name")
        pools = list(self.fleet.models.values()) if name is None else [self._pool(name)]
        first = [replica for pool in pools for replica in list(self.fleet.up(pool).values())[:1]]
        cards = [card for _, body in await self._each("/v1/models", first) for card in json.loads(body)["data"]]
        if name is None:
            return JSONResponse({"object": "list", "data": cards})
        if not cards:
            raise ApiError(503, f"no replica of {name!r} is up", code="no_replica", headers={"Retry-After": "5"})
        return JSONResponse(cards[0])

    async def stats(self, http: Request) -> Response:
        """Of the replica that is asked for, else of the first that is up, in a replica's words; and who there is."""
        wanted = http.query_params.get("replica")
        names = [name for name, replica in self.fleet.replicas.items() if replica.is_up]
        said = await self._each("/stats", [self.fleet.replicas[n] for n in names if wanted in (None, n)][:1])
        if not said:
            raise ApiError(503, f"no such replica is up: {wanted or 'any'}", code="no_replica")
        replica, body = said[0]
        return JSONResponse(json.loads(body) | {"replica": replica.name, "replicas": names})

    async def metrics(self, _: Request) -> Response:
        """Every replica's, labelled, and our own."""
        said = await self._each("/metrics", self.fleet.replicas.values())
        text = merged({replica.name: body.decode() for replica, body in said})
        return Response(text.encode() + generate_latest(self._counts.registry), media_type=CONTENT_TYPE_LATEST)


def _is_opening(events: bytes) -> bool:
    """Whether these events (whole or not yet) only say that a chat's answer begins."""
    return not events.endswith(b"\n\n") or events.count(b"data: ") == events.count(b'"delta":{"role":"assistant"')


_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (.+)")


def merged(texts: dict[str, str]) -> str:
    """Several metrics pages as one: every sample with its replica's label, each family's samples together."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for name, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                heads = families.setdefault(family, ([], []))[0]
                heads += [line] if line not in heads else []
            elif found := _SAMPLE.fullmatch(line):
                labels = f'replica="{name}"' + (f",{found[2]}" if found[2] else "")
                families.setdefault(family, ([], []))[1].append(f"{found[1]}{{{labels}}} {found[3]}")
    return "".join(f"{line}\n" for heads, samples in families.values() for line in (*heads, *samples))
