"""The handshake of an inference rank and a cache rank: what is announced, what is refused, which sizes follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from slipstream.asyncspade.channel import Pace
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.protocol import Kind, Message, ProtocolError, Sizes, read_json
from slipstream.attention.calibration import ModelIdentity
from slipstream.types import ModelSpec

CHUNK = 1024
"""Most tokens of one PROMPT message."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_MOST = {
    "num_layers": 1 << 10, "hidden_size": 1 << 20, "num_heads": 1 << 10, "num_kv_heads": 1 << 10, "head_dim": 1 << 11,
    "vocab_size": 1 << 24, "max_position": 1 << 24, "num_seats": 1 << 12, "page_size": 1 << 12, "positions": 1 << 24,
    "rotated": 1 << 11, "gate": 1 << 31,
}  # fmt: skip


@dataclass(frozen=True)
class Hello:
    """An inference rank's model, method and limits. gate: no sets for contexts up to this. positions, rotated: shape of
    its table of cosines and sines. pace: how slowly both sides are to receive, for experiments."""

    config: AsyncSpade
    spec: ModelSpec
    identity: ModelIdentity
    num_seats: int
    page_size: int
    gate: int
    positions: int
    rotated: int
    pace: Pace | None = None

    def as_json(self) -> dict[str, Any]:
        spec = asdict(self.spec) | {"dtype": str(self.spec.dtype).removeprefix("torch.")}
        numbers = {name: getattr(self, name) for name in ("num_seats", "page_size", "gate", "positions", "rotated")}
        pace = None if self.pace is None else asdict(self.pace)
        config = asdict(self.config) | {"rank_key": None}  # a path that is nobody else's business
        return {"config": config, "spec": spec, "identity": asdict(self.identity), "pace": pace, **numbers}

    @classmethod
    def read(cls, message: Message) -> Hello:
        """``ProtocolError`` or ``ValueError`` for one that makes no sense."""
        kinds: dict[str, Any] = dict.fromkeys(("config", "spec", "identity"), dict)
        kinds |= dict.fromkeys(("num_seats", "page_size", "gate", "positions", "rotated"), int)
        found = read_json(message, {**kinds, "pace": (dict, type(None))})
        spec = _take(ModelSpec, found["spec"])
        if spec["dtype"] not in _DTYPES:
            raise ProtocolError(f"there is no model dtype {spec['dtype']!r}")
        numbers = {name: found[name] for name in _MOST if name in found}
        for name, value in {**{name: spec[name] for name in _MOST if name in spec}, **numbers}.items():
            if type(value) is not int or not (0 if name == "gate" else 1) <= value <= _MOST[name]:
                raise ProtocolError(f"HELLO has {name} = {value!r}, which is not in 1..{_MOST[name]}")
        if spec["num_heads"] % spec["num_kv_heads"] or found["rotated"] > spec["head_dim"]:
            raise ProtocolError("HELLO has a model of impossible shape")
        spec |= {"dtype": _DTYPES[spec["dtype"]], "eos_token_ids": ()}
        return cls(
            AsyncSpade(**_take(AsyncSpade, found["config"])),
            ModelSpec(**spec),
            ModelIdentity(**_take(ModelIdentity, found["identity"])),
            **numbers,
            pace=None if found["pace"] is None else Pace(**_take(Pace, found["pace"])),
        )


def _take(kind: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if set(found) != names:
        raise ProtocolError(f"HELLO has a {kind.__name__} of another version: {', '.join(set(found) ^ names)}")
    return dict(found)


def agreed(hello: Hello, kinds: frozenset[Kind]) -> Sizes:
    """The sizes of all messages after this handshake."""
    spec, config = hello.spec, hello.config
    inner = config.inner(config.spare)
    exact = {
        "Hk": spec.num_kv_heads,
        "Hq": spec.num_heads,
        "D": spec.head_dim,
        "K": inner.budget,
        "positions": hello.positions,
        "R": hello.rotated,
        "r": 0 if inner.index is None else inner.index.num_channels,
    }
    most = {
        "seats": hello.num_seats,
        "chunk": CHUNK,
        "values": max(CHUNK, hello.num_seats),
        "window": config.window,
        "packed": hello.num_seats * spec.num_kv_heads * exact["K"],
    }
    return Sizes(kinds, spec.dtype, exact, most)
