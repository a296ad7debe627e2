"""The commands of README and RESULTS, unrolled by bash: each is one that its script accepts."""
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT


def commands():
    """Every command that runs a script, as a list of words, in blocks and in tables."""
    text = "\n\n".join((ROOT / name).read_text() for name in ("README.md", ".github/RESULTS.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\|.*?`(\w+\.py[^`]*)`", text, re.MULTILINE)
    rows = "\n".join(f"python {cell}" for cell in cells if " " in cell or "common" in cell)
    for block in [*blocks, rows]:
        if "python " in block:
            yield from unrolled(block)


def unrolled(block, shell="bash"):
    """The commands that a block runs, as lists of words."""
    stand_ins = 'python() { echo python "$@"; }; git() { :; }; cd() { :; }; pip() { :; }\n'
    out = subprocess.run([shell, "-euc", stand_ins + block], cwd=ROOT, capture_output=True,
                         text=True, check=True).stdout
    return [shlex.split(line) for line in out.splitlines()]


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_the_loops_are_the_same_under_zsh():
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    loops = [block for block in blocks if "small=" in block]
    assert loops and all(unrolled("setopt nonomatch\n" + loop, "zsh") == unrolled(loop)
                         for loop in loops)


def test_every_command_is_accepted(monkeypatch):
    seen = set()
    for _, script, *flags in commands():
        if script in ("-m", "tests/benchmark.py", "linear_eval.py"):
            continue
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr("sys.argv", [script, *flags])
        if script == "common.py":
            module.parse_flags(module.make_parser("", script))
            continue
        module.parse()
        seen.add((script, *flags))
        monkeypatch.setattr("sys.argv", [script, *flags, "--no-such-flag"])
        with pytest.raises(SystemExit):
            module.parse()
    assert len(seen) > 30
