"""The only file that knows Ray: one actor per process of ours, restarted by Ray, placed by placement groups. Ray
carries no token and no request."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path
from typing import Any

from slipstream.atts.servers import VLLMServer
from slipstream.build import find_model
from slipstream.deploy import warden
from slipstream.deploy.config import Deployment, Pool
from slipstream.deploy.keeper import Keeper
from slipstream.text import Codec

NAMESPACE = "slipstream"
_CALL_S, _GONE_S, _POLL_S = 15.0, 30.0, 0.1


def connect() -> Any:
    """Ray's module, connected. ``ValueError`` where it is not installed or there is no cluster."""
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("ray is not installed: pip install 'slipstream[scale]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r}: `ray start --head`, or name one in RAY_ADDRESS ({error})"
            ) from error
    return ray


class RayCluster:
    """Where things run, each under a name. Nothing here waits."""

    def __init__(self, config: Deployment, front_node: str) -> None:
        self._config, self._front_node, self._ray = config, front_node, connect()
        self._ray.cloudpickle.register_pickle_by_value(warden)
        self._calls: dict[str, Any] = {}  # that are under way, one an actor
        self._known: dict[str, dict[str, Any] | None] = {}

    def names(self) -> list[str]:
        return _names(self._ray, self._config.name)

    def start(self, name: str, pool: Pool) -> None:
        """A replica, and its cache rank where the pool has them."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Place

        spec: dict[str, Any] = {"kind": "engine", "model": pool.model, "name": pool.served}
        spec |= {"engine": pool.engine if pool.gpus else {"device": "cpu"} | pool.engine}
        spec |= {"server": {"drain_s": self._config.drain_s} | pool.server}
        if pool.cache_rank is None:
            self._actor(name, spec, pool.needs[0], "SPREAD")
            return
        util, rank = self._ray.util, pool.cache_rank
        strategy = "STRICT_SPREAD" if rank.where == "apart" else "STRICT_PACK"
        util.placement_group(pool.needs, strategy=strategy, name=name, lifetime="detached")
        group = util.get_placement_group(name)
        other: dict[str, Any] = {
            "kind": "cache_rank",
            "device": "cuda" if rank.gpus else "cpu",
            "kv_memory": rank.kv_memory,
        }
        other |= {"key": secrets.token_hex(16), "port": random.randrange(20_000, 30_000)}  # the same after a restart
        self._actor(f"{name}/rank", other, pool.needs[1], Place(group, 1))
        self._actor(name, spec, pool.needs[0], Place(group, 0), f"{name}/rank")

    def start_entrance(self) -> None:
        front = self._config.entrance
        spec = {"kind": "entrance", "front": front.model_dump(), "drain_s": self._config.drain_s, "host": front.host}
        self._actor(self._config.front_name, spec, {}, _at(self._front_node))

    def _actor(self, name: str, spec: dict[str, Any], needs: dict[str, float], where: Any, rank: Any = None) -> None:
        own = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0), "memory": needs.get("memory")}
        actor = self._ray.remote(warden.Warden).options(
            name=name, lifetime="detached", max_restarts=-1, max_concurrency=1, scheduling_strategy=where, **own
        )
        actor.remote(spec, self._config.start_s, rank)

    def facts(self, name: str) -> dict[str, Any] | None:
        """What a replica or the entrance says of itself (``Warden.where``), and new_rank: where its cache rank is by
        now. None while it starts (again); ``RuntimeError`` when it never will."""
        facts = self._where(name)
        rank = self._where(f"{name}/rank") if facts and facts["rank"] else {"address": None}
        return facts | {"new_rank": rank["address"]} if facts and rank else None

    def _where(self, name: str) -> dict[str, Any] | None:
        ray = self._ray
        try:
            if name not in self._calls:
                self._calls[name] = ray.get_actor(name).where.remote()
            if ray.wait([self._calls[name]], timeout=0)[0]:
                self._known[name] = ray.get(self._calls.pop(name), timeout=_CALL_S)
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
            self._known[name] = None
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError, ValueError) as error:
            raise RuntimeError(_reason(error)) from error
        return self._known.get(name)

    def restart(self, name: str) -> None:
        self._known[name] = None
        self._ray.kill(self._ray.get_actor(name), no_restart=False)

    def remove(self, name: str) -> None:
        for each in (name, f"{name}/rank"):
            self._calls.pop(each, None)
            self._known.pop(each, None)
        _remove(self._ray, name)


class KeeperActor(Keeper):
    """A keeper from what Ray can carry and keep: the same after a restart."""

    def __init__(self, config: str, stamp: str, node: str) -> None:
        told = Deployment.model_validate_json(config)
        super().__init__(told, stamp, RayCluster(told, node))


def _at(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _names(ray: Any, deployment: str) -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]
    return [name for name in names if name.startswith(f"{deployment}/")]


def _remove(ray: Any, name: str) -> None:
    """An actor, its cache rank's and their place, as far as they are there."""
    for each in (name, f"{name}/rank"):
        if each in _names(ray, name.split("/")[0]):
            ray.kill(ray.get_actor(each, namespace=NAMESPACE))
    if any(
        group["name"] == name and group["state"] != "REMOVED" for group in ray.util.placement_group_table().values()
    ):
        ray.util.remove_placement_group(ray.util.get_placement_group(name))


def _reason(error: BaseException) -> str:
    """The last line of what Ray says: what the process said at its end."""
    return str(error).strip().splitlines()[-1].strip()


# -- what the command line asks


def check_fits(ray: Any, config: Deployment) -> None:
    """``ValueError`` for a replica that no node could ever hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, pool in config.pools.items():
        needs = pool.needs
        if pool.cache_rank is not None and pool.cache_rank.where == "beside":
            needs = [{kind: sum(each.get(kind, 0) for each in needs) for kind in needs[0] | needs[1]}]
        for each in needs:
            if not any(all(node.get(kind, 0) >= count for kind, count in each.items()) for node in nodes):
                raise ValueError(f"pool {name}: no node of the cluster has {each}; there is {nodes}")
        if len(needs) > len(nodes):
            raise ValueError(f"pool {name}: a cache rank apart needs two nodes, the cluster has {len(nodes)}")


def deploy(config: Deployment, restart: bool = False) -> None:
    """Start what is described, or change what runs into it. Returns when the keeper is at work."""
    ray = connect()
    check_fits(ray, config)
    stamp, name = "", f"{config.name}/keeper"
    if name in _names(ray, config.name):
        stamp = status(config.name)["stamp"]
        _remove(ray, name)
    here, until = ray.get_runtime_context().get_node_id(), time.monotonic() + _GONE_S
    while name in _names(ray, config.name) and time.monotonic() < until:
        time.sleep(_POLL_S)
    ray.remote(KeeperActor).options(
        name=name, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, num_cpus=0, scheduling_strategy=_at(here)
    ).remote(config.model_dump_json(), str(time.time()) if restart else stamp, here)
    status(config.name, _GONE_S)


def status(deployment: str, limit_s: float = _CALL_S) -> dict[str, Any]:
    ray, name = connect(), f"{deployment}/keeper"
    if name not in _names(ray, deployment):
        raise ValueError(f"there is no deployment {deployment!r} on this cluster")
    try:
        found: dict[str, Any] = ray.get(ray.get_actor(name, namespace=NAMESPACE).status.remote(), timeout=limit_s)
        return found
    except ray.exceptions.RayError as error:
        raise ValueError(f"the keeper of {deployment!r} does not answer: {_reason(error)}") from error


def stop(deployment: str, drain_s: float) -> int:
    """End it all: the keeper, the entrance in order, everybody else. Returns how many actors there were."""
    ray = connect()
    names = _names(ray, deployment)
    if not names:
        raise ValueError(f"there is no deployment {deployment!r} on this cluster")
    order = {"keeper": 0, "entrance": 1}
    for name in sorted(names, key=lambda name: order.get(name.split("/")[1], 2)):
        if name.split("/")[1] == "entrance":
            actor = ray.get_actor(name, namespace=NAMESPACE)
            ray.wait([actor.stop.remote(drain_s)], timeout=drain_s + _CALL_S)
        _remove(ray, name)
    until = time.monotonic() + _GONE_S
    while _names(ray, deployment) and time.monotonic() < until:
        time.sleep(_POLL_S)
    return len(names)


def open_pool(address: str) -> VLLMServer:
    """``ray://[DEPLOYMENT/]POOL`` as a backend of test-time scaling, with the model's tokenizer where that is here."""
    deployment, _, pool = address.removeprefix("ray://").rpartition("/")
    found = status(deployment or NAMESPACE)
    if pool not in found["pools"] or found["entrance"] is None:
        there = f"the pools {', '.join(found['pools'])} at the entrance {found['entrance']}"
        raise ValueError(f"{address}: deployment {found['deployment']!r} has {there}")
    told = found["pools"][pool]
    folder = find_model(told["source"])
    codec = Codec.load(folder) if Path(folder).is_dir() else None
    return VLLMServer(found["entrance"], told["model"], codec=codec, api_key=found["key"])
