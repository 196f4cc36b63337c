"""A server per module over the session's embedded draft; and this folder on the path, for ``live_server``."""

import contextlib
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode leaves the folders of tests off the path
from live_server import Live  # noqa: E402


@pytest.fixture(scope="session")
def serving(draft_model):
    @contextlib.contextmanager
    def make(llm=draft_model, scale=None, **config):
        live = Live(llm, scale, **config)
        try:
            yield live
        finally:
            live.close()

    return make


@pytest.fixture(scope="module")
def live(serving):
    with serving() as live:
        yield live


@pytest.fixture
def slowly(draft_model, monkeypatch):
    """Makes every step of an engine take so many seconds longer."""

    def slow(seconds, llm=draft_model):
        step = llm.engine.step
        monkeypatch.setattr(llm.engine, "step", lambda: (time.sleep(seconds), step())[1])

    return slow
