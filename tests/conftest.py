"""The tests compute on the CPU, where a seed fixes every bit, on a machine with a GPU too."""
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # before torch, and for the scripts they run
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".github")]
import common
import linear_eval
import processes

torch.set_num_threads(1)                                # as in processes.py


def forget():
    """The files that were read, as a new process would."""
    common.read_source.cache_clear()
    common.source_files.cache_clear()


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    forget()


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


@pytest.fixture
def command(small, monkeypatch, capsys):
    """`command(script, *flags)` runs a script here: its exit status, its stdout, its stderr."""
    def command(script, *flags):
        monkeypatch.setattr(sys, "argv", processes.argv(script, flags))
        common.load_images.cache_clear()
        forget()
        capsys.readouterr()
        try:
            common.launch(importlib.import_module(script).main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return command


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that makes a Run on 64 gray images, whose evaluation gives `accuracy`."""
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    images = torch.full((64, 3, 32, 32), 127, dtype=torch.uint8)

    def make(accuracy=50.0, evaluation=None, **flags):
        args = dict(run_dir=str(tmp_path / "run"), file=common.__file__, dataset="synthetic",
                    data_dir="", seed=0, device="cpu", precision="fp32", batch_size=8, epochs=2,
                    lr=1.0, eval_every=0)
        return common.Run(SimpleNamespace(**{**args, **flags}), images,
                          lambda *_, **__: {"linear": accuracy, "evaluation": evaluation})
    return make
