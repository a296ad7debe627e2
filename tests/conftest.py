"""The tests compute on the CPU, where a seed fixes every bit, on a machine with a GPU too."""
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before torch, and for the scripts they run
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".github")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
