"""What ``slipstream deploy`` is told: a YAML file, checked whole before anything starts; mistakes name their line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from slipstream.build import Options, find_model, parse_attention
from slipstream.kvcache.plan import parse_bytes
from slipstream.server.config import ServerConfig
from slipstream.types import reject_unknown

NOT_OURS = ("host", "port", "api_key_file", "served_model_name")  # of a replica's server: the deployment sets them


def _fits(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    try:
        known = [name for name in kind.__dataclass_fields__ if kind is Options or name not in NOT_OURS]
        reject_unknown("a replica", given, known)
        kind(**given)
        parse_attention(given.get("attention", "full"))
    except TypeError as error:
        raise ValueError(str(error)) from error
    return given


def _checked(check: Any, value: str) -> str:
    check(value)
    return value


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0)]
Bytes = Annotated[str, AfterValidator(partial(_checked, parse_bytes))]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Range(Part):
    """Replicas by need: as many as give each ``chains`` in flight; more of them after ``up_s`` of need, one fewer after
    ``down_s`` without."""

    least: Count = 1
    most: Count
    chains: Count = 16
    up_s: Seconds = 5.0
    down_s: Seconds = 120.0

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.most < self.least:
            raise ValueError(f"most = {self.most} is below least = {self.least}")
        return self


class CacheRank(Part):
    """A cache rank for every replica. where: on the replica's node (``beside``) or on another one (``apart``)."""

    where: Literal["beside", "apart"] = "beside"
    cpus: Amount = 1
    gpus: Literal[0, 1] = 0
    kv_memory: Bytes | None = None


class Pool(Part):
    """Replicas of one model. cpus, gpus, memory: what Ray sets aside for each. engine: options of ``LLM``. server:
    options of ``slipstream serve``. name: what clients call the model; default: as it is loaded."""

    model: Annotated[str, Field(min_length=1), AfterValidator(partial(_checked, find_model))]
    name: Annotated[str, Field(min_length=1)] | None = None
    replicas: Count | Range = 1
    cpus: Amount = 1
    gpus: Amount = 0
    memory: Bytes | None = None
    engine: Annotated[dict[str, Any], AfterValidator(partial(_fits, Options))] = {}
    server: Annotated[dict[str, Any], AfterValidator(partial(_fits, ServerConfig))] = {}
    cache_rank: CacheRank | None = None

    @property
    def served(self) -> str:
        return self.name or self.model

    @property
    def needs(self) -> list[dict[str, float]]:
        """What a replica takes of one node, in Ray's words, and its cache rank after it."""
        each = [{"CPU": self.cpus, "GPU": self.gpus, "memory": parse_bytes(self.memory) if self.memory else 0}]
        if self.cache_rank is not None:
            each.append({"CPU": self.cache_rank.cpus, "GPU": self.cache_rank.gpus})
        return [{name: count for name, count in needs.items() if count} for needs in each]

    def digest(self, stamp: str) -> str:
        """Names what a replica is started with; how many there are is no part of it."""
        return _digest(self.model_dump_json(exclude={"replicas"}) + stamp)

    @model_validator(mode="after")
    def _together(self) -> Pool:
        ranks, device = self.engine.get("tensor_parallel_size", 1), self.engine.get("device")
        found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(device or "cpu"))
        if not found or (device not in (None, "cpu") and self.gpus <= int(found[1] or 0)):
            raise ValueError(f"engine.device is {device!r}, but the pool has {self.gpus:g} gpus (cpu, cuda or cuda:N)")
        if (ranks > 1 and 0 < self.gpus < ranks) or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"{ranks} ranks need as many whole gpus, the pool has {self.gpus:g}")
        if 0 < self.gpus < 1 and not self.engine.get("kv_memory"):
            raise ValueError("a GPU in parts needs engine.kv_memory: by default each replica takes all that is free")
        if self.cache_rank is not None:
            method = as_dict(self.engine.get("attention", "full"))
            if method["method"] != "asyncspade" or {"cache_rank", "cache_device", "rank_key"} & method.keys():
                raise ValueError("cache_rank is for attention asyncspade, and sets where its cache rank is")
            if ranks > 1:
                raise ValueError("cache_rank is for replicas of one rank, tensor_parallel_size is above 1")
            parse_attention(method | {"cache_rank": "127.0.0.1:1"})
        return self


class Front(Part):
    """The entrance. host, port, api_key_file: as for ``slipstream serve``. wait_s: how long a request waits for a
    replica. retries: how often one that has streamed nothing is sent again. silence_s: of a stream, until its replica
    counts as lost. answer_s: most for a whole answer. probe_s, probe_limit_s: how often replicas are asked for their
    health, and how long they may take. patience, slack: a prompt's chains go where its KV is while that replica has at
    most ``patience * chains of the idlest + slack``."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key_file: str | None = None
    max_queue: Count = 65536
    wait_s: Seconds = 60.0
    retries: Whole = 2
    silence_s: Seconds = 60.0
    answer_s: Seconds = 3600.0
    probe_s: Seconds = 1.0
    probe_limit_s: Seconds = 5.0
    patience: Annotated[float, Field(ge=1)] = 2.0
    slack: Whole = 4


def _told_apart(pools: dict[str, Pool]) -> dict[str, Pool]:
    first: dict[str, str] = {}
    for name, pool in pools.items():
        if first.setdefault(pool.served, name) != name:
            raise ValueError(
                f"'{name}' serves a model of the same name as '{first[pool.served]}': give one of them another name"
            )
    return pools


class Deployment(Part):
    """start_s: a process that is not ready by then has failed. drain_s: what runs may take so long when a replica is
    stopped. hung_s: a replica without health for so long is killed, and Ray starts it again."""

    name: Name = "slipstream"
    entrance: Front = Front()
    pools: Annotated[dict[Name, Pool], Field(min_length=1), AfterValidator(_told_apart)]
    start_s: Seconds = 900.0
    drain_s: Whole = 60
    hung_s: Seconds = 60.0

    @property
    def front_name(self) -> str:
        """Of the entrance's actor: another one for other settings."""
        return f"{self.name}/entrance/{_digest(f'{self.entrance}{self.drain_s}')}"


def as_dict(method: str | dict[str, Any]) -> dict[str, Any]:
    """An attention method with its options."""
    return {"method": method} if isinstance(method, str) else method


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(path: Path) -> Deployment:
    """The deployment that a file describes. ``ValueError`` with the line of each mistake."""
    written = path.read_bytes()
    try:
        text = written.decode("utf-8-sig")
        given, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark, at = getattr(error, "problem_mark", None), getattr(error, "start", getattr(error, "position", 0))
        line = mark.line + 1 if mark else written.count(b"\n", 0, at) + 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ValueError(f"{path}, line {line}: not YAML: {reason}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a deployment begins with 'pools:' (docs/scale.md)")
    twice = [
        f"{path}, line {key.start_mark.line + 1}: '{key.value}' is set twice"
        for keys in map(list, _mappings(tree))
        for place, (key, _) in enumerate(keys)
        if key.value in [earlier.value for earlier, _ in keys[:place]]
    ]
    if twice:  # YAML would take the last
        raise ValueError("; ".join(twice))
    try:
        return Deployment.model_validate(given)
    except ValidationError as error:
        raise ValueError("; ".join(f"{path}, {_told(tree, e)}" for e in error.errors(include_url=False))) from error


def _mappings(node: Any) -> Iterator[list[Any]]:
    """The pairs of every mapping in and below a node, the outer ones first, each once (aliases may form a ring)."""
    waiting, known = [node], set()
    for each in waiting:
        if id(each) not in known:
            known.add(id(each))
            if isinstance(each, yaml.MappingNode):
                yield each.value
                waiting += [value for _, value in each.value]
            elif isinstance(each, yaml.SequenceNode):
                waiting += each.value


def _pair(node: Any, key: str) -> Any:
    """Key and value of that name, also where they are merged in (``<<``); None without."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    merged = [value for name, value in pairs if name.value == "<<"]
    own = next((pair for pair in pairs if pair[0].value == key), None)
    return own or next((pair for each in merged if (pair := _pair(each, key))), None)


def _told(node: Any, error: Any) -> str:
    """The line of the deepest part of an error's place that is in the file, its name, and what is wrong."""
    line, named, place = 1, [], list(map(str, error["loc"]))
    for key in place:
        found = _pair(node, key)
        if found is not None:
            line, node = found[0].start_mark.line + 1, found[1]
        if found is not None or (error["type"] == "missing" and key is place[-1]):
            named.append(key)
    text = "no such option" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
    while error["type"] == "value_error":  # our own: below that place, the option that is named first
        keys = [pair for pairs in _mappings(node) for pair in pairs]
        at = [re.search(rf"(?<![\w-]){re.escape(str(key.value))}(?![\w-])", text.split(";")[0]) for key, _ in keys]
        found = min(((match.start(), pair) for match, pair in zip(at, keys, strict=True) if match), key=lambda f: f[0],
                    default=None)  # fmt: skip
        if found is None:
            break
        line, node = found[1][0].start_mark.line + 1, found[1][1]
    return f"line {line}, {'.'.join(named)}: {text}"
