"""Each recipe is applied as README says, trains three steps, evaluates, and resumes exactly."""
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

from common import draw_shapes
from conftest import ROOT
from processes import killed_copies, run

FLAGS = ["--subset", "48", "--ebm-iters", "1", "--run-dir", "run"]
RECIPES = {"simsiam": "byol_disc", "encoder": "byol_disc", "feature_view": "byol_disc",
           "image_view": "byol_langevin", "dataset": "common"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_evaluates_and_resumes(recipe, tmp_path):
    code, whole, flags = tmp_path / "code", tmp_path / "whole", FLAGS
    code.mkdir()
    whole.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, code)
    patch = ROOT / "tests" / "recipes" / f"{recipe}.diff"
    subprocess.run(["patch", "-s", f"{RECIPES[recipe]}.py", patch, "-o", "patched"], check=True,
                   cwd=code)
    script, patched = ("byol_disc", "common") if recipe == "dataset" else (recipe, recipe)
    (code / "patched").rename(code / f"{patched}.py")
    if recipe == "dataset":
        flags = [*FLAGS, "--dataset", "npz", "--data-dir", str(tmp_path)]
        for split, seed in (("train", 0), ("test", 1)):
            x, y = draw_shapes(60, seed=seed)
            np.savez(tmp_path / f"{split}.npz", x=x.permute(0, 2, 3, 1).numpy(), y=y.numpy())

    status = run(script, whole, *flags, moment="run/log.jsonl", place=code)
    assert status == 0, (whole / "err").read_text()
    killed = killed_copies(whole)["run/log.new"]        # in the second epoch
    begun = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)
    assert begun["done"] == 1
    assert run(script, killed, *flags, place=code) == 0, (killed / "err").read_text()
    states = []
    for made in (whole / "run", killed / "run"):
        states.append(torch.load(made / "checkpoint.pt", weights_only=True)["model"])
        result = json.loads((made / "eval.json").read_text())
        assert 0 <= result["linear"] <= 100 and 0 <= result["untrained"]["linear"] <= 100
        config = json.loads((made / "config.json").read_text())
        assert (made / f"source-{config['code']}" / f"{script}.py").exists()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert not all(torch.equal(x, begun["model"][name]) for name, x in states[0].items())


def test_the_readme_shows_a_recipe_in_full():
    text = (ROOT / "README.md").read_text()
    shown = text.split("```diff\n")[1].split("```")[0]
    assert shown == (ROOT / "tests" / "recipes" / "dataset.diff").read_text()
    for recipe in RECIPES:
        assert f"`{recipe}`" in text
