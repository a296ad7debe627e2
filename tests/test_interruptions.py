"""Killed at any moment, stopped, or two at once: it ends as an unhindered run does."""
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

import byol_disc
import common
from conftest import ROOT
from processes import TINY, killed_copies, run, start, wait

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


def test_ctrl_c_ends_a_loop_of_runs():
    main = ('\ndef main():\n  print("begun", flush=True)\n'
            '  time.sleep(60 if sys.argv[1] == "1" else 0)\n')
    said, status = in_a_loop(f"import sys, time, common{main}common.launch(main)")
    assert said.count("begun") == 1 and status == -signal.SIGINT
    exits = "try:\n  main()\nexcept KeyboardInterrupt:\n  sys.exit(130)"
    assert in_a_loop(f"import sys, time{main}{exits}") == ("begun\nbegun\n", 0)     # a control


@pytest.fixture
def train(tmp_path, monkeypatch, small):
    """`train(*flags)` trains byol_disc's baseline here, in this process."""
    monkeypatch.chdir(tmp_path)

    def train(*flags):
        monkeypatch.setattr(sys, "argv", ["byol_disc.py", *TINY, "--coeff", "0", *flags])
        common.launch(byol_disc.main)
    return train


def test_a_loop_over_seeds_in_one_process_trains_every_seed(train, tmp_path, capsys):
    """Also one whose first seed is finished already, which is shown and not trained again."""
    train("--run-dir", "0")
    first = (tmp_path / "0" / "checkpoint.pt").stat().st_mtime_ns
    for seed in range(3):
        train("--seed", str(seed), "--run-dir", str(seed))
    assert all((tmp_path / str(seed) / "eval.json").exists() for seed in range(3))
    assert first == (tmp_path / "0" / "checkpoint.pt").stat().st_mtime_ns
    assert capsys.readouterr().out.count("0 is finished; test accuracy: linear ") == 1
    weights = [torch.load(tmp_path / str(seed) / "checkpoint.pt")["model"] for seed in range(3)]
    assert not torch.equal(*(w["encoder.net.0.weight"] for w in weights[:2]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_notebook_may_run_a_stopped_cell_again(error, train, tmp_path, monkeypatch):
    """It keeps the exception, and with it what the run held."""
    def stop(*_):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(byol_disc, "target_tau", stop)
        with pytest.raises(error) as kept:
            train("--run-dir", "run")
    train("--run-dir", "run")
    assert kept.value and (tmp_path / "run" / "eval.json").exists()


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
    """While a run waits for its EBM no other process can be at it."""
    out, five = tmp_path / "out", ["--ebm-iters", "5"]
    first = start("simclr_disc", tmp_path, "--run-dir", "first", *five)
    with halted(first, tmp_path / "ebm.ebm" / "checkpoint.pt"):
        second = start("byol_disc", tmp_path, "--run-dir", "second", *five)
        for _ in range(6000):
            if "ebm.ebm: waiting for another process" in out.read_text():
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
    assert out.read_text().count("iteration 5/5 ") == 1 == out.read_text().count("waiting")
    assert not (tmp_path / "ebm.ebm" / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json", "log.jsonl", "langevin.png"])
def test_a_full_disk_leaves_what_was_there(name, tmp_path, monkeypatch):
    content = [torch.zeros(3, 8, 8) if name.endswith("png") else [{"seed": i}] for i in (0, 1)]
    path, error = tmp_path / name, OSError(28, "No space left on device")
    common.save(path, content[0])
    before = path.read_bytes()

    def fill(*args, **kwargs):
        (tmp_path / f"{path.stem}.new").write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fill)
    monkeypatch.setattr(common, "save_image", fill)
    monkeypatch.setattr(type(path), "write_text", fill)
    with pytest.raises(OSError, match="No space left on device"):
        common.save(path, content[1])
    assert path.read_bytes() == before
    monkeypatch.undo()
    common.save(path, content[0])                       # the same command goes on
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
