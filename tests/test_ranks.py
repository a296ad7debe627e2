"""Whole runs on two ranks: in one directory, killed and resumed, or ended by a rank that fails."""
import json

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
import simclr_disc
from processes import killed_copies, ranks, run, wait, work

RUN = ["--run-dir", "run"]
LONG = [*RUN, "--coeff", "0", "--epochs", "100"]


@pytest.mark.parametrize("script, flags", [("simclr_disc", RUN),
                                           ("byol_langevin", [*RUN, "--steps", "2", "--use", "dataset"])])
def test_a_run_on_two_ranks_killed_and_resumed(script, flags, tmp_path):
    """And what both would do alone: EBM, log, evaluation."""
    whole = tmp_path / "whole"
    whole.mkdir()
    both = ranks(script, whole, *flags, moments=("run/log.jsonl", None))
    assert [wait(rank) for rank in both] == [0, 0], (whole / "err").read_text()
    log = (whole / "run" / "log.jsonl").read_text().splitlines()
    assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [0, 1, 2]
    out = (whole / "out").read_text()
    assert out.count("BatchNorm is not synchronised") == 1 == out.count("iteration 2/2 ")
    assert (whole / "run" / "eval.json").exists()

    killed = killed_copies(whole)["run/log.new"]        # in the second epoch
    saved = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1
    assert [wait(rank) for rank in ranks(script, killed, *flags)] == [0, 0]
    expected, resumed = (torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]
                         for directory in (whole, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], saved["model"][name]) for name in expected)


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
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["done"] == 0
    assert run("simclr_disc", tmp_path, *LONG) == 2
    assert "run: made with another number of processes" in (tmp_path / "err").read_text()
