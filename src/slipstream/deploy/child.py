"""``python -m slipstream.deploy.child``: an engine's server, a cache rank or the entrance, as JSON on stdin says.
It writes one line to stdout, where it listens, and ends with its parent however that went (Linux)."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from typing import Any

import uvicorn

from slipstream.asyncspade.rank_process import RankConfig, RankProcess
from slipstream.deploy.config import Front, as_dict
from slipstream.deploy.entrance import Entrance
from slipstream.llm import LLM
from slipstream.server import app
from slipstream.server.config import ServerConfig
from slipstream.server.logs import log_to_stderr

_SET_DEATH_SIGNAL = 1  # prctl(2)


def _end_with(parent: int) -> None:
    """SIGKILL when the thread that started us ends, even where we are stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")


def _secret(*lines: str) -> str:
    """A file that only this process has, and that is nowhere on a disk."""
    handle = os.memfd_create("keys", 0)
    os.write(handle, "\n".join(lines).encode())
    return f"/proc/self/fd/{handle}"


def _tell(host: str, port: int) -> None:
    print(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", flush=True)


def serve_engine(spec: dict[str, Any]) -> None:
    """model, name, engine, server, host, key; and rank: address and key of its cache rank, where it has one."""
    engine, rank = dict(spec["engine"]), spec["rank"]
    if rank:
        own = {"cache_rank": rank["address"], "rank_key": _secret(rank["key"])}
        engine["attention"] = as_dict(engine["attention"]) | own
    own = {"host": spec["host"], "port": 0, "served_model_name": spec["name"], "api_key_file": _secret(spec["key"])}
    config = ServerConfig(**spec["server"], **own)
    sock = app.bind(config)
    app.cap_caches()
    _tell(*sock.getsockname()[:2])
    app.serve(LLM(spec["model"], **engine), config, sock)


def serve_cache_rank(spec: dict[str, Any]) -> None:
    """host, port (where engines look for it again; another when that one is taken), device, kv_memory, key."""
    log_to_stderr(as_json=False)
    tell = logging.getLogger("slipstream.deploy").info
    own = {"device": spec["device"], "kv_memory": spec["kv_memory"], "key_file": _secret(spec["key"])}
    try:
        rank = RankProcess(RankConfig(f"{spec['host']}:{spec['port']}", **own), tell)
    except OSError:
        rank = RankProcess(RankConfig(f"{spec['host']}:0", **own), tell)
    print(rank.address, flush=True)
    rank.serve()


def serve_entrance(spec: dict[str, Any]) -> None:
    """front: fields of ``Front``; key: of the keeper, and of those whom it lets in beside the file's keys."""
    front = Front(**spec["front"])
    if front.api_key_file:
        with open(front.api_key_file, encoding="utf-8") as file:
            front = front.model_copy(update={"api_key_file": _secret(*file.read().split(), spec["key"])})
    sock = app.bind(ServerConfig(host=front.host, port=front.port, api_key_file=front.api_key_file))
    log_to_stderr(as_json=False)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every probe
    _tell(*sock.getsockname()[:2])
    settings = uvicorn.Config(
        Entrance(front, spec["key"]).app(), log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=spec["drain_s"],
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[sock])


KINDS = {"engine": serve_engine, "cache_rank": serve_cache_rank, "entrance": serve_entrance}

if __name__ == "__main__":
    told = json.load(sys.stdin)
    _end_with(told.pop("parent"))
    try:
        KINDS[told.pop("kind")](told)
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
