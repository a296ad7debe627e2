"""Each recipe is applied as README says, trains three steps, evaluates, and resumes exactly."""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import processes
from common import draw_shapes

ROOT = Path(__file__).parents[1]
FLAGS = ["--smoke", "--subset", "48", "--width", "8", "--batch-size", "16", "--epochs", "2",
         "--ebm-iters", "1", "--precision", "fp32", "--run-dir", "run", "--ebm", "ebm.pt"]
RECIPES = {"simsiam": "byol_disc", "encoder": "byol_disc", "feature_view": "byol_disc",
           "image_view": "byol_langevin", "dataset": "common"}


def work(directory, script, flags, kill):
    """Run a script of the directory, with the common.py beside it; `kill` it in the second epoch."""
    os.chdir(directory)
    for name in ("common", "linear_eval"):
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    common, linear_eval = sys.modules["common"], sys.modules["linear_eval"]
    common.CHECKPOINT_SECONDS, draw = -1, common.draw_shapes
    common.draw_shapes = lambda n, seed: draw(n // 25, seed)
    linear_eval.METRICS["linear"] = partial(linear_eval.linear_accuracy, epochs=2)
    end_round = common.Progress.end_round

    def mortal(progress, done, row, text):
        if kill and progress.counter == "epoch" and done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        end_round(progress, done, row, text)

    common.Progress.end_round = mortal
    sys.argv = [script, *FLAGS, *flags]
    sys.stdout, sys.stderr = open("out", "a"), open("err", "a")
    common.launch(module.main)


def run(*args):
    process = processes.CONTEXT.Process(target=work, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_evaluates_and_resumes(recipe, tmp_path):
    patch = ROOT / "tests" / "recipes" / f"{recipe}.diff"
    for directory in (tmp_path / "whole", tmp_path / "killed"):
        directory.mkdir()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, directory)
        target = "common" if recipe == "dataset" else recipe
        subprocess.run(["patch", "-s", f"{RECIPES[recipe]}.py", patch, "-o", "patched"], check=True,
                       cwd=directory)
        (directory / "patched").rename(directory / f"{target}.py")
    script, flags = recipe, []
    if recipe == "dataset":
        script, flags = "byol_disc", ["--dataset", "npz", "--data-dir", str(tmp_path)]
        for split, seed in (("train", 0), ("test", 1)):
            x, y = draw_shapes(60, seed=seed)
            np.savez(tmp_path / f"{split}.npz", x=x.permute(0, 2, 3, 1).numpy(), y=y.numpy())

    states = []
    for name, kills in (("whole", [False]), ("killed", [True, False])):
        status = [run(tmp_path / name, script, flags, kill) for kill in kills]
        assert status == [-9 if kill else 0 for kill in kills], (tmp_path / name / "err").read_text()
        made = tmp_path / name / "run"
        states.append(torch.load(made / "checkpoint.pt", weights_only=True)["model"])
        result = json.loads((made / "eval.json").read_text())
        assert 0 <= result["linear"] <= 100 and 0 <= result["untrained"]["linear"] <= 100
        config = json.loads((made / "config.json").read_text())
        assert (made / f"source-{config['code']}" / f"{script}.py").exists()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_the_readme_shows_a_recipe_in_full():
    text = (ROOT / "README.md").read_text()
    shown = text.split("```diff\n")[1].split("```")[0]
    assert shown == (ROOT / "tests" / "recipes" / "dataset.diff").read_text()
    for recipe in RECIPES:
        assert f"`{recipe}`" in text
