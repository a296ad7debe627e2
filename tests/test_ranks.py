"""Whole runs on two ranks: in one directory, killed and resumed, or ended by a rank that fails."""
import json

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
import simclr_disc
from processes import ranks, run, wait, work

RUN = ["--run-dir", "run"]
LANGEVIN = [*RUN, "--steps", "2"]
LONG = [*RUN, "--coeff", "0", "--epochs", "100"]


@pytest.mark.parametrize("script, flags, second_epoch", [
    ("simclr_disc", RUN, 7), ("byol_disc", RUN, 7),
    ("simclr_langevin", LANGEVIN, 9), ("byol_langevin", LANGEVIN, 9)])
def test_a_run_on_two_ranks_killed_and_resumed(script, flags, second_epoch, tmp_path):
    """The rank that lives on ends, too, with torch's own message."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    assert [wait(rank) for rank in ranks(script, whole, *flags)] == [0, 0]
    log = (whole / "run" / "log.jsonl").read_text().splitlines()
    assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [0, 1, 2]
    assert (whole / "out").read_text().count("BatchNorm is not synchronised") == 1
    assert (whole / "run" / "eval.json").exists()

    (killed / "ebm.pt").write_bytes((whole / "ebm.pt").read_bytes())
    both = ranks(script, killed, *flags, moments=(second_epoch, None))
    assert wait(both[0]) == -9 and wait(both[1]) == 1
    saved = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1
    assert [wait(rank) for rank in ranks(script, killed, *flags)] == [0, 0]
    expected, resumed = (torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]
                         for directory in (whole, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], saved["model"][name]) for name in expected)


def test_the_ebm_alone_on_two_ranks(tmp_path):
    assert [wait(rank) for rank in ranks("common", tmp_path)] == [0, 0], (
        tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text().count("iteration 2/2 ") == 1
    assert (tmp_path / "ebm.pt").exists()


def failing(directory):
    steps, z_std = [], simclr_disc.z_std

    def fail(z):
        steps.append(1)
        if len(steps) == 3 and common.rank() == 1:
            (directory / "failed").touch()
            raise RuntimeError("this rank fails at step 3")
        return z_std(z)

    simclr_disc.z_std = fail
    work("simclr_disc", LONG, directory)


def test_a_rank_that_raises_ends_the_job(tmp_path):
    """By torchrun's own launcher, though the other rank has 100 epochs to go; no lone process can
    go on with it."""
    job = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                       start_method="forkserver", logs_specs=DefaultLogsSpecs(tmp_path / "logs"))
    with pytest.raises(ChildFailedError):
        elastic_launch(job, failing)(tmp_path)
    assert (tmp_path / "failed").exists()
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 0
    assert run("simclr_disc", tmp_path, *LONG) == 2
    assert "run: made with --ranks 2, not 1" in (tmp_path / "err").read_text()
