"""A cache rank as a process: one inference rank at a time, over a channel, until it is told to stop.

Whatever an inference rank does wrong ends its session with a REFUSE that says why; the process lives on. Nothing of a
session is allocated before the other side has proved that it has the key (where there is one) and its sizes were
checked against what this process may use.
"""

from __future__ import annotations

import hmac
import random
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slipstream.asyncspade import channel
from slipstream.asyncspade.cache_rank import Answer, CacheRank
from slipstream.asyncspade.channel import ChannelLost, TcpChannel
from slipstream.asyncspade.far_side import keys_only
from slipstream.asyncspade.hello import Hello, agreed
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.protocol import Kind, Message, ProtocolError, Sizes, text_tensor
from slipstream.attention.calibration import ModelIdentity
from slipstream.kvcache.plan import plan_memory

_SHAKE_S, _REFUSE_S, _SEND_S = 10.0, 1.0, 30.0
_FROM_ENGINE = frozenset({Kind.CHANNELS, Kind.PROMPT, Kind.STEP, Kind.FORK, Kind.CLOSE})
_ERRORS = (ChannelLost, ProtocolError, ValueError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class RankConfig:
    """Where a cache rank listens, and what it may use.

    identity: the only model that it serves; None: any. kv_memory: for keys, values and the index; None: what is free.
    key_file: needed beyond this host. predictor_file: weights for inference ranks with predictor 'mlp'.
    """

    address: str
    identity: ModelIdentity | None = None
    device: str = "cpu"
    kv_memory: int | str | None = None
    key_file: str | Path | None = None
    predictor_file: str | Path | None = None


class RankProcess:
    """``ValueError`` for an address or a key that cannot be used. ``tell``: gets a line for each thing of note."""

    def __init__(self, config: RankConfig, tell: Callable[[str], None] = print) -> None:
        address = channel.parse_address(config.address)
        self._key = channel.read_key(config.key_file, address[0])
        self._config, self._tell = config, tell
        self._listener = channel.listen(address)
        self.port = self._listener.getsockname()[1]
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.address = f"{host}:{self.port}"

    def serve(self) -> None:
        """Until an exception of another kind (Ctrl-C) comes."""
        try:
            while True:
                sock, peer = self._listener.accept()
                self._serve_one(TcpChannel(sock, Sizes(frozenset({Kind.HELLO}))), f"{peer[0]}:{peer[1]}")
        finally:
            self._listener.close()

    @torch.inference_mode()
    def _serve_one(self, line: TcpChannel, peer: str) -> None:
        try:
            session = _Session(line, *self._shake_hands(line))
            self._tell(f"serving {session.hello.identity} to {peer}")
            while True:
                self._turn_others_away()
                session.run(0.5)
        except ChannelLost as error:
            self._tell(f"{peer} is gone: {error}")
        except _ERRORS as error:
            self._tell(f"refused {peer}: {error}")
            _refuse(line, str(error))
        finally:
            line.close()

    def _turn_others_away(self) -> None:
        while select.select([self._listener], [], [], 0)[0]:
            sock, _ = self._listener.accept()
            other = TcpChannel(sock, Sizes(frozenset()))
            _refuse(other, "this cache rank serves another inference rank: start a second one on another port")
            other.close()

    def _shake_hands(self, line: TcpChannel) -> tuple[Hello, CacheRank]:
        deadline = time.monotonic() + _SHAKE_S
        greeting = _next_message(line, deadline)
        theirs, ours = channel.as_bytes(greeting.tensors[1]), channel.nonce()
        mac = channel.proof(self._key, "rank", ours, theirs)
        line.sizes = Sizes(frozenset({Kind.PROOF}))
        line.send(Message(Kind.CHALLENGE, (channel.as_tensor(ours), channel.as_tensor(mac))))
        answer = _next_message(line, deadline)
        expected = channel.proof(self._key, "engine", theirs, ours)
        if not hmac.compare_digest(channel.as_bytes(answer.tensors[0]), expected):
            raise ProtocolError("the inference rank does not have this cache rank's key")
        hello = Hello.read(greeting)
        own = self._config.identity
        if own is not None and not hello.identity.matches(own):
            raise ProtocolError(f"the inference rank runs {hello.identity}, this cache rank is for {own}")
        return hello, self._rank(hello, line, deadline)

    def _rank(self, hello: Hello, line: TcpChannel, deadline: float) -> CacheRank:
        config, spec, device = hello.config, hello.spec, self._config.device
        mlp = None
        if config.predictor == "mlp":
            if self._config.predictor_file is None:
                raise ProtocolError("predictor 'mlp': start the cache rank with --predictor-file")
            mlp = QueryMLP.load(self._config.predictor_file, hello.identity, config.rotate, device)
        inner = config.inner(config.spare)
        inner.check_page_size(hello.page_size)
        inner.check_model(spec)
        parts = inner.index
        memory = plan_memory(
            keys_only(spec) if config.transfer == "indices" else spec,
            page_size=hello.page_size,
            kv_memory=self._config.kv_memory,
            device=device,
            extra_bytes_per_token=0 if parts is None else parts.bytes_per_token(spec),
            fixed_bytes=CacheRank.fixed_bytes(config, spec, hello.num_seats),
            most_tokens=hello.num_seats * spec.max_position,
        )
        line.pace = hello.pace
        line.sizes = agreed(hello, frozenset({Kind.TABLE}))
        table = _next_message(line, deadline).tensors[0]
        line.sizes = agreed(hello, _FROM_ENGINE)
        return CacheRank(config, spec, memory, hello.num_seats, table, hello.gate, device, mlp)


class _Session:
    """One inference rank's messages, in order, until its channel ends; each must carry the session's number."""

    def __init__(self, line: TcpChannel, hello: Hello, rank: CacheRank) -> None:
        self._line, self._rank, self.hello = line, rank, hello
        self._number = random.SystemRandom().getrandbits(63) | 1
        line.send(Message(Kind.WELCOME, (text_tensor(""),), self._number))

    def run(self, timeout_s: float) -> None:
        """Answer what comes for so long."""
        deadline = time.monotonic() + timeout_s
        while (message := self._line.receive(max(0.0, deadline - time.monotonic()))) is not None:
            if message.session != self._number:
                raise ProtocolError(f"a message of session {message.session:x} came in session {self._number:x}")
            answer = self._answer(message)
            if answer is not None:
                self._send(answer[0], answer[1], message.step + 1, message.layer)
            if self._rank.dropped:
                rows = torch.tensor(self._rank.dropped)
                self._rank.dropped = []
                self._send(Kind.DROP, (rows,), message.step, message.layer)

    def _send(self, kind: Kind, tensors: tuple[Tensor, ...], step: int, layer: int) -> None:
        host = tuple(tensor.cpu() for tensor in tensors)
        self._line.send(Message(kind, host, self._number, step, layer), _SEND_S)

    def _answer(self, message: Message) -> Answer | None:
        rank, layer, (first, *rest) = self._rank, message.layer, message.tensors
        if not 0 <= layer < rank.spec.num_layers:
            raise ProtocolError(f"{message.kind.name} for layer {layer} of {rank.spec.num_layers}")
        if message.kind == Kind.CHANNELS:
            rank.set_channels(layer, first)
            return None
        told, device = first.tolist(), rank.device
        self._check_rows(message, told if message.kind != Kind.PROMPT else [told])
        if message.kind == Kind.FORK:
            rank.fork(told)
        elif message.kind == Kind.CLOSE:
            rank.close(told)
        elif message.kind == Kind.PROMPT:
            k, v, q = (tensor.to(device) for tensor in rest)
            return rank.prompt(layer, told, k, v, q)
        else:
            q, k, v = (tensor.to(device) for tensor in rest)
            return rank.step(layer, message.step, told, q, k, v)
        return None

    def _check_rows(self, message: Message, rows: list[list[int]]) -> None:
        """Numbers that index something are in its range, and tensors that belong together are of one length."""
        seats = [row[i] for row in rows for i in ((0, 2) if message.kind == Kind.FORK else (0,))]
        if not all(1 <= seat <= self.hello.num_seats for seat in seats) or len(set(seats)) < len(rows):
            raise ProtocolError(f"{message.kind.name} names seats {seats} of {self.hello.num_seats}")
        if message.kind not in (Kind.PROMPT, Kind.STEP):
            return
        last = [row[2] + (len(message.tensors[1]) if message.kind == Kind.PROMPT else 0) for row in rows]
        if not all(0 < length <= self.hello.spec.max_position for length in last) or min(row[2] for row in rows) < 0:
            raise ProtocolError(f"{message.kind.name} has lengths {last} of {self.hello.spec.max_position}")
        k, v = message.tensors[1:3] if message.kind == Kind.PROMPT else message.tensors[2:4]
        if len(v) != (len(k) if self._rank.packs else 0) or len(k) == 0:
            raise ProtocolError(f"{message.kind.name} has {len(k)} keys and {len(v)} values")


def _next_message(line: TcpChannel, deadline: float) -> Message:
    message = line.receive(max(0.0, deadline - time.monotonic()))
    if message is None:
        raise ChannelLost("it said nothing")
    return message


def _refuse(line: TcpChannel, why: str) -> None:
    with suppress(ChannelLost, ProtocolError):  # it may be gone already, and is told nothing more
        line.send(Message(Kind.REFUSE, (text_tensor(why),)))
        line.hang_up(_REFUSE_S)
