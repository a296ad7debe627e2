"""Whole runs on two ranks: one directory each, killed and resumed, and ended by a rank that fails."""
import json
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from processes import TINY, ranks, wait

SCRIPTS = ["simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"]
RUN = ["--run-dir", "run", "--steps", "2"]


def flags(script):
    return RUN if "langevin" in script else RUN[:2]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_on_two_ranks_killed_and_resumed(script, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    assert [wait(rank) for rank in ranks(script, whole, *flags(script))] == [0, 0]
    log = (whole / "run" / "log.jsonl").read_text().splitlines()
    assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [1, 2]
    assert (whole / "out").read_text().count("each normalises by the statistics") == 1
    assert (whole / "run" / "eval.json").exists()

    (killed / "ebm.pt").write_bytes((whole / "ebm.pt").read_bytes())
    both = ranks(script, killed, *flags(script), moments=(MOMENT[script], None))
    assert wait(both[0]) == -9
    both[1].kill()
    wait(both[1])
    saved = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1
    assert [wait(rank) for rank in ranks(script, killed, *flags(script))] == [0, 0]
    expected, resumed = (torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]
                         for directory in (whole, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], saved["model"][name]) for name in expected)
