"""An entrance on a port, and replicas that do what a test says."""

import asyncio
import socket
import threading

import httpx
import uvicorn
from live_server import wait_until
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from slipstream.deploy.config import Front
from slipstream.deploy.entrance import Entrance

KEY = "the-keepers"


class Running:
    """An ASGI app on a port of its own, in a thread."""

    def __init__(self, app):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self._socket])), daemon=True
        )
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self):
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


class Scripted(Running):
    """A replica that answers completions with ``answer(request)``, and its health with ``health()``."""

    def __init__(self, answer):
        self.asked, self.answer, self.is_hung = [], answer, False

        async def completions(request):
            self.asked.append((await request.json(), dict(request.headers)))
            return await self.answer(request)

        async def health(request):
            while self.is_hung:
                await asyncio.sleep(0.02)
            return JSONResponse({"status": "ok"})

        routes = [Route(f"/v1/{kind}", completions, methods=["POST"]) for kind in ("completions", "chat/completions")]
        super().__init__(Starlette(routes=[*routes, Route("/health", health)]))


class Fronted(Running):
    """An entrance before named replicas (things with a ``url``) of the pool and model ``m``."""

    def __init__(self, replicas, key="theirs", **front):
        quick = {"wait_s": 20, "probe_s": 0.05, "probe_limit_s": 20, "silence_s": 20}  # a busy machine loses nobody
        self.entrance = Entrance(Front(**(quick | front)), KEY)
        super().__init__(self.entrance.app())
        self.key = key
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.tell(replicas)

    def tell(self, replicas, leaving=()):
        rows = [
            {"name": name, "pool": "m", "url": replica.url, "key": self.key, "is_leaving": name in leaving}
            for name, replica in replicas.items()
        ]
        said = {"models": {"m": "m"}, "replicas": rows}
        reply = self.http.put("/fleet", json=said, headers={"Authorization": f"Bearer {KEY}"})
        assert reply.status_code == 200, reply.text
        return reply.json()["replicas"]

    def all_up(self, count):
        wait_until(lambda: sum(replica.is_up for replica in self.entrance.fleet.replicas.values()) == count)

    def ask(self, path="/v1/completions", **body):
        return self.http.post(path, json={"model": "m", "prompt": "add"} | body)

    def at_rest(self):
        """Nothing in flight, nothing in the queue."""
        fleet = self.entrance.fleet
        wait_until(lambda: all(not r.flights and r.chains == 0 for r in fleet.replicas.values()))
        wait_until(lambda: self.entrance._gate.chains == 0)

    def close(self):
        self.http.close()
        super().close()
