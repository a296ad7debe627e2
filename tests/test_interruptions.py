"""Killed at any moment, stopped, or two at once: it ends as an unhindered run does."""
import json
import os
import signal
import time
from contextlib import contextmanager

import torch

import common
from processes import killed_copies, run, start, wait

RUN = ["--run-dir", "run"]
BANK = [*RUN, "--use", "dataset", "--steps", "6", "--subset", "32"]


def tensors(directory):
    """All tensors and numbers of the EBM, the generated images and the last checkpoint's state."""
    files = [directory / "ebm.pt", *sorted((directory / "run").glob("*.pt"))]
    trees = [torch.load(path, weights_only=True) for path in files]
    for tree in trees:
        tree.pop("log", None)                           # it has times
    return torch.utils._pytree.tree_leaves(trees)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def rows(log):
    """The rows of a log.jsonl, without times and speeds, and without what a run started with."""
    rows = map(json.loads, log.read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_s")}
            for row in rows if "argv" not in row]


BASELINE = ["byol_disc", "--coeff", "0"]


def test_a_loop_over_seeds_in_one_process_trains_every_seed(command, tmp_path, monkeypatch):
    """Also one whose first seed is finished already, which is shown and not trained again."""
    monkeypatch.chdir(tmp_path)
    command(*BASELINE, "--run-dir", "0")
    first = (tmp_path / "0" / "checkpoint.pt").stat().st_mtime_ns
    for seed in range(3):
        status, out, err = command(*BASELINE, "--seed", str(seed), "--run-dir", str(seed))
        assert status == 0 and ("0 is finished; test accuracy: linear " in out) == (seed == 0), err
    assert first == (tmp_path / "0" / "checkpoint.pt").stat().st_mtime_ns
    weights = [torch.load(tmp_path / str(seed) / "checkpoint.pt")["model"] for seed in range(3)]
    assert not torch.equal(*(w["encoder.net.0.weight"] for w in weights[:2]))


@contextmanager
def halted(process, path):
    """Halt the process as soon as the file is there."""
    while not path.exists():
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    yield
    os.kill(process.pid, signal.SIGCONT)


def test_killed_at_any_moment_it_ends_with_the_same_tensors(tmp_path):
    """Before the last renaming of a file, from the EBM's first to eval.json; with the same log."""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run("byol_langevin", whole, *BANK, moment="each") == 0, (whole / "err").read_text()
    expected, copies = tensors(whole), killed_copies(whole)
    saved = torch.load(whole / "run" / "checkpoint.pt", weights_only=True)
    assert saved["schedule"]["last_epoch"] == 2 * (32 + 32) // 16       # steps over both halves
    assert [row["epoch"] for row in rows(whole / "run" / "log.jsonl")] == [0, 1, 2]
    assert not same(tensors(copies["run/checkpoint.new"]), expected)    # a control
    killed = [copies[f"{name}.new"] for name in ("ebm.ebm/checkpoint", "ebm", "run/generated",
                                                 "run/log", "run/eval")]
    resumed = [start("byol_langevin", directory, *BANK) for directory in killed]
    for process, directory in zip(resumed, killed):
        assert wait(process) == 0, (directory / "err").read_text()
        assert same(tensors(directory), expected), f"killed at {directory.name}"
        for log in ("ebm.ebm/log.jsonl", "run/log.jsonl"):
            assert rows(directory / log) == rows(whole / log)
        assert not list(directory.glob("**/*.new"))


def test_two_runs_that_need_the_same_ebm_share_it(tmp_path):
    """While a run waits for its EBM no other process can be at it; one process trains the EBM."""
    out, five = tmp_path / "out", ["--ebm-iters", "5"]
    first = start("simclr_disc", tmp_path, "--run-dir", "first", *five)
    with halted(first, tmp_path / "ebm.ebm" / "checkpoint.pt"):
        second = start("byol_disc", tmp_path, "--run-dir", "second", *five)
        for _ in range(6000):
            if out.read_text().count("ebm.ebm: training the EBM, or waiting") == 2:
                break
            assert second.exitcode is None
            time.sleep(0.01)
        for script, directory in [("simclr_disc", "first"), ("byol_disc", "second")]:
            (tmp_path / "err").write_text("")
            assert run(script, tmp_path, "--run-dir", directory, *five) == 2
            err = (tmp_path / "err").read_text()
            assert err.startswith(f"error: {directory}: another process") and err.count("\n") == 1
    assert wait(first) == wait(second) == 0, (tmp_path / "err").read_text()
    assert common.load_ebm(tmp_path / "ebm.pt", "cpu").dims["last"] == 64
    assert out.read_text().count("iteration 5/5 ") == 1
    assert not (tmp_path / "ebm.ebm" / "checkpoint.pt").exists()
