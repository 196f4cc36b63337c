"""Triton reads this once, at its first import, wherever in the suite that happens: no GPU, so its interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
