"""``training`` is imported from the repository's root, which pytest's importlib mode leaves off ``sys.path``."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder():
    from training.tokenizer import FastEncoder

    return FastEncoder()


@pytest.fixture(scope="session")
def tokenizer():
    from training.tokenizer import build

    return build()
