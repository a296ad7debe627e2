"""Killed at any moment, short of disk, or two at once: it ends as an unhindered run does."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import common
from common import UserError
from conftest import ROOT
from processes import run, start, wait

RUN = ["--run-dir", "run"]
BANK = [*RUN, "--use", "dataset", "--steps", "6", "--subset", "32"]


def tensors(directory):
    """All tensors and numbers of the EBM, the generated images and the last checkpoint."""
    files = [directory / "ebm.pt", *sorted((directory / "run").glob("*.pt"))]
    tree = [torch.load(path, weights_only=True) for path in files]
    return torch.utils._pytree.tree_leaves(tree)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def in_a_loop(command):
    """What a bash loop prints of two commands, the first stopped by Ctrl-C, and the loop's end.

    As on a terminal the signal goes to bash too, and bash lets what the command does decide.
    """
    bash = subprocess.Popen(
        ["bash", "-c", f"for i in 1 2; do {sys.executable} -c '{command}' $i 2>&1; done"],
        cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    first = bash.stdout.readline()
    os.killpg(bash.pid, signal.SIGINT)
    return first + bash.communicate(timeout=120)[0], bash.returncode


MAIN = """
def main():
    print("begun", flush=True)
    time.sleep(60 if sys.argv[1] == "1" else 0)
"""


def test_ctrl_c_ends_a_loop_of_runs():
    said, status = in_a_loop(f"import sys, time, common{MAIN}\ncommon.launch(main)")
    assert said.startswith("begun\n\nstopped: the same command goes on") and said.count("\n") == 3
    assert status == -signal.SIGINT
    exits = "\ntry:\n  main()\nexcept KeyboardInterrupt:\n  sys.exit(130)"
    assert in_a_loop(f"import sys, time{MAIN}{exits}") == ("begun\nbegun\n", 0)     # a control


@contextmanager
def halted(process, path):
    """Halt the process as soon as the file is there."""
    while not path.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    yield
    os.kill(process.pid, signal.SIGCONT)


def test_killed_at_any_moment_it_ends_with_the_same_tensors(tmp_path):
    """Before each renaming and each line of a log, from the EBM's first to the last."""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run("byol_langevin", whole, *BANK, moment="each") == 0
    expected, states = tensors(whole), set()
    copies = [tmp_path / str(n + 1) for n in range(int((whole / "moments").read_text()))]
    saved = torch.load(whole / "run" / "checkpoint.pt", weights_only=True)
    assert saved["schedule"]["last_epoch"] == 2 * (32 + 32) // 16       # steps over both halves

    for pair in zip(copies[::2], [*copies[1::2], None]):                # two at a time
        pair = [directory for directory in pair if directory]
        states.update(path.name for directory in pair for path in directory.glob("**/*"))
        resumed = [start("byol_langevin", directory, *BANK) for directory in pair]
        for process, directory in zip(resumed, pair):
            assert wait(process) == 0, (directory / "err").read_text()
            assert same(tensors(directory), expected), f"killed at {directory.name}"
            log = (directory / "run" / "log.jsonl").read_text().splitlines()
            assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [1, 2]
            assert not list(directory.glob("**/*.new"))
    assert {f"{name}.new" for name in ("ebm", "config", "langevin", "chain", "generated",
                                       "checkpoint", "eval")} <= states
    assert run("byol_langevin", tmp_path, *BANK, "--seed", "1") == 0
    assert not same(tensors(tmp_path), expected)                        # a control: it can differ


def test_two_runs_that_need_the_same_ebm_share_it(tmp_path):
    out = tmp_path / "out"
    first = start("simclr_disc", tmp_path, "--run-dir", "first", "--ebm-iters", "5")
    with halted(first, tmp_path / "ebm.ebm" / "checkpoint.pt"):
        second = start("byol_disc", tmp_path, "--run-dir", "second", "--ebm-iters", "5")
        while "ebm.ebm: waiting for the process" not in out.read_text():
            time.sleep(0.01)
    assert wait(first) == wait(second) == 0, (tmp_path / "err").read_text()
    assert common.load_ebm(tmp_path / "ebm.pt", "cpu").dims["last"] == 64
    assert out.read_text().count("iteration 5/5 ") == 1 == out.read_text().count("waiting")
    assert not (tmp_path / "ebm.ebm" / "checkpoint.pt").exists()


@pytest.mark.parametrize("flags, file", [
    (["--coeff", "0", "--epochs", "5"], "run/checkpoint.pt"),
    (["--ebm-iters", "5"], "ebm.ebm/checkpoint.pt")])       # known before the EBM is trained
def test_two_processes_cannot_be_at_one_run(flags, file, tmp_path):
    flags = [*RUN, *flags]
    first = start("byol_disc", tmp_path, *flags)
    with halted(first, tmp_path / file):
        assert run("byol_disc", tmp_path, *flags) == 2
    assert wait(first) == 0
    err = (tmp_path / "err").read_text()
    assert err.startswith("error: run: another process is at this run") and err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    common.save(path, config={"seed": 0})
    before = path.read_bytes()

    def fill(content, file):
        file.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(UserError, match="cannot be written .*; what was there still is"):
        common.save(path, config={"seed": 1})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]
