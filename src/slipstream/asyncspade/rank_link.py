"""The inference rank's end of a connection: who dials, shakes hands, comes back after a loss, and counts.

Never blocks but where it is told how long it may: a lost cache rank is dialled again at the beginning of steps, with
back-off, a little further at each.
"""

from __future__ import annotations

import hmac
import json
import time
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from slipstream.asyncspade import channel
from slipstream.asyncspade.channel import ChannelLost, Dialing, Pace, TcpChannel
from slipstream.asyncspade.hello import Hello, agreed
from slipstream.asyncspade.protocol import Kind, Message, ProtocolError, Sizes, text_tensor

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 10.0
_FROM_RANK = frozenset({Kind.SETS, Kind.PACK, Kind.DROP, Kind.REFUSE})


class Refused(ValueError):
    """The cache rank answered, and said no."""


class RankLink:
    """One cache rank, up or down.

    timeout_s: the longest that one answer may take; beyond it the connection is given up. session: a number of the
    connection that is up, 0 while none is. Whoever uses it compares it with the one it knew: everything that was told
    in another session is gone.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        cos_sin: Tensor,
        channels: Tensor | None,
        *,
        timeout_s: float = 5.0,
        key_file: str | Path | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.name, self.timeout_s = f"cache rank {address}", timeout_s
        self._address = channel.parse_address(address)
        self._key = channel.read_key(key_file, self._address[0])
        self.hello, self._cos_sin, self._channels, self._pace = hello, cos_sin.cpu(), channels, pace
        self._channel: TcpChannel | None = None
        self._attempt: Generator[None, None, None] | None = None
        self._began_s = self._next_s = 0.0
        self._wait_s = _FIRST_WAIT_S
        self._told = {"out": 0, "in": 0}  # bytes of connections that are over
        self.session, self.why = 0, "was never reached"
        self.counts: Counter[str] = Counter()

    @property
    def is_up(self) -> bool:
        return self.session != 0

    # -- up and down

    def connect(self, timeout_s: float) -> None:
        """Wait for a connection. ``Refused`` when the rank says no, ``ChannelLost`` when it cannot be reached."""
        deadline = time.monotonic() + timeout_s
        while not self.is_up:
            try:
                self._advance()
            except ChannelLost:
                if time.monotonic() + self._wait_s >= deadline:
                    raise
            if time.monotonic() >= deadline:
                raise ChannelLost(f"{self.name} does not answer")
            time.sleep(0.001)

    def poll(self) -> None:
        """Go on with dialling, if the rank is down and it is time. Never blocks, never raises."""
        try:
            self._advance()
        except (ChannelLost, Refused) as error:
            self.why = str(error)

    def _advance(self) -> None:
        now = time.monotonic()
        if self.is_up or now < self._next_s:
            return
        if self._attempt is None:
            self._attempt, self._began_s = self._dial(), now
        try:
            next(self._attempt)
            if now - self._began_s <= self.timeout_s:
                return
            self._attempt.close()
            raise ChannelLost("no answer to the handshake")
        except StopIteration:
            self._wait_s = _FIRST_WAIT_S
        except (ChannelLost, ProtocolError, Refused) as error:
            self._next_s, self._wait_s = now + self._wait_s, min(2 * self._wait_s, _LONGEST_WAIT_S)
            if isinstance(error, Refused):
                raise
            raise ChannelLost(f"{self.name}: {error}") from error
        finally:
            if self.is_up or now < self._next_s or now - self._began_s > self.timeout_s:
                self._attempt = None

    def _dial(self) -> Generator[None, None, None]:
        """Yields wherever it would wait."""
        dialing = Dialing(self._address)
        try:
            while (sock := dialing.ready()) is None:
                yield
        except GeneratorExit:
            dialing.close()
            raise
        line = TcpChannel(sock, Sizes(frozenset({Kind.CHALLENGE, Kind.REFUSE})), self._pace)
        try:
            yield from self._shake_hands(line)
        except BaseException:
            line.close()
            raise

    def _shake_hands(self, line: TcpChannel) -> Generator[None, None, None]:
        ours = channel.nonce()
        text = text_tensor(json.dumps(self.hello.as_json()))
        line.send(Message(Kind.HELLO, (text, channel.as_tensor(ours))))
        answer = yield from _next_message(line)
        theirs, mac = (channel.as_bytes(tensor) for tensor in answer.tensors)
        if not hmac.compare_digest(mac, channel.proof(self._key, "rank", theirs, ours)):
            raise Refused(f"{self.name} does not have our key: give both sides the same key file")
        line.sizes = Sizes(frozenset({Kind.WELCOME, Kind.REFUSE}))
        line.send(Message(Kind.PROOF, (channel.as_tensor(channel.proof(self._key, "engine", ours, theirs)),)))
        line.send(Message(Kind.TABLE, (self._cos_sin,)))
        answer = yield from _next_message(line)
        if not answer.session:
            raise ProtocolError("WELCOME without a session")
        line.sizes = agreed(self.hello, _FROM_RANK)
        self._channel, self.session = line, answer.session
        self.counts["connections"] += 1
        for layer, row in enumerate(self._channels if self._channels is not None else ()):
            line.send(Message(Kind.CHANNELS, (row,), self.session, layer=layer))

    def lose(self, why: str) -> None:
        """Give the connection up; it is dialled again later."""
        if self._channel is not None:
            self._told["out"] += self._channel.bytes_out
            self._told["in"] += self._channel.bytes_in
            self._channel.close()
        self._channel, self.session, self.why = None, 0, why
        self._next_s = time.monotonic() + self._wait_s
        self.counts["losses"] += 1

    def close(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
            self._attempt = None
        if self._channel is not None:
            self._channel.close()
        self._channel, self.session = None, 0

    # -- messages

    def send(self, kind: Kind, tensors: tuple[Tensor, ...], step: int = 0, layer: int = 0) -> bool:
        """Send a message in this session; False, and the rank is down, when it cannot be sent."""
        if self._channel is None:
            return False
        try:
            host = tuple(tensor.cpu() for tensor in tensors)
            self._channel.send(Message(kind, host, self.session, step, layer), self.timeout_s)
        except (ChannelLost, ProtocolError) as error:
            self.lose(str(error))
            return False
        return True

    def set_channels(self, layer: int, channels: Tensor) -> None:
        """Those of the labels from now on, [Hk, r] int32; kept for ranks that come later."""
        if self._channels is None:
            shape = (self.hello.spec.num_layers, *channels.shape)
            self._channels = torch.arange(channels.shape[-1], dtype=torch.int32).expand(shape).clone()
        self._channels[layer] = channels.cpu()
        self.send(Kind.CHANNELS, (channels,), layer=layer)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message of this session; None when none came in time, or the rank is down now."""
        deadline = time.monotonic() + timeout_s
        while self._channel is not None:
            try:
                message = self._channel.receive(max(0.0, deadline - time.monotonic()))
            except (ChannelLost, ProtocolError) as error:
                self.lose(str(error))
                return None
            if message is None:
                return None
            if message.kind == Kind.REFUSE:
                self.lose(f"it ended the session: {message.text}")
            elif message.session == self.session:
                return message
            else:
                self.counts["strays"] += 1
        return None

    def stats(self) -> Mapping[str, float]:
        line, told = self._channel, self._told
        return {
            "asyncspade_bytes_out": told["out"] + (line.bytes_out if line else 0),
            "asyncspade_bytes_in": told["in"] + (line.bytes_in if line else 0),
            "asyncspade_connections": self.counts["connections"],
            "asyncspade_losses": self.counts["losses"],
            "asyncspade_strays": self.counts["strays"],
        }


def _next_message(line: TcpChannel) -> Generator[None, None, Message]:
    while (message := line.receive()) is None:
        yield
    if message.kind == Kind.REFUSE:
        raise Refused(message.text)
    return message
