"""The keeper under a clock of the test's, before a cluster that does what the test says."""

import math

import pytest

pytest.importorskip("pydantic", reason="needs the extra [serve]")
from fronts import Running  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402

from slipstream.deploy.config import Deployment, Range  # noqa: E402
from slipstream.deploy.keeper import Keeper, Need  # noqa: E402


class World:
    """A cluster as dictionaries: who runs, with which facts; what the entrance was told, and what it sees."""

    def __init__(self):
        self.actors, self.broken, self.told, self.chains, self.down_s = {}, {}, {}, {}, {}
        self.log, self.now = [], 100.0

        async def fleet(request):
            self.told = await request.json()
            seen = {
                row["name"]: {
                    "up": row["name"] not in self.down_s, "chains": self.chains.get(row["name"], 0),
                    "down_s": self.down_s.get(row["name"], 0.0),
                }
                for row in self.told["replicas"]
            }  # fmt: skip
            return JSONResponse({"replicas": seen})

        self.front = Running(Starlette(routes=[Route("/fleet", fleet, methods=["PUT"])]))
        self.close = self.front.close

    def names(self):
        return list(self.actors)

    def start(self, name, pool):
        assert name not in self.actors
        self.log.append(("start", name))
        self.actors[name] = {"address": f"host:{len(self.log)}", "key": "k", "rank": None, "new_rank": None}

    def start_entrance(self):
        self.log.append(("start", "entrance"))
        self.actors[self.config.front_name] = {"address": self.front.url[7:], "key": "secret"}

    def facts(self, name):
        if name in self.broken:
            raise RuntimeError(self.broken[name])
        return self.actors[name]

    def restart(self, name):
        self.log.append(("restart", name))

    def remove(self, name):
        self.log.append(("remove", name))
        self.actors.pop(name, None)

    def keep(self, stamp="", ticks=4, **config):
        self.config = Deployment(**({"name": "d", "drain_s": 10, "pools": POOLS} | config))
        keeper = Keeper(self.config, stamp, self, lambda: self.now)
        self.pass_time(keeper, ticks)
        return keeper

    def pass_time(self, keeper, ticks, seconds=1.0):
        for _ in range(ticks):
            self.now += seconds
            keeper.tick()

    def replicas(self):
        return sorted("/".join(name.split("/")[1:3]) for name in self.actors if "entrance" not in name)


POOLS = {"a": {"model": "slipstream-draft", "replicas": 2}, "b": {"model": "slipstream-target"}}


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def pool(**changes):
    return {"a": POOLS["a"] | changes}


def test_what_is_described_is_started_and_told(world):
    keeper = world.keep()
    assert world.replicas() == ["a/0", "a/1", "b/0"] and [what for what, _ in world.log] == ["start"] * 4
    assert world.told["models"] == {"slipstream-draft": "a", "slipstream-target": "b"}
    assert {row["name"]: row["is_leaving"] for row in world.told["replicas"]} == dict.fromkeys(world.replicas(), False)
    status = keeper.status()
    assert status["ready"] and status["key"] == "secret" and status["entrance"] == world.front.url
    assert [row["state"] for row in status["pools"]["a"]["replicas"]] == ["up", "up"]
    world.down_s["a/1"] = 3.0
    world.pass_time(keeper, 1)
    assert not keeper.status()["ready"] and keeper.status()["pools"]["a"]["replicas"][1]["state"] == "not answering"


def test_another_keeper_goes_on_with_what_is_there(world):
    world.keep()
    before = len(world.log)
    keeper = world.keep()
    assert len(world.log) == before and keeper.status()["ready"]
    world.keep(pools={"b": POOLS["b"]})
    assert world.replicas() == ["b/0"]
    world.keep(pools={"b": POOLS["b"]}, entrance={"port": 7})
    assert [what for what, _ in world.log[-2:]] == ["remove", "start"]


def test_another_configuration_rolls_one_at_a_time(world):
    world.keep(pools=pool())
    old = set(world.actors)
    world.chains = {"a/0": 2, "a/1": 2}
    keeper = world.keep(pools=pool(engine={"max_model_len": 512}), ticks=6)
    leaving = [row["name"] for row in world.told["replicas"] if row["is_leaving"]]
    assert leaving == ["a/0"] and len(old & set(world.actors)) == 3  # it has something to do
    world.chains = {"a/1": 2}
    world.pass_time(keeper, 3)
    assert len(old & set(world.actors)) == 2 and world.replicas() == ["a/0", "a/1"]
    world.pass_time(keeper, 9)
    assert "a/1" in [row["name"] for row in world.told["replicas"] if row["is_leaving"]]
    world.pass_time(keeper, 6)  # beyond drain_s: what it has is lost
    assert len(old & set(world.actors)) == 1 and keeper.status()["ready"]  # the entrance is as it was


def test_a_roll_waits_for_the_new_one(world):
    world.keep(pools=pool())
    world.down_s["a/0"] = 1.0
    keeper = world.keep(pools=pool(), stamp="again", ticks=8)
    assert len([name for name in world.actors if name.endswith(keeper._digests["a"])]) == 1
    world.down_s.clear()
    world.pass_time(keeper, 8)
    assert keeper.status()["ready"] and keeper.status()["stamp"] == "again"


def test_what_cannot_start_is_tried_again_ever_more_seldom(world):
    keeper = world.keep(pools=pool(replicas=1))
    (name,) = [name for name in world.actors if "/a/" in name]
    world.broken[name] = "no such model"
    world.log.clear()
    world.pass_time(keeper, 60)
    state = keeper.status()["pools"]["a"]["replicas"][0]["state"]
    starts = [what for what, _ in world.log].count("start")
    assert "no such model" in state and 4 <= starts <= 6
    world.broken.clear()
    world.pass_time(keeper, 70)
    assert keeper.status()["ready"] and keeper._seats["a"][0].failures == 0


def test_what_hangs_or_lost_its_cache_rank_is_restarted_once(world):
    keeper = world.keep(hung_s=5, start_s=30)
    world.down_s["a/0"] = 4.0
    world.pass_time(keeper, 2)
    assert world.log[-1][0] == "start"
    world.down_s["a/0"] = 6.0
    world.pass_time(keeper, 10)
    assert [name.split("/")[2] for what, name in world.log if what == "restart"] == ["0"]
    world.pass_time(keeper, 25)
    assert sum(what == "restart" for what, _ in world.log) == 2  # it hung again
    (name,) = [name for name in world.actors if "/b/" in name]
    world.actors[name] |= {"rank": "x:1", "new_rank": "x:1"}
    world.down_s.clear()
    world.pass_time(keeper, 2)
    assert sum(what == "restart" for what, _ in world.log) == 2
    world.actors[name]["new_rank"] = "y:1"
    world.pass_time(keeper, 2)
    assert world.log[-1] == ("restart", name)


def test_replicas_follow_the_load(world):
    grown = pool(replicas={"least": 1, "most": 3, "chains": 4, "up_s": 2, "down_s": 5})
    keeper = world.keep(pools=grown)
    assert world.replicas() == ["a/0"]
    world.chains = {"a/0": 20}
    world.pass_time(keeper, 2)
    assert world.replicas() == ["a/0"]
    world.pass_time(keeper, 3)
    assert world.replicas() == ["a/0", "a/1", "a/2"]
    world.chains = {"a/2": 3}
    world.pass_time(keeper, 8)
    assert world.replicas() == ["a/0", "a/1", "a/2"] and keeper._needs["a"].count == 2
    world.chains = {}
    world.pass_time(keeper, 12)
    assert world.replicas() == ["a/0"] and keeper.status()["ready"]
    assert world.keep(pools=grown)._needs["a"].count == 1


def test_need_is_within_its_bounds_and_patient():
    need = Need(Range(least=1, most=4, chains=10, up_s=3, down_s=6), 2)
    found = [need.decide(chains, t) for t, chains in enumerate([35, 35, 15, 35, 35, 35, 35, 99, 99, 99, 99])]
    assert found == [2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4]  # one moment of less begins the wait anew
    fewer = [need.decide(0, 20 + t) for t in range(30)]
    assert [fewer.count(n) for n in (4, 3, 2, 1)] == [6, 7, 7, 10]  # one at a time
    assert need.decide(0, math.inf) == 1


def test_an_entrance_that_does_not_answer_is_told(world):
    keeper = world.keep()
    world.actors[world.config.front_name]["address"] = "127.0.0.1:9"
    world.pass_time(keeper, 1)
    assert "does not answer" in keeper.status()["trouble"] and not keeper.status()["ready"]
    world.broken[world.config.front_name] = "port in use"
    world.pass_time(keeper, 1)
    assert keeper.status()["trouble"] == "port in use" and world.log[-1] == ("start", "entrance")
    world.broken.clear()
    world.pass_time(keeper, 1)
    assert keeper.status()["ready"]
