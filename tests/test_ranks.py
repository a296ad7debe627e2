"""Whole runs on two ranks, in one directory, killed and resumed."""
import json

import pytest
import torch

from processes import killed_copies, ranks, wait

RUN = ["--run-dir", "run"]


@pytest.mark.parametrize("script, flags", [
    ("simclr_disc", RUN), ("byol_langevin", [*RUN, "--steps", "2", "--use", "dataset"])])
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
