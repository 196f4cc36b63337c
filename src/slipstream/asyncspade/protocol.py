"""What an inference rank and a cache rank say to each other: typed, versioned messages as bytes. No pickle.

A message is a fixed header, a table of its tensors' dtypes and shapes, and their raw bytes, each aligned to 16. Header
and table have an exact size and are checked against :data:`SCHEMA` and the sizes agreed on before room for the rest is
made; whatever does not fit raises :class:`ProtocolError`, which says what. Little-endian on both sides.

Tags: the session (a number drawn by the cache rank for each connection), the step of the inference rank, the layer,
and in ``rows`` each request's seat, the epoch of the chain that sits there and its length in tokens. What carries a tag
that is not current is never used.
"""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAGIC, VERSION = b"SSPD", 1
HEADER = struct.Struct("<4sHHQqiIQd")
"""magic, version, kind, session, step, layer, tensors, bytes behind the table, time of sending (s, monotonic)."""
ENTRY = struct.Struct("<BB4I")
"""dtype, dimensions, sizes (0 where there is no dimension)."""
ALIGNMENT = 16
TEXT_BYTES = 1 << 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}


class ProtocolError(ValueError):
    """Bytes that are no message of ours, or one that may not come now."""


class Kind(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSE = 5
    TABLE = 6
    CHANNELS = 7
    PROMPT = 8
    STEP = 9
    FORK = 10
    CLOSE = 11
    SETS = 12
    PACK = 13
    DROP = 14


# kind -> tensors: (name, dtype, sizes). A letter is a size agreed on or, where nobody agreed, whatever it is first;
# "model" is the model's dtype.
_Field = tuple[str, "torch.dtype | str", tuple["int | str", ...]]
_I32, _I64, _U8 = torch.int32, torch.int64, torch.uint8
_TEXT: tuple[_Field, ...] = (("text", _U8, ("text",)),)
SCHEMA: Mapping[Kind, tuple[_Field, ...]] = {
    # who asks, with which model and method; what the answer to a challenge is; yes, no and why
    Kind.HELLO: (*_TEXT, ("nonce", _U8, (32,))),
    Kind.CHALLENGE: (("nonce", _U8, (32,)), ("mac", _U8, (32,))),
    Kind.PROOF: (("mac", _U8, (32,)),),
    Kind.WELCOME: _TEXT,
    Kind.REFUSE: _TEXT,
    # the model's table of cosines and sines; the channels of a layer's labels
    Kind.TABLE: (("cos_sin", torch.float32, ("positions", "R")),),
    Kind.CHANNELS: (("channels", _I32, ("Hk", "r")),),
    # tokens of a chain, in the order of positions. row: seat, epoch, first position, and 1 if a set is wanted after
    # these tokens, else 0. q: the last of their queries
    Kind.PROMPT: (
        ("row", _I64, (4,)),
        ("k", "model", ("chunk", "Hk", "D")),
        ("v", "model", ("values", "Hk", "D")),
        ("q", "model", ("window", "Hq", "D")),
    ),
    # one token for each row. rows: seat, epoch, length with it
    Kind.STEP: (
        ("rows", _I64, ("seats", 3)),
        ("q", "model", ("seats", "Hq", "D")),
        ("k", "model", ("seats", "Hk", "D")),
        ("v", "model", ("values", "Hk", "D")),
    ),
    # rows: a chain's seat and epoch, and those of another that goes on from it
    Kind.FORK: (("rows", _I64, ("seats", 4)),),
    Kind.CLOSE: (("rows", _I64, ("seats", 2)),),
    # rows: seat, epoch, the length that the set is for. indices: tokens, ascending, padded with -1
    Kind.SETS: (
        ("rows", _I64, ("seats", 3)),
        ("indices", _I32, ("seats", "Hk", "K")),
        ("counts", _I32, ("seats", "Hk")),
    ),
    # counts: tokens of each row's set; places: slot * Hk + head inside the row's seat, row after row; sizes: how many
    # places each row has
    Kind.PACK: (
        ("rows", _I64, ("seats", 3)),
        ("counts", _I32, ("seats",)),
        ("sizes", _I32, ("seats",)),
        ("places", _I32, ("packed",)),
        ("k", "model", ("packed", "D")),
        ("v", "model", ("packed", "D")),
    ),
    # rows: seat, epoch of chains that the cache rank has no room for
    Kind.DROP: (("rows", _I64, ("seats", 2)),),
}  # fmt: skip


class Message(NamedTuple):
    """One message; ``tensors`` in the order of its kind's schema, ``sent_s`` on the sender's monotonic clock."""

    kind: Kind
    tensors: tuple[Tensor, ...]
    session: int = 0
    step: int = 0
    layer: int = 0
    sent_s: float = 0.0
    num_bytes: int = 0

    @property
    def text(self) -> str:
        """That of a kind that has one."""
        return bytes(self.tensors[0].tolist()).decode(errors="replace")


@dataclass(frozen=True)
class Sizes:
    """What was agreed on: exact sizes, and for sizes that vary from message to message the largest allowed.

    kinds: which may come now. Before the handshake nothing but small texts may.
    """

    kinds: frozenset[Kind]
    dtype: torch.dtype = torch.float32
    exact: Mapping[str, int] | None = None
    most: Mapping[str, int] | None = None

    def check(self, kind: Kind, entries: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """``ProtocolError`` unless a message of this kind may have tensors like these."""
        if kind not in self.kinds:
            wanted = ", ".join(sorted(one.name for one in self.kinds))
            raise ProtocolError(f"a {kind.name} message came where only {wanted} may")
        schema = SCHEMA[kind]
        if len(entries) != len(schema):
            raise ProtocolError(f"{kind.name} has {len(entries)} tensors instead of {len(schema)}")
        bound = dict(self.exact or {})
        for (name, dtype, letters), (found, shape) in zip(schema, entries, strict=True):
            needed = self.dtype if isinstance(dtype, str) else dtype
            if found != needed or len(shape) != len(letters):
                raise ProtocolError(f"{kind.name}.{name} is {found} {list(shape)}, expected {needed} {list(letters)}")
            for letter, size in zip(letters, shape, strict=True):
                self._check_size(f"{kind.name}.{name} {list(shape)}", letter, size, bound)

    def _check_size(self, what: str, letter: int | str, size: int, bound: dict[str, int]) -> None:
        if isinstance(letter, int):
            if size != letter:
                raise ProtocolError(f"{what} has a size {size} where {letter} belongs")
            return
        most = TEXT_BYTES if letter == "text" else (self.most or {}).get(letter, 0)
        if letter not in bound and size > most:
            raise ProtocolError(f"{what} has {letter} = {size}, at most {most} was agreed on")
        if bound.setdefault(letter, size) != size:
            raise ProtocolError(f"{what} has {letter} = {size}, not {bound[letter]}")


def text_tensor(text: str) -> Tensor:
    raw = text.encode()[:TEXT_BYTES]
    return torch.frombuffer(bytearray(raw), dtype=_U8) if raw else torch.empty(0, dtype=_U8)


def read_json(message: Message, valid: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The object that a text holds. ``ProtocolError`` unless it has exactly these names with values of these types."""
    try:
        found = json.loads(message.text)
    except ValueError as error:
        raise ProtocolError(f"{message.kind.name} is not JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != set(valid):
        raise ProtocolError(f"{message.kind.name} must have the names {', '.join(valid)}")
    for name, kinds in valid.items():
        if not isinstance(found[name], kinds) or (isinstance(found[name], bool) and kinds is int):
            raise ProtocolError(f"{message.kind.name}.{name} has the value {found[name]!r}")
    return found


def encode(message: Message) -> list[memoryview]:
    """The pieces of a message; they share memory with its tensors."""
    pieces = []
    table, total = b"", 0
    for tensor in message.tensors:
        assert tensor.device.type == "cpu" and tensor.dim() <= 4, "what travels is on the host"
        shape = tuple(tensor.shape)
        table += ENTRY.pack(_CODE[tensor.dtype], len(shape), *shape, *(0,) * (4 - len(shape)))
        size = tensor.numel() * tensor.element_size()
        if size:
            flat = tensor.detach().contiguous().view(-1)
            if flat.stride(0) != 1:  # one element may have any stride and still be contiguous
                flat = flat.clone(memory_format=torch.contiguous_format)
            pieces.append(memoryview(flat.view(_U8).numpy().data))
        if size % ALIGNMENT:
            pieces.append(memoryview(bytes(ALIGNMENT - size % ALIGNMENT)))
        total += _aligned(size)
    now = message.sent_s or time.monotonic()
    head = HEADER.pack(
        MAGIC, VERSION, message.kind, message.session, message.step, message.layer, len(message.tensors), total, now
    )
    return [memoryview(head + table), *pieces]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Decoder:
    """Bytes to messages, however they are cut: fill what :meth:`wants` with what came, and tell :meth:`filled`.

    ``sizes`` may be replaced between messages. After a :class:`ProtocolError` nothing more can be read.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._good: dict[Kind, tuple[Any, ...]] = {}  # each kind's latest table: most have the one before them again
        self._head: tuple[Any, ...] = ()
        self._begin()

    def _begin(self) -> None:
        self._body: Tensor | None = None
        self._expect(bytearray(HEADER.size))
        self._part = "header"

    def _expect(self, room: Any) -> None:
        self._room, self._got = memoryview(room), 0

    def wants(self) -> memoryview:
        """The room for the next bytes, never empty."""
        return self._room[self._got :]

    def filled(self, count: int) -> Message | None:
        """The first ``count`` bytes of the room are filled; a message if this completes one."""
        self._got += count
        if self._got < len(self._room):
            return None
        if self._part == "header":
            self._read_header()
        elif self._part == "table":
            self._read_table()
        if self._part == "body" and self._got == len(self._room):
            message = self._message()
            self._begin()
            return message
        return None

    def _read_header(self) -> None:
        self._head = HEADER.unpack(self._room)
        magic, version, kind, _, _, _, count, _, sent_s = self._head
        if magic != MAGIC:
            raise ProtocolError(f"these bytes are no message of Slipstream's: they begin with {bytes(magic)!r}")
        if version != VERSION:
            raise ProtocolError(f"the other side speaks version {version} of the protocol, this one {VERSION}")
        if kind not in SCHEMA:
            raise ProtocolError(f"there is no message of kind {kind}")
        if count != len(SCHEMA[Kind(kind)]) or not math.isfinite(sent_s):
            raise ProtocolError(f"{Kind(kind).name} has {count} tensors instead of {len(SCHEMA[Kind(kind)])}")
        self._part = "table"
        self._expect(bytearray(count * ENTRY.size))

    def _read_table(self) -> None:
        kind, total, table = Kind(self._head[2]), self._head[7], bytes(self._room)
        if self._good.get(kind, ())[:3] != (self.sizes, table, total):
            self._good[kind] = (self.sizes, table, total, self._checked(kind, table, total))
        self._entries = self._good[kind][3]
        self._part, self._body = "body", torch.empty(total, dtype=_U8)
        self._expect(self._body.numpy())

    def _checked(self, kind: Kind, table: bytes, total: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        entries = []
        for code, dims, *shape in ENTRY.iter_unpack(table):
            if code >= len(DTYPES) or dims > 4 or any(shape[dims:]):
                raise ProtocolError(f"{kind.name} has a tensor of unknown dtype {code} or shape {shape}")
            entries.append((DTYPES[code], tuple(shape[:dims])))
        self.sizes.check(kind, entries)
        needed = sum(_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in entries)
        if needed != total:
            raise ProtocolError(f"{kind.name} announces {total} bytes, its tensors have {needed}")
        return entries

    def _message(self) -> Message:
        assert self._body is not None
        _, _, kind, session, step, layer, _, total, sent_s = self._head
        tensors, start = [], 0
        for dtype, shape in self._entries:
            size = math.prod(shape) * dtype.itemsize
            tensors.append(self._body[start : start + size].view(dtype).view(shape))
            start += _aligned(size)
        num_bytes = HEADER.size + len(self._entries) * ENTRY.size + total
        return Message(Kind(kind), tuple(tensors), session, step, layer, sent_s, num_bytes)
