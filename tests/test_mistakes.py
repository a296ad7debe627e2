"""Bad input, to all six programs: exit status 2, one line that names it, and nothing written."""
import os
import sys

import pytest
import torch

import byol_disc
import byol_langevin
import common
import linear_eval
import simclr_disc
import simclr_langevin

LANGEVIN, DISC = [simclr_langevin, byol_langevin], [simclr_disc, byol_disc]
BYOL, SIMCLR = [byol_disc, byol_langevin], [simclr_disc, simclr_langevin]
TRAINING = LANGEVIN + DISC
ALL = [*TRAINING, common]
FLAGS = ["--dataset", "synthetic", "--subset", "64", "--width", "4", "--ebm-iters", "1"]


class Pickled:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


def foreign(content):
    def put(path):
        torch.save(content, path)
    return put


def refused(program, flags, monkeypatch, capsys):
    """The line on stderr with which the program ends, having left the directory as it was."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    before = {path: os.stat(path).st_mtime_ns for path in os.listdir()}
    with pytest.raises(SystemExit) as end:
        common.launch(program.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert {path: os.stat(path).st_mtime_ns for path in os.listdir()} == before
    return err


CASES = [
    (ALL, "--width 0", "--width"), (ALL, "--width 4.5", "--width"), (ALL, "--seed -1", "--seed"),
    (ALL, "--seed 9999999999999999999", "--seed"), (ALL, "--subset -1", "--subset"),
    (ALL, "--subset 5001", "--subset 5001"), (ALL, "--ebm-iters -1", "--ebm-iters"),
    (ALL, "--ebm-rotation nan", "--ebm-rotation"), (ALL, "--ebm-objective ebm", "--ebm-objective"),
    (ALL, "--precision fp16", "--precision"), (ALL, "--device nowhere", "--device nowhere"),
    (ALL, "--dataset mnist", "--dataset"), (ALL, "--dataset folder", "--data-dir data"),
    (ALL, "--dataset cifar10 --data-dir /proc/none", "--data-dir"),
    (ALL, "--ebm file/ebm.pt", "--ebm file/ebm.pt"), (ALL, "--unknown 1", "--unknown"),
    (ALL, "--wid 4", "--wid"), (ALL, "--ebm ebm.partial", "--ebm ebm.partial"),
    (ALL, f"--subset {10 ** 400}", "--subset"),
    (LANGEVIN, "--use dataset --view augment", "--view augment"),
    (TRAINING, "--run-dir file/run", "--run-dir file/run"), (TRAINING, "--epochs 0", "--epochs"),
    (TRAINING, "--batch-size 1", "--batch-size"), (TRAINING, "--batch-size 65", "--batch-size 65"),
    (TRAINING, "--lr inf", "--lr"), (TRAINING, "--lr -1", "--lr"), (TRAINING, "--emb 0", "--emb"),
    (TRAINING, "--coeff -0.1", "--coeff"), (TRAINING, "--coeff nan", "--coeff"),
    (TRAINING, "--eval-every -1", "--eval-every"), (TRAINING, "--schedule flat", "--schedule"),
    (LANGEVIN, "--alpha 1.1", "--alpha"), (LANGEVIN, "--alpha -0.1", "--alpha"),
    (LANGEVIN, "--steps -1", "--steps"), (LANGEVIN, "--steps 1.5", "--steps"),
    (LANGEVIN, "--step-size -1", "--step-size"), (LANGEVIN, "--noise-std -1", "--noise-std"),
    (LANGEVIN, "--noise-unit inf", "--noise-unit"), (LANGEVIN, "--grad-clip nan", "--grad-clip"),
    (LANGEVIN, "--use both", "--use"), (LANGEVIN, "--view disc", "--view"),
    (DISC, "--layers first", "--layers"), (DISC, "--alpha 0.5", "--alpha"),
    (SIMCLR, "--temperature 0", "--temperature"), (BYOL, "--tau 1.1", "--tau"),
    (BYOL, "--tau nan", "--tau"),
    ([linear_eval], "", "paths"), ([linear_eval], "nowhere", "nowhere"),
    ([linear_eval], "file", "file"), ([linear_eval], "nowhere.pt", "nowhere.pt"),
]


@pytest.mark.parametrize("programs, flags, named", CASES, ids=[flags for _, flags, _ in CASES])
def test_a_mistake_is_one_line_and_writes_nothing(programs, flags, named, tmp_path, monkeypatch,
                                                  capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for program in programs:
        given = flags.split() if program is linear_eval else [*FLAGS, *flags.split()]
        assert named in refused(program, given, monkeypatch, capsys)


@pytest.mark.parametrize("put, named", [
    (lambda path: path.write_bytes(b""), "not a whole file of ours"),
    (lambda path: path.write_bytes(b"PK\3\4 truncated"), "not a whole file of ours"),
    (foreign({"d": 1}), "it has no config"), (foreign([1]), "it has no config"),
    (foreign({"config": Pickled()}), "not a whole file of ours"),
    (foreign({"config": {}}), "made with --dataset None, not synthetic"),
    (lambda path: path.mkdir(), "not a whole file of ours")])
def test_a_file_that_is_not_ours_is_refused_and_kept(put, named, tmp_path, monkeypatch, capsys):
    """As an EBM, as a checkpoint, and to be evaluated."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ebm.pt")
    err = refused(byol_disc, [*FLAGS, "--ebm", "ebm.pt", "--batch-size", "64"], monkeypatch, capsys)
    assert "ebm.pt" in err and named in err
    (tmp_path / "run").mkdir()
    put(tmp_path / "run" / "checkpoint.pt")
    err = refused(byol_disc, [*FLAGS, "--coeff", "0", "--run-dir", "run", "--batch-size", "64"],
                  monkeypatch, capsys)
    assert "run/checkpoint.pt" in err and (named in err or "made with" in err)
    err = refused(linear_eval, ["ebm.pt"], monkeypatch, capsys)
    assert "ebm.pt" in err and (named in err or "not an EBM" in err)
    assert not (tmp_path / "code was run").exists()
