"""The composition root: options, names and devices become parts that fit together; mistakes are found before work."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from slipstream import LLM, Full, Quest, SamplingParams, Tova, TwoLevel, build, calibrate, cli
from slipstream.attention.calibration import FILE_NAME
from slipstream.attention.dense import DenseBackend
from slipstream.attention.sparse import SparseBackend
from slipstream.attention.tova import TovaBackend
from slipstream.build import ATTENTION, Options
from slipstream.types import ModelSpec


def test_every_option_says_what_it_is_and_has_a_default():
    for option in fields(Options):
        assert option.metadata["help"].strip() and getattr(Options(), option.name) == option.default
    with pytest.raises(TypeError, match="Options has no option 'kv_memry'; did you mean 'kv_memory'"):
        Options(kv_memry="1GiB")


def test_attention_in_three_spellings():
    assert build.parse_attention("full") == build.parse_attention({"method": "full"}) == build.parse_attention(Full())
    for name, config in ATTENTION.items():
        assert build.parse_attention(name) == build.parse_attention({"method": name}) == config()
        assert build.method_of(config()) == name
    assert build.parse_attention({"method": "two_level", "budget": 512, "blocks": 9}) == TwoLevel(512, blocks=9)


def test_devices():
    assert build.choose_device("cpu") == build.choose_device(torch.device("cpu")) == torch.device("cpu")
    assert build.choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_models_by_name_path_or_config(tmp_path, monkeypatch):
    assert build.find_model("slipstream-draft") == build.embedded_models()["slipstream-draft"]
    for other in (str(tmp_path), tmp_path, "Qwen/Qwen3-8B", {"model_type": "qwen3"}):
        assert build.find_model(other) is other
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    assert build.find_model("mine") == "mine"


@pytest.mark.parametrize("given", [
    {"attention": {"method": "quest", "budget": 9}}, {"attention": "two_level", "page_size": 32},
    {"kernels": "triton"}, {"kv_memory": "lots"}, {"attention": "ful"}, {"device": "tpu"}, {"page_size": 0},
    {"kernels": None}, {"max_num_seqs": None},
])  # fmt: skip
def test_mistakes_are_found_before_weights_are_read(given, monkeypatch):
    monkeypatch.setattr(build, "load_model", lambda *args, **more: pytest.fail("weights were read"))
    with pytest.raises(ValueError):
        LLM("slipstream-target", **({"device": "cpu"} | given))


def test_parts_fit_together(tiny):
    options = {"page_size": 8, "max_num_seqs": 5, "max_batch_tokens": 33, "max_model_len": 77, "seed": 4}
    llm = tiny(**options, kv_memory="128KiB", dtype="bfloat16", prefix_cache=False, cuda_graphs=False)
    assert llm.spec.max_position == 77 and llm.spec.dtype == llm.pool.k.dtype == llm.model.dtype == torch.bfloat16
    assert llm.memory.page_size == llm.pool.page_size == 8 and llm.pool.bytes == llm.memory.bytes == 128 << 10
    config = llm.engine.config
    assert (config.max_num_seqs, config.max_batch_tokens, config.seed, config.prefix_cache) == (5, 33, 4, False)
    assert llm.engine.limits.max_model_len == 77 and not llm.engine.overlap and not config.cuda_graphs
    assert llm.device == torch.device("cpu") and not llm.engine.table.reuse
    assert tiny(overlap=True).engine.overlap


def test_the_cpu_has_one_backend():
    for kernels in ("auto", "reference"):
        chosen = Options(device="cpu", kernels=kernels, max_model_len=64, kv_memory="1MiB")
        parts = build.build("slipstream-draft", chosen)
        assert isinstance(parts.backend, DenseBackend) and parts.codec is not None and parts.name == "slipstream-draft"


def test_the_seed_decides_requests_that_bring_none():
    params = SamplingParams(temperature=5.0, max_tokens=8, ignore_eos=True)
    options = {"device": "cpu", "max_model_len": 64, "kv_memory": "1MiB"}
    first, same, other = (
        [o.outputs[0].token_ids for o in LLM("slipstream-draft", seed=seed, **options).generate([[5, 6]] * 2, params)]
        for seed in (8, 8, 9)
    )
    assert first == same != other and first[0] != first[1]


def test_a_step_keeps_memory_for_itself():
    small, large = (ModelSpec("x", 2, size, 8, 2, 16, 1000, 128, torch.bfloat16) for size in (64, 4096))
    assert 512 << 20 < build.activation_bytes(small, 512) < build.activation_bytes(large, 512)
    assert build.activation_bytes(large, 512) < build.activation_bytes(large, 4096) < 2 << 30


# attention methods


@pytest.mark.parametrize("attention", [
    "window", {"method": "quest", "block": 8}, {"method": "double_sparsity", "channels": 10},
    {"method": "two_level", "block": 4, "blocks": 300, "channels": 6, "block_score": "minmax4x16"},
])  # fmt: skip
def test_an_index_is_paid_for_from_the_same_memory(tiny, attention):
    llm = tiny(attention=attention, page_size=8, kv_memory="1MiB")
    backend = llm.engine.backend
    assert isinstance(backend, SparseBackend) and llm.stats()["index_bytes"] == (
        backend.index.bytes if backend.index else 0
    )
    assert 2**20 - llm.memory.page_bytes <= llm.pool.bytes + llm.stats()["index_bytes"] <= llm.memory.bytes <= 2**20


def test_seats_are_paid_for_from_the_same_memory(tiny):
    seats = 3 * (40 * 256 + 16)
    llm = tiny(attention=Tova(40), max_num_seqs=2, page_size=8, kv_memory=seats + 5 * 8 * 256)
    backend = llm.engine.backend
    assert isinstance(backend, TovaBackend) and llm.memory.num_pages == 5 and llm.memory.fixed_bytes == seats
    assert llm.pool.bytes + backend.k.nbytes + backend.v.nbytes + backend.victims.nbytes == llm.memory.bytes
    with pytest.raises(ValueError, match=f"beside {seats:,} bytes of seats, but only 9,000 bytes are given"):
        tiny(attention=Tova(40), max_num_seqs=2, page_size=8, kv_memory=9000)


def test_the_gate_of_a_method(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    gates = {None: 4 * 96, 700: 700, 5: 96, 0: 96}
    for given, gate in gates.items():
        llm = tiny(attention=Quest(96, sink=2, recent=4, min_context=given), page_size=16)
        assert llm.engine.backend.gate == gate and llm.engine.backend.dense_layers == 2


def test_a_calibration_beside_the_model_is_used(tmp_path):
    for file in build.embedded_models()["slipstream-draft"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    options = {"device": "cpu", "max_model_len": 256, "kv_memory": "8MiB"}
    found = calibrate(LLM("slipstream-draft", attention="window", **options), ["What is 3 + 4?"])
    found.save(tmp_path / FILE_NAME)
    attention = {"method": "double_sparsity", "channels": 16}
    llm = LLM(str(tmp_path), attention=attention, **options)
    assert torch.equal(llm.engine.backend.index.labels(3).channels, found.channels(16)[3])
    with pytest.raises(ValueError, match="is the calibration of slipstream-draft .*, not of slipstream-target"):
        LLM("slipstream-target", attention=attention | {"calibration": str(tmp_path / FILE_NAME)}, **options)


def test_flags_of_attention_methods():
    @cli.engine_options
    def command(engine: dict, block: int | None = None):
        return engine["attention"], block

    given = {option.name: option.default for option in fields(Options)}
    flags = {name for config in ATTENTION.values() for name in config.__dataclass_fields__} - {"block"}
    assert {"budget", "block_score", "calibration", "min_context"} < flags
    given |= dict.fromkeys(flags)
    assert command(**given, block=3) == ("full", 3)  # a command's own parameter stays its own
    chosen = {"attention": "two_level", "budget": 512, "deviation": 0.5, "dense_layers": 0}
    expected = {"method": "two_level", "budget": 512, "deviation": 0.5, "dense_layers": 0}
    assert command(**(given | chosen), block=None)[0] == expected
    with pytest.raises(ValueError, match="attention method 'quest' has no option 'channels'"):
        command(**(given | {"attention": "quest", "channels": 8}), block=None)
