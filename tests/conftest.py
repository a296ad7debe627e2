"""The tests compute on the CPU, where a seed fixes every bit, on a machine with a GPU too."""
import os
import sys
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before torch, and for the scripts they run
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".github")]
import common
import linear_eval


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch):
    """Synthetic data of 200 and 40 images, and a probe of two epochs, as in processes.py."""
    monkeypatch.setattr(common, "draw_shapes", partial(
        lambda draw, n, seed: draw(n // 25, seed), common.draw_shapes))
    monkeypatch.setitem(linear_eval.METRICS, "linear", partial(linear_eval.linear_accuracy,
                                                               epochs=2))
    common.load_images.cache_clear()
    yield
    common.load_images.cache_clear()
