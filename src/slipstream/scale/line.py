"""Messages between rank 0 and another rank over a socket pair: a length, then JSON once and int64 afterwards."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np

READY = "ready"  # what a rank says when it has loaded; all else that it says is why it failed
_LENGTH_BYTES = 8


class Kind(IntEnum):
    """What the first number of a message says; STEP is followed by a plan."""

    STEP = 0
    WARMUP = 1
    CLOSE = 2


def send_text(sock: socket.socket, value: Any) -> None:
    _send(sock, json.dumps(value).encode())


def send_numbers(sock: socket.socket, numbers: Sequence[int]) -> None:
    _send(sock, np.asarray(numbers, dtype=np.int64).tobytes())


def receive_text(sock: socket.socket) -> Any:
    """``EOFError`` when the other side is gone."""
    return json.loads(_receive(sock))


def receive_numbers(sock: socket.socket) -> list[int]:
    """``EOFError`` when the other side is gone."""
    return np.frombuffer(_receive(sock), dtype=np.int64).tolist()


def _send(sock: socket.socket, payload: bytes) -> None:
    sock.sendall(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)


def _receive(sock: socket.socket) -> bytes:
    return _exactly(sock, int.from_bytes(_exactly(sock, _LENGTH_BYTES), "little"))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the other rank is gone")
        data += piece
    return bytes(data)
