"""What many tests share: the embedded models, a tiny random one, and a look at what each test left behind."""

import os
import signal

import pytest
import torch

# Triton reads this once, at its first import, wherever in the suite that happens: no GPU, so its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Whoever starts the suite in the background of a shell has it ignore Ctrl-C, and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 63,
}


def load(model, **options):
    from slipstream import LLM  # seconds of imports that most rooms' tests do not need

    return LLM(model, **({"device": "cpu"} | options))


@pytest.fixture(scope="session")
def target_model():
    return load("slipstream-target", max_model_len=4096, kv_memory="256MiB")


@pytest.fixture(scope="session")
def draft_model():
    return load("slipstream-draft", max_model_len=2048, kv_memory="64MiB")


@pytest.fixture
def target(target_model):
    """The embedded target; after the test nothing of it may be left in the engine."""
    yield target_model
    at_rest(target_model)


@pytest.fixture
def draft(draft_model):
    yield draft_model
    at_rest(draft_model)


@pytest.fixture
def tiny():
    """Makes models of two layers and 64 tokens with random weights and no tokenizer; ``tiny(**options)``."""
    made = []

    def make(config=TINY, **options):
        made.append(load(config, **({"load_format": "dummy", "kv_memory": "1MiB"} | options)))
        return made[-1]

    yield make
    for llm in made:
        at_rest(llm)


def at_rest(llm):
    """Nothing waits, runs or holds a page, and the page table is whole."""
    llm.close()
    stats = llm.stats()
    assert (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0)
    llm.engine.table.check_integrity()
