"""Makes ``one_chain``, and the engine tests' ``tiny_decoder`` and ``test_capture``, importable."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "engine")]  # pytest's importlib mode leaves the folders of tests off the path
torch.set_num_threads(1)
