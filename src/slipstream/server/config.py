"""What can be set about the server: where it listens, who may ask, and how much of anything it takes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from slipstream.types import options


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@options
@dataclass(frozen=True)
class ServerConfig:
    """Limits of the door; the engine has its own (``n <= max_num_seqs``, logprobs <= 20, the model's length)."""

    host: str = _option("127.0.0.1", "address to listen on; others than this machine reach it only if asked to")
    port: int = _option(8000, "port; 0 takes a free one")
    served_model_name: str | None = _option(None, "the model's name to clients; default: as it was loaded")
    api_key_file: str | None = _option(None, "file of keys, one a line; every route but /health then asks for one")
    log_json: bool = _option(False, "log lines are JSON objects")
    max_queue: int = _option(2048, "most chains that run or wait; beyond, clients get 503 and when to come again")
    max_queue_tokens: int = _option(2**24, "most prompt tokens, times chains, that run or wait")
    max_prompts: int = _option(1024, "most prompts in one request")
    max_n: int = _option(128, "most chains per prompt")
    max_stop: int = _option(4, "most stop strings")
    max_stop_chars: int = _option(256, "longest stop string in characters")
    max_logprobs: int = _option(20, "most alternatives per token")
    max_body_bytes: int = _option(32 * 2**20, "longest request body in bytes")
    body_timeout_s: float = _option(30.0, "a request body that takes longer to arrive is refused")
    keep_alive_s: float = _option(15.0, "a stream that is silent for so long gets a comment")
    stall_timeout_s: float = _option(60.0, "a client that does not read its stream for so long is cut off")
    stream_rate: int = _option(300, "chunks per second of all streams; beyond, a chunk holds several tokens")
    drain_s: int = _option(30, "after SIGTERM, running requests have so long to end")

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            kind: Any = {"int": int, "float": (int, float), "bool": bool}.get(str(option.type))
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"{option.name} must be of type {option.type}, got {value!r}")
            if option.type == "int" and option.name not in ("port", "drain_s") and value < 1:
                raise ValueError(f"{option.name} must be at least 1, got {value}")
            if option.type == "float" and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{option.name} must be a positive number of seconds, got {value}")
        if not self.host:
            raise ValueError("host is empty, which would be every address of this machine: say 0.0.0.0 if you mean it")
        if not 0 <= self.port <= 65535 or self.drain_s < 0:
            raise ValueError(f"port must be in 0..65535 and drain_s >= 0, got {self.port} and {self.drain_s}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Keys:
    """API keys of a file. Every comparison takes as long as every other: digests, and all of them."""

    def __init__(self, path: str) -> None:
        lines = Path(path).read_text(encoding="utf-8").split()
        if not lines:
            raise ValueError(f"{path} holds no API key: write one on a line")
        self._digests = [hashlib.sha256(line.encode()).digest() for line in lines]

    def accept(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return sum(hmac.compare_digest(digest, own) for own in self._digests) > 0
