"""A live server for tests: uvicorn on a loopback port, in a thread."""

import asyncio
import json
import socket
import threading
import time

import httpx

from slipstream.server.app import bind, make_server
from slipstream.server.config import ServerConfig

LONG = {"prompt": "add", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


class Live:
    """A running server and ways to talk to it."""

    def __init__(self, llm, scale=None, **config):
        self.llm = llm
        self.config = ServerConfig(port=0, **config)
        self._socket = bind(self.config)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(llm, self.config, scale)
        self.service = self.server.config.app.state.service
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self._socket])), daemon=True
        )
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, path, /, **body):
        return self.http.post(path, json=body)

    def completions(self, **body):
        reply = self.post("/v1/completions", **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def chat(self, text="hello", **body):
        reply = self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def events(self, path, **body):
        """The payloads of a stream, which has to end with [DONE]."""
        reply = self.post(path, stream=True, **body)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
        blocks = reply.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2] if not block.startswith(":")]

    def error(self, path, status, **body):
        """The error of a request that has to be refused, in OpenAI's format."""
        return self.refused(self.post(path, **body), status)

    @staticmethod
    def refused(reply, status):
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    def raw(self, data=b""):
        """A bare connection, with ``data`` sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection

    def request_bytes(self, path, body, length=None):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data

    def at_rest(self):
        """Nothing runs, waits, holds a page or a place in the queue; and all of it soon."""
        stats = self.llm.stats

        def resting():
            now = stats()
            return (now["running"], now["waiting"], now["pages_used"], self.service.gate.chains) == (0, 0, 0, 0)

        wait_until(resting)
        assert self.service.gate.tokens == 0 and not self.service.engine._listeners
        self.llm.engine.table.check_integrity()


def wait_until(true, seconds=15):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
