"""What belongs to a run's identity beyond its flags: flags of one's own, teachers, frozen networks,
the code that measured it."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import byol_disc
import byol_langevin
import common
import linear_eval
from common import Run, UserError, check_config, draw_shapes, save, without_effect
from conftest import ROOT

FLAGS = ["--dataset", "synthetic", "--width", "8", "--batch-size", "8", "--precision", "fp32"]


def parsed(module, tmp_path, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["x", *FLAGS, "--run-dir", str(tmp_path / "run"), "--ebm",
                                      str(tmp_path / "ebm.pt"), *flags])
    return module.parse()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    args = parsed(byol_disc, tmp_path, monkeypatch)
    return lambda: Run(args, draw_shapes(10, seed=0)[0], lambda *_, **__: None)


def test_a_flag_of_ones_own_named_like_another_counts():
    """simclr_disc.py with an --alpha of its own, for mixup, has no chain."""
    disc = dict(coeff=0, disc_input="augment", layers="last", alpha=0.5, steps=0, view="x")
    assert not without_effect(SimpleNamespace(**disc)) & {"alpha", "steps", "view"}
    langevin = dict(coeff=0, use="auxiliary", view="langevin", steps=1, step_size=1, noise_std=1,
                    noise_unit=1, grad_clip=1, alpha=0.5, layers=3)
    unused = without_effect(SimpleNamespace(**langevin))
    assert {"alpha", "steps", "view"} <= unused and "layers" not in unused


def test_teachers_of_other_settings_have_other_names(tmp_path):
    args = SimpleNamespace(teacher=tmp_path, seed=0, width=8, lr=0.1, coeff=1)
    defaults = dict(width=64, lr=0.003, coeff=0.1, temperature=0.5, seed=0, epochs=9)
    teacher = {**defaults, "script": "simclr_disc", "epochs": 2, "seed": 1, "width": 8, "lr": 0.1,
               "coeff": 0, "defaults": defaults}
    for change, expected in [({}, ", seed +1"), ({"lr": 1.0, "seed": 0}, ", lr 1.0"),
                             ({"temperature": 0.1}, ", temperature 0.1, seed +1"),
                             ({"coeff": 0.5, "seed": 0}, ", coeff 0.5")]:
        save(tmp_path / "config.json", {**teacher, **change})
        assert common.teacher_kind(args) == "simclr_disc of 2 epochs" + expected


def test_each_frozen_network_is_known_and_kept(run):
    first, frozen = run(), [torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)]
    for network in frozen:
        assert not first.freeze(network).training
    assert {"f", "f1"} <= first.config.keys()
    (first.path / "checkpoint.pt").touch()                # something was made
    first.lock.release()
    again = run()
    again.freeze(frozen[0])
    with torch.no_grad():
        frozen[1].weight += 1
    with pytest.raises(UserError, match="made with"):
        again.freeze(frozen[1])


def test_a_setting_is_compared_as_config_json_has_it(run, monkeypatch):
    begun = run()
    begun.args.scale, begun.args.path = (0.2, 1.0), Path("somewhere")
    for made in (False, True):                            # the second finds what the first made
        Run(begun.args, draw_shapes(10, seed=0)[0], begun.evaluate).lock.release()
        (begun.path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match="--scale"):
        check_config("run", begun.config | {"scale": [0.2, 1.0]}, begun.config | {"scale": [0.3]})


def test_the_sources_can_be_run(run):
    source = next(run().path.glob("source-*"))
    assert {x.name for x in source.iterdir()} == {"byol_disc.py", "common.py", "linear_eval.py"}
    assert (source / "byol_disc.py").read_bytes() == (ROOT / "byol_disc.py").read_bytes()


def test_the_code_has_the_imports_of_imports(tmp_path):
    files = {"run.py": "import numpy\nimport a", "a.py": "from pk.sub import m",
             "other.py": "y = 2", "pk/__init__.py": "", "pk/sub/__init__.py": "",
             "pk/sub/m.py": "x = 1"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = common.source_files(tmp_path / "run.py")
    ours = {str(file.relative_to(tmp_path)) for file in found if file.is_relative_to(tmp_path)}
    assert ours == files.keys() - {"other.py"} and ROOT / "common.py" in found


def test_accuracies_of_another_linear_eval_are_said_to_be(tmp_path, capsys):
    accuracies = dict(linear=50.0, knn5=40.0, knn_cosine=None)
    save(tmp_path / "config.json", dict(script="byol_disc", epochs=1, seed=0))
    flags = SimpleNamespace(split="test", data_dir=None, dataset=None)
    for code, said in [(linear_eval.evaluate.code, False), ("12345678", True)]:
        save(tmp_path / "eval.json", {**accuracies, "evaluation": code})
        (_, result), = linear_eval.evaluate_run(tmp_path, flags)
        assert result["linear"] == 50
        assert ("another linear_eval.py" in capsys.readouterr().out) == said


def test_a_results_file_is_of_its_own_data_and_split(tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps({"config": {"seed": 0}, "result": {"linear": 1.0}}) + "\n")
    flags = dict(split="test", data_dir=None, dataset=None)
    assert linear_eval.read_rows(file, SimpleNamespace(**flags)) == [({"seed": 0}, {"linear": 1.0})]
    for other in (dict(split="val"), dict(dataset="cifar100"), dict(data_dir="x")):
        with pytest.raises(UserError, match="own data and split"):
            linear_eval.read_rows(file, SimpleNamespace(**{**flags, **other}))


@pytest.mark.parametrize("flags", [["--coeff", "1", "--grad-clip", "0"], ["--step-size", "0"]])
def test_an_ebm_whose_gradient_is_not_used_is_not_needed(flags, tmp_path, monkeypatch):
    names = without_effect(parsed(byol_langevin, tmp_path, monkeypatch, *flags))
    assert {"ebm_iters", "ebm_objective", "ebm_rotation"} <= names


def test_an_ebm_is_a_pt_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="ends in .pt"):
        parsed(byol_disc, tmp_path, monkeypatch, "--ebm", "ebm")
