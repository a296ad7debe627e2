"""Whole runs on two ranks: one directory, killed and resumed, and ended by a rank that fails."""
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from processes import TINY, ranks, wait

RUN = ["--run-dir", "run"]
LANGEVIN = [*RUN, "--steps", "2"]


@pytest.mark.parametrize("script, flags, second_epoch", [
    ("simclr_disc", RUN, 5), ("byol_disc", RUN, 5),
    ("simclr_langevin", LANGEVIN, 8), ("byol_langevin", LANGEVIN, 8)])
def test_a_run_on_two_ranks_killed_and_resumed(script, flags, second_epoch, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    assert [wait(rank) for rank in ranks(script, whole, *flags)] == [0, 0]
    log = (whole / "run" / "log.jsonl").read_text().splitlines()
    assert [row["epoch"] for row in map(json.loads, log) if "epoch" in row] == [1, 2]
    assert (whole / "out").read_text().count("each normalises by the statistics") == 1
    assert (whole / "run" / "eval.json").exists()

    (killed / "ebm.pt").write_bytes((whole / "ebm.pt").read_bytes())
    both = ranks(script, killed, *flags, moments=(second_epoch, None))
    assert wait(both[0]) == -9
    both[1].kill()
    wait(both[1])
    saved = torch.load(killed / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1
    assert [wait(rank) for rank in ranks(script, killed, *flags)] == [0, 0]
    expected, resumed = (torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]
                         for directory in (whole, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], saved["model"][name]) for name in expected)


def test_a_rank_that_raises_ends_the_job(tmp_path):
    (tmp_path / "failing.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import common, simclr_disc
steps, z_std = [], simclr_disc.z_std

def fail(z):
    steps.append(1)
    if len(steps) == 3 and common.rank() == 1:
        raise RuntimeError("this rank fails at step 3")
    return z_std(z)

simclr_disc.z_std = fail
common.launch(simclr_disc.main)
""")
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "failing.py", *TINY, *RUN, "--coeff", "0", "--epochs", "100"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert job.returncode == 1 and "RuntimeError: this rank fails at step 3" in job.stderr
