"""Killed at any moment, short of disk, or two at once: it ends as an unhindered run does."""
import json
import os
import time

import pytest
import torch

import common
from common import UserError
from processes import run, start, wait

RUN = ["--run-dir", "run"]
BANK = [*RUN, "--use", "dataset", "--steps", "6", "--subset", "64"]


def tensors(directory):
    """All tensors and numbers of the EBM, the generated images and the last checkpoint."""
    files = [directory / "ebm.pt", *sorted((directory / "run").glob("*.pt"))]
    tree = [torch.load(path, weights_only=True) for path in files]
    return torch.utils._pytree.tree_leaves(tree)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def await_file(path):
    while not path.exists():
        time.sleep(0.01)


def test_killed_at_any_moment_it_ends_with_the_same_tensors(tmp_path):
    """By SIGKILL before each renaming and each line of a log, from the EBM's first to the last."""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run("byol_langevin", whole, *BANK) == 0
    expected, states = tensors(whole), set()
    moments = range(1, int((whole / "moments").read_text()) + 1)
    saved = torch.load(whole / "run" / "checkpoint.pt", weights_only=True)
    assert saved["schedule"]["last_epoch"] == 2 * (64 + 64) // 32       # steps over both halves

    for pair in zip(moments[::2], [*moments[1::2], None]):              # two at a time
        directories = [tmp_path / str(moment) for moment in pair if moment]
        for directory in directories:
            directory.mkdir()
        killed = [start("byol_langevin", directory, *BANK, moment=int(directory.name))
                  for directory in directories]
        assert {wait(process) for process in killed} == {-9}
        states.update(frozenset(path.name for path in directory.glob("**/*"))
                      for directory in directories)
        resumed = [start("byol_langevin", directory, *BANK) for directory in directories]
        for process, directory in zip(resumed, directories):
            assert wait(process) == 0, (directory / "err").read_text()
            assert same(tensors(directory), expected), f"killed at {directory.name}"
            log = (directory / "run" / "log.jsonl").read_text().splitlines()
            assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [1, 2]
            assert not list(directory.glob("**/*.new"))
    begun = set().union(*states)
    assert {"ebm.pt.new", "config.json.new", "langevin.png.new", "chain.json.new",
            "generated.pt.new", "checkpoint.pt.new", "eval.json.new"} <= begun
    assert run("byol_langevin", tmp_path, *BANK, "--seed", "1") == 0
    assert not same(tensors(tmp_path), expected)                        # a control: it can differ


def test_two_runs_that_need_the_same_ebm_share_it(tmp_path):
    first = start("simclr_disc", tmp_path, "--run-dir", "first", "--ebm-iters", "20")
    await_file(tmp_path / "ebm.ebm" / "checkpoint.pt")
    second = start("byol_disc", tmp_path, "--run-dir", "second", "--ebm-iters", "20")
    assert wait(first) == wait(second) == 0, (tmp_path / "err").read_text()
    assert common.load_ebm(tmp_path / "ebm.pt", "cpu").dims["last"] == 64
    out = (tmp_path / "out").read_text()
    assert out.count("iteration 20/20 ") == 1 == out.count("ebm.ebm: waiting for the process")
    assert not (tmp_path / "ebm.ebm" / "checkpoint.pt").exists()


def test_two_processes_cannot_be_at_one_run(tmp_path):
    flags = [*RUN, "--coeff", "0", "--epochs", "20"]
    first = start("byol_disc", tmp_path, *flags)
    await_file(tmp_path / "run" / "checkpoint.pt")
    assert run("byol_disc", tmp_path, *flags) == 2 and wait(first) == 0
    err = (tmp_path / "err").read_text()
    assert err.startswith("error: run: another process is at this run") and err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    common.save(path, {"seed": 0}, 1, {})
    before = path.read_bytes()

    def fill(content, file):
        file.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(UserError, match="cannot be written .*; what was there still is"):
        common.save(path, {"seed": 0}, 2, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]
