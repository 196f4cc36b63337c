"""This folder and the server's harness on the path, and what these tests start."""

import contextlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "server"):
    sys.path.append(str(folder))  # pytest's importlib mode leaves the folders of tests off the path

from fronts import Fronted  # noqa: E402
from live_server import Live  # noqa: E402


@pytest.fixture
def running():
    """``running(kind, ...)``: closed after the test, the last first."""
    with contextlib.ExitStack() as stack:

        def start(kind, *args, **kwargs):
            made = kind(*args, **kwargs)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture(scope="session")
def two_models(draft_model):
    from slipstream import LLM

    return [draft_model, LLM("slipstream-draft", device="cpu", max_model_len=2048, kv_memory="64MiB")]


@pytest.fixture
def before_engines(running, two_models):
    """An entrance before two servers of the embedded draft."""
    replicas = {f"m/{i}": running(Live, llm, served_model_name="m") for i, llm in enumerate(two_models)}
    front = running(Fronted, replicas)
    front.all_up(2)
    front.replicas = replicas
    return front
