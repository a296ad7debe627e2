"""Bad input, to all six programs: status 2, a line that names it, and no file lost or changed."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import byol_disc
import byol_langevin
import common
import linear_eval
import simclr_disc
import simclr_langevin
from common import UserError

LANGEVIN, DISC = [simclr_langevin, byol_langevin], [simclr_disc, byol_disc]
BYOL, SIMCLR = [byol_disc, byol_langevin], [simclr_disc, simclr_langevin]
TRAINING = LANGEVIN + DISC
ALL = [*TRAINING, common]
FLAGS = ["--dataset", "synthetic", "--subset", "512", "--width", "8", "--ebm-iters", "1"]


class Pickled:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


def foreign(content):
    def put(path):
        torch.save(content, path)
    return put


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*")
            if path.is_file() and path.name not in (".lock", "config.json")}


def refused(program, flags, monkeypatch, capsys):
    """The line with which the program ends, after argparse's line on usage. Files stay as they
    were, but for the config of a run."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    before = contents()
    with pytest.raises(SystemExit) as end:
        common.launch(program.main)
    *usage, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "error: " in line
    assert not usage or usage[0].startswith("usage: ")
    assert len(usage) <= 1 or program is linear_eval
    assert before.items() <= contents().items()
    return line


CASES = [
    *[(programs, flags, flags.split()[0]) for programs, given in [
        (ALL, "--width 7, --width 1025, --width 8.5, --wid 8, --unknown 1, --seed -1, "
              "--seed 9999999999999999999, --subset -1, --subset 5001, --ebm-iters -1, "
              "--ebm-iters 10000000000, --ebm-rotation nan, --ebm-objective vae, --dataset mnist, "
              "--precision tf32, --device nowhere, --device meta, --device cuda:7, --ebm file"),
        (TRAINING, "--epochs -1, --epochs 10000000000, --batch-size 1, --batch-size 513, --lr inf, "
                   "--lr -1, --emb 0, --emb 10000000000000, --coeff -0.1, --coeff nan, "
                   "--eval-every -1, --schedule flat"),
        (LANGEVIN, "--alpha 1.1, --alpha -0.1, --steps -1, --steps 1.5, --step-size -1, "
                   "--noise-std -1, --noise-unit inf, --grad-clip nan, --use both, --view disc, "
                   "--view augment --use dataset"),
        (DISC, "--layers first, --alpha 0.5, --disc-input both"),
        (SIMCLR, "--temperature 0"),
        (BYOL, "--tau 1.1, --tau nan")] for flags in given.split(", ")],
    (ALL, "--dataset folder", "--data-dir data"), (ALL, "--ebm file/ebm.pt", "file/ebm.ebm"),
    (ALL, "--dataset folder --data-dir empty", "--data-dir empty"),
    (ALL, "--dataset folder --data-dir file", "--data-dir file"),
    (ALL, "--dataset cifar10 --data-dir /proc/none", "--dataset cifar10"),
    (TRAINING, "--run-dir file/run", "file/run"), (TRAINING, "--run-dir file", "file"),
    (TRAINING, f"--run-dir {256 * 'x'}", "File name too long"),
    (DISC, "--teacher nowhere", "nowhere"),
    ([linear_eval], "", "paths"), ([linear_eval], "nowhere", "nowhere"),
    ([linear_eval], "nowhere --split dev", "--split"), ([linear_eval], "file", "file"),
    ([linear_eval], "nowhere.pt", "nowhere.pt"), ([linear_eval], "file.jsonl", "file.jsonl"),
    ([linear_eval], "file.ebm", "nothing to evaluate"), ([linear_eval], "~nobody/run", "/run")]


@pytest.mark.parametrize("programs, flags, named", CASES, ids=[flags for _, flags, _ in CASES])
def test_a_mistake_is_one_line_and_begins_nothing(programs, flags, named, tmp_path, monkeypatch,
                                                  capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("file", "file.jsonl"):
        Path(name).write_text("text" if "." in name else "")
    Path("empty").mkdir()
    for program in programs:
        given = flags.split() if program is linear_eval else [*FLAGS, *flags.split()]
        assert named in refused(program, given, monkeypatch, capsys)
        assert not [*Path().rglob("*.pt")]


OTHER = dict(dataset="synthetic", subset=512, width=8, coeff=0.0, precision="fp32", code="other")


@pytest.mark.parametrize("put, named", [
    (lambda path: path.write_bytes(b""), "EOFError"),
    (lambda path: path.write_bytes(b"hello"), "damaged, or not written by this code"),
    (lambda path: path.write_bytes(b"PK\3\4 truncated"), "damaged, or not written by this code"),
    (foreign({"d": 1}), "KeyError"), (foreign([1]), "TypeError"), (foreign({"config": {}}), "'d'"),
    (foreign({"config": Pickled()}), "UnpicklingError"),
    (lambda path: path.mkdir(), "Is a directory")])
def test_a_file_that_is_not_ours_is_refused_and_kept(put, named, tmp_path, monkeypatch, capsys):
    """As an EBM, to be evaluated, and as a checkpoint."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ebm.pt")
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "checkpoint.pt")
    common.save(tmp_path / "other" / "config.json", OTHER)
    for program, flags in [(byol_disc, [*FLAGS, "--ebm", "ebm.pt"]), (linear_eval, ["ebm.pt"])]:
        line = refused(program, flags, monkeypatch, capsys)
        assert "ebm.pt" in line and named in line
    flags = [*FLAGS, "--coeff", "0", "--precision", "fp32", "--run-dir", "other"]
    line = refused(byol_disc, flags, monkeypatch, capsys)
    assert "other/checkpoint.pt" in line and (named in line or "KeyError: 'done'" in line)
    assert not (tmp_path / "code was run").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "eval.json", "generated.pt"])
def test_results_of_another_run_are_refused(name, tmp_path, monkeypatch, capsys):
    """Also those of which nothing is known, as the config is missing or somebody else's."""
    monkeypatch.chdir(tmp_path)
    for directory, config, named in [
            ("other", OTHER, "other: made with --seed 0, not 1; name another --run-dir"),
            ("unknown", None, "unknown: made "),
            ("foreign", {"learning": "my own"}, "foreign/config.json: damaged, or not written by")]:
        Path(directory).mkdir()
        Path(directory, name).write_text("results")
        if config:
            common.save(Path(directory, "config.json"), config)
        flags = [*FLAGS, "--coeff", "0", "--precision", "fp32", "--seed", "1"]
        line = refused(byol_disc, [*flags, "--run-dir", directory], monkeypatch, capsys)
        assert named in line
    assert json.loads(Path("foreign/config.json").read_text()) == {"learning": "my own"}


def test_a_slip_of_the_code_shows_its_traceback():
    for error in (KeyError("name"), RuntimeError("shapes"), KeyboardInterrupt()):
        def main():
            raise error
        with pytest.raises(type(error)):
            common.launch(main)


def test_smoke_is_a_preset_that_other_flags_override(monkeypatch):
    for flags, changed in [([], {}), (["--epochs", "3"], {"epochs": 3})]:
        monkeypatch.setattr(sys, "argv", ["byol_disc.py", "--smoke", *flags])
        assert (common.SMOKE | changed).items() <= vars(byol_disc.parse()).items()


def test_a_damaged_file_of_a_run_is_one_line(tmp_path):
    for name, content in [("config.json", b"[1]"), ("eval.json", b""), ("generated.pt", b"PK")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: damaged, or not written by this") as error:
            common.load(tmp_path / name, "images")
        assert "\n" not in str(error.value) and (tmp_path / name).read_bytes() == content
