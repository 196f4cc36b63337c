"""A deployment's file is checked whole before anything starts, and every mistake names its line."""

import pytest

pytest.importorskip("pydantic", reason="needs the extra [serve]")
from slipstream.deploy.config import Deployment, Pool, read  # noqa: E402

GOOD = """
name: test
entrance: {port: 0}
pools:
  target:
    model: slipstream-target
    replicas: {least: 1, most: 3, chains: 8}
    engine: {device: cpu, max_model_len: 2048, kv_memory: 64MiB, attention: {method: asyncspade, budget: 256}}
    server: {max_queue: 100}
    cache_rank: {where: apart}
  draft:
    model: slipstream-draft
    replicas: 2
"""


def test_a_good_file(tmp_path):
    (tmp_path / "d.yaml").write_text(GOOD)
    found = read(tmp_path / "d.yaml")
    assert found.pools["target"].replicas.most == 3 and found.pools["draft"].replicas == 2
    assert found.pools["target"].needs == [{"CPU": 1}, {"CPU": 1}] and found.pools["draft"].served == "slipstream-draft"
    assert found.pools["target"].cache_rank.where == "apart" and found.entrance.host == "127.0.0.1"


POOL = "pools:\n  t:\n    model: slipstream-draft\n    "
BAD = [
    ("pools:\n  t:\n    model: slipstream-darft", 3, "did you mean 'slipstream-draft'"),
    (POOL + "engine:\n      atention: quest", 5, "did you mean 'attention'"),
    (POOL + "engine: {attention: {method: quest, bdget: 3}}", 4, "'bdget'; did you mean 'budget'"),
    (POOL + "engine: {max_model_len: x}", 4, "must be a positive integer"),
    (POOL + "engine: {attention: qest}", 4, "did you mean 'quest'"),
    (POOL + "replcas: 3", 4, "no such option"),
    (POOL + "replicas: 0", 4, "greater than or equal to 1"),
    (POOL + "replicas:\n      least: 3\n      most: 2", 4, "below least"),
    (POOL + "memory: 3 apples", 4, "apples"),
    (POOL + "server: {port: 3}", 4, "no option 'port'"),
    (POOL + "server: {max_n: 0}", 4, "max_n must be at least 1"),
    (POOL + "gpus: 1\n    engine: {tensor_parallel_size: 2}", 4, "2 ranks need as many whole gpus"),
    (POOL + "gpus: 1.5", 4, "whole gpus"),
    (POOL + "gpus: 0.5", 2, "kv_memory"),
    (POOL + "engine: {device: cuda}", 4, "the pool has 0 gpus"),
    (POOL + "gpus: 1\n    engine: {device: 'cuda:1'}", 5, "the pool has 1 gpus"),
    (POOL + "gpus: 1\n    engine:\n      device: gpu", 6, "cpu, cuda or cuda:N"),
    (POOL + "cache_rank: {where: apart}", 4, "for attention asyncspade"),
    (POOL + "engine: {tensor_parallel_size: 2, attention: asyncspade}\n    cache_rank: {}", 5, "of one rank"),
    (POOL + "engine: {attention: asyncspade}\n    cache_rank: {where: there}", 5, "beside"),
    (POOL + "cpus: -1", 4, "greater than or equal to 0"),
    (POOL + "x: 1\n    y: 2", 5, "no such option"),
    ("pools:\n  t: {}", 2, "Field required"),
    ("pools: {}", 1, "at least 1 item"),
    ("pools:\n  A b: {model: slipstream-draft}", 2, "pattern"),
    (
        "pools:\n  a: {model: slipstream-draft}\n  b: {model: slipstream-draft}",
        3,
        "'b' serves a model of the same name",
    ),
    ("x: &a {cpus: -1}\npools:\n  t:\n    <<: *a\n    model: slipstream-draft", 1, "pools.t.cpus"),
    (POOL + "replicas: 2\n    replicas: 3", 5, "'replicas' is set twice"),
    ("pools: &a\n  t: *a", 2, "Field required"),
    (POOL + "replicas: true", 4, "valid integer"),
    (POOL + "gpus: '1'", 4, "valid number"),
    (POOL + "name: ''", 4, "at least 1 character"),
    (POOL + "replicas: {least: 1}", 4, "pools.t.replicas.most: Field required"),
    (POOL + "server:\n      max_queue: many", 5, "max_queue must be of type int, got 'many'"),
    (POOL + "name: \udce9", 4, "not YAML: unexpected end of data"),
    ("pools: " + "[" * 5000, 1, "not YAML: maximum recursion"),
    ("pools:\n  a: {model: slipstream-draft}\nentrance:\n  port: 99999", 4, "65535"),
    ("pools: [", 1, "not YAML"),
    ("- 1", None, "begins with 'pools:'"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD, ids=[words for _, _, words in BAD])
def test_a_mistake_names_its_line(tmp_path, text, line, words):
    file = tmp_path / "d.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        read(file)
    assert words in str(caught.value) and str(file) in str(caught.value)
    assert line is None or f"line {line}" in str(caught.value)


def test_a_digest_names_what_a_replica_is_and_not_how_many():
    pool = Pool(model="slipstream-draft")
    same = pool.model_copy(update={"replicas": 5})
    other = pool.model_copy(update={"engine": {"max_model_len": 100}})
    assert pool.digest("") == same.digest("") != other.digest("") and pool.digest("") != pool.digest("again")
    assert Deployment(pools={"a": pool}).entrance.port == 8000
