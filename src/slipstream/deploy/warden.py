"""The Ray actor around one process of ours. Workers get it by value and import nothing else of this package."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

import httpx

POLL_S, KILL_S, MOST_WORDS = 0.1, 5.0, 12


class Warden:
    """Starts a process of :mod:`slipstream.deploy.child` and waits until it serves; ends when that ends, and Ray
    starts both again.

    spec: kind, and what its kind takes; a key is made where none is given. rank: the actor of its cache rank.
    ``RuntimeError``, with the process's last words, when it is not ready after ``start_s``.
    """

    def __init__(self, spec: dict[str, Any], start_s: float, rank: str | None = None) -> None:
        import ray

        until, node = time.monotonic() + start_s, ray.get_runtime_context().get_node_id()
        self._facts: dict[str, Any] = {"key": spec.get("key") or secrets.token_hex(16), "node": node, "rank": None}
        self._spec: dict[str, Any] = {
            "host": ray.util.get_node_ip_address(),
            **spec,
            "key": self._facts["key"],
            "parent": os.getpid(),
        }
        self._spec["rank"] = self._meet(rank, until) if rank else None
        self._said: deque[str] = deque(maxlen=MOST_WORDS)
        self._is_watched = False  # whether its end is ours
        # the kernel ends a process with the thread that started it: one that lives as long as the process
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self._serves():
            if not self._thread.is_alive() or time.monotonic() > until:
                self.stop(0)
                raise RuntimeError("; ".join(["it did not come up", *self._said]))
            time.sleep(POLL_S)
        self._is_watched = True

    def _meet(self, rank: str, until_s: float) -> dict[str, Any]:
        """Where the cache rank is; waits for it."""
        import ray

        while True:
            try:
                left = max(POLL_S, until_s - time.monotonic())
                found: dict[str, Any] = ray.get(ray.get_actor(rank).where.remote(), timeout=left)
                self._facts["rank"] = found["address"]
                return found
            except (ray.exceptions.ActorUnavailableError, ValueError):
                if time.monotonic() > until_s:
                    raise
                time.sleep(POLL_S)

    def _run(self) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "slipstream.deploy.child"]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as self._process:
            assert self._process.stdin and self._process.stdout and self._process.stderr
            self._facts["pid"] = self._process.pid
            threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
            try:
                with self._process.stdin as stdin:
                    json.dump(self._spec, stdin)
            except BrokenPipeError:
                self._said.append("it ended at once")
            for line in self._process.stderr:
                self._said.append(line.rstrip())
                sys.stderr.write(line)
        if self._is_watched:
            os._exit(1)

    def _listen(self, stdout: Any) -> None:
        for line in stdout:
            self._facts.setdefault("address", line.strip())

    def _serves(self) -> bool:
        address = self._facts.get("address")
        if address is None or self._spec["kind"] == "cache_rank":
            return address is not None  # a cache rank answers those who have its key, one at a time
        try:
            return httpx.get(f"http://{address}/health", timeout=1.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def where(self) -> dict[str, Any]:
        """address, key, node, pid; rank: the address of its cache rank."""
        return self._facts

    def stop(self, drain_s: float) -> None:
        """Let what runs end; kill what is left."""
        self._is_watched = False
        if "pid" in self._facts:
            self._process.send_signal(signal.SIGTERM)
            self._thread.join(drain_s + KILL_S * (drain_s > 0))
            self._process.kill()
            self._thread.join(KILL_S)
