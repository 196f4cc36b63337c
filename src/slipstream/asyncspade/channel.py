"""How messages travel between ranks: TCP, real or paced like a slow link.

One thread on each side and no event loop: a channel moves bytes whenever its owner sends or receives, the kernel's
buffers do the rest. So nothing runs beside a forward pass that would have to take turns with it in the interpreter.
Law: nothing waits longer than it was told to, and a channel that raised :class:`ChannelLost` is dead for good.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import select
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slipstream.asyncspade.protocol import Decoder, Message, ProtocolError, Sizes, encode

NONCE_BYTES, LEAST_KEY_BYTES = 32, 16
_BUFFER_BYTES = 4 << 20
_MOST_UNSENT_BYTES = 64 << 20  # beyond this the sender waits for the other side
_MOST_PIECES = 64  # buffers of one system call


class ChannelLost(RuntimeError):
    """The other side is gone, silent beyond its deadline, or speaks another language."""


@dataclass(frozen=True)
class Pace:
    """A link to imitate: first in, first out, ``bits_per_s``, then ``delay_s``.

    In virtual time: the receiver holds each message until the link would have delivered it. Both sides must read one
    monotonic clock, so this is for processes of one host.
    """

    bits_per_s: float
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bits_per_s > 0 and self.delay_s >= 0):
            raise ValueError(f"a pace needs bits_per_s > 0 and a delay >= 0, got {self}")

    def due(self, message: Message, free_s: float) -> tuple[float, float]:
        """When a message arrives, and when the link is free again; ``free_s`` as the one before left it."""
        free_s = max(free_s, message.sent_s) + 8 * message.num_bytes / self.bits_per_s
        return free_s + self.delay_s, free_s


class TcpChannel:
    """Messages in order, both ways, over a connected socket.

    sizes: what may come next. bytes_out, bytes_in: all that travelled.
    """

    def __init__(self, sock: socket.socket, sizes: Sizes, pace: Pace | None = None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._sock, self._decoder, self.pace = sock, Decoder(sizes), pace
        self._unsent: deque[memoryview] = deque()
        self._num_unsent = self.bytes_out = self.bytes_in = 0
        self._inbox: deque[tuple[float, Message]] = deque()  # with the time at which each is due
        self._free_s = 0.0
        self._error: Exception | None = None

    @property
    def sizes(self) -> Sizes:
        return self._decoder.sizes

    @sizes.setter
    def sizes(self, sizes: Sizes) -> None:
        self._decoder.sizes = sizes

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message, timeout_s: float = 5.0) -> None:
        """Give a message away. Waits only while too much is unsent. ``ChannelLost`` when the other side is."""
        if isinstance(self._error, ChannelLost):  # who cannot be understood can still be told so
            raise self._error
        pieces = encode(message)
        self.bytes_out += sum(piece.nbytes for piece in pieces)
        if not self._unsent:
            pieces = self._write(pieces)
        # What the kernel did not take is copied: the sender may write to its tensors again.
        for piece in pieces:
            self._unsent.append(memoryview(bytes(piece)))
            self._num_unsent += piece.nbytes
        self._pump_until(lambda: self._num_unsent <= _MOST_UNSENT_BYTES, timeout_s, "takes no messages")

    def flush(self, timeout_s: float) -> None:
        """Wait until all is with the kernel; ``ChannelLost`` when that takes too long."""
        self._pump_until(lambda: not self._unsent, timeout_s, "takes no messages")

    def _pump_until(self, done, timeout_s: float, what: str) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + timeout_s
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._lost(f"the other side {what}, for {timeout_s:g} s")
            self._pump(left)

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """The next message; None when none came in time. ``ChannelLost``, ``ProtocolError`` (and then it is dead)."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if self._inbox and self._inbox[0][0] <= now:
                return self._inbox.popleft()[1]
            if self._error is not None:  # what came before the end is still good
                raise self._error
            wait = max(0.0, deadline - now)
            if self._inbox:
                wait = min(wait, self._inbox[0][0] - now)
            if not self._pump(wait) and time.monotonic() >= deadline:
                return None

    def _pump(self, timeout_s: float) -> bool:
        """Move bytes both ways once, waiting for that at most so long; whether any moved."""
        if self._error is not None:
            raise self._error
        readable, writable, _ = select.select([self], [self] if self._unsent else [], [], timeout_s)
        if writable:
            pieces, self._unsent = self._write(list(self._unsent)), deque()
            self._unsent.extend(pieces)
            self._num_unsent = sum(piece.nbytes for piece in pieces)
        if readable:
            self._read()
        return bool(readable or writable)

    def _write(self, pieces: list[memoryview]) -> list[memoryview]:
        """Give the kernel what it takes; returns the rest."""
        first = 0
        while first < len(pieces):
            try:
                count = self._sock.sendmsg(pieces[first : first + _MOST_PIECES])
            except BlockingIOError:
                break
            except OSError as error:
                raise self._lost(f"the connection broke: {error}") from error
            while first < len(pieces) and count >= pieces[first].nbytes:
                count -= pieces[first].nbytes
                first += 1
            if count:
                pieces[first] = pieces[first][count:]
        return pieces[first:]

    def _read(self) -> None:
        """Take what the kernel has, message by message. Errors are kept until what came before them is received."""
        while True:
            try:
                count = self._sock.recv_into(self._decoder.wants())
                if count == 0:
                    self._lost("the other side closed the connection")
                    return
                self.bytes_in += count
                message = self._decoder.filled(count)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost(f"the connection broke: {error}")
                return
            except ProtocolError as error:
                self._error = error
                return
            if message is not None:
                self._deliver(message)
                return

    def _deliver(self, message: Message) -> None:
        due = 0.0
        if self.pace is not None:
            due, self._free_s = self.pace.due(message, self._free_s)
        self._inbox.append((due, message))

    def _lost(self, why: str) -> ChannelLost:
        self._error = ChannelLost(why)
        return self._error

    def hang_up(self, timeout_s: float) -> None:
        """Close, once the other side has what was sent: what it still sends would make the kernel drop that."""
        deadline = time.monotonic() + timeout_s
        with suppress(OSError, ChannelLost, ProtocolError):
            self.flush(timeout_s)
            self._sock.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                if select.select([self], [], [], left)[0] and not self._sock.recv(_BUFFER_BYTES):
                    break
        self.close()

    def close(self) -> None:
        self._error = self._error or ChannelLost("this side closed the connection")
        self._sock.close()


# -- connections


def parse_address(text: str) -> tuple[str, int]:
    """``"127.0.0.1:5555"`` or ``"[::1]:5555"``. ``ValueError`` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no address: write HOST:PORT, e.g. 127.0.0.1:5555")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def read_key(path: str | Path | None, host: str) -> bytes | None:
    """The shared secret in a file. ``ValueError`` without one where the address is not this host's own."""
    if path is None:
        if is_loopback(host):
            return None
        raise ValueError(
            f"{host} is reachable from other machines: give both sides the same key file (--key-file, rank_key), "
            "e.g. made by `openssl rand -hex 32`, or use 127.0.0.1"
        )
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(key) < LEAST_KEY_BYTES:
        raise ValueError(f"the key in {path} has {len(key)} bytes, at least {LEAST_KEY_BYTES} are needed")
    return key


def proof(key: bytes | None, role: str, ours: bytes, theirs: bytes) -> bytes:
    """What only an owner of the key can answer to two nonces; without a key it is what anybody can."""
    return hmac.digest(key or b"", role.encode() + ours + theirs, hashlib.sha256)


def nonce() -> bytes:
    return os.urandom(NONCE_BYTES)


def as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.tolist())


def listen(address: tuple[str, int]) -> socket.socket:
    """A listening socket; ``ValueError`` when the address cannot be had."""
    host, port = address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=8)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


class Dialing:
    """A connection on its way: ask :meth:`ready` now and then. Never blocks but for names that need a resolver."""

    def __init__(self, address: tuple[str, int]) -> None:
        host, port = address
        try:
            family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise ChannelLost(f"{host} is no known host: {error}") from error
        self._sock = socket.socket(family, kind, proto)
        self._sock.setblocking(False)
        self._sock.connect_ex(place)

    def ready(self, timeout_s: float = 0.0) -> socket.socket | None:
        """The connected socket, or None while it is not; ``ChannelLost`` when it cannot be."""
        _, writable, _ = select.select([], [self._sock], [], timeout_s)
        if not writable:
            return None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._sock.close()
            raise ChannelLost(os.strerror(code))
        return self._sock

    def close(self) -> None:
        self._sock.close()
