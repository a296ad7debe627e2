"""Scripts run in processes of their own, which begin with torch imported and can be killed."""
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from functools import partial

import torch

import common
import linear_eval

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])
EBM = ["--dataset", "synthetic", "--subset", "64", "--width", "8", "--ebm-iters", "2",
       "--precision", "fp32", "--ebm", "ebm.pt"]
TINY = [*EBM, "--batch-size", "16", "--epochs", "2"]


def argv(script, flags):
    return [script, *{"common": EBM, "linear_eval": []}.get(script, TINY), *flags]


def work(script, flags, directory, moment=None, place=None, environment={}):
    """Run the script's main, and die by SIGKILL before the `moment`-th renaming of a file.

    With "each", live, and leave what a kill before the n-th would have left in `directory`/../n;
    with a file's name, what kills before its renamings would.
    The script and its common.py are those in the directory `place`, if given.
    """
    os.environ.update(environment)
    os.chdir(directory)
    if place:
        del sys.modules["common"], sys.modules["linear_eval"]
        sys.path.insert(0, str(place))
    common, linear_eval = map(importlib.import_module, ("common", "linear_eval"))
    torch.set_num_threads(1)
    moments, replace = iter(range(1, 1000)), os.replace

    def mortal(*args):
        now = next(moments)
        if moment in ("each", str(args[1])):
            shutil.copytree(".", f"../{now}")
        if now == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*args)

    common.os.replace = mortal
    common.EBM_ROUND, common.CHECKPOINT_SECONDS = 1, -1
    linear_eval.METRICS["linear"] = partial(linear_eval.linear_accuracy, epochs=2)
    common.draw_shapes = partial(lambda draw, n, seed: draw(n // 25, seed), common.draw_shapes)
    sys.argv = argv(script, flags)
    sys.stdout = open("out", "a")
    sys.stderr = open("err", "a")
    common.launch(importlib.import_module(script).main)


def start(script, directory, *flags, moment=None, place=None, **environment):
    process = CONTEXT.Process(target=work, args=(script, flags, directory, moment, place,
                                                 environment))
    process.start()
    return process


def run(*args, **kwargs):
    """Exit status of the script, negative where a signal ended it."""
    return wait(start(*args, **kwargs))


def wait(process):
    process.join(120)
    return process.exitcode


def ranks(script, directory, *flags, moments=(None, None)):
    """Two ranks of the script, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [start(script, directory, *flags, moment=moments[rank], RANK=str(rank), WORLD_SIZE="2",
                  LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
            for rank in range(2)]


def unfinish(run):
    """Make a finished run one that was killed after its first epoch, as far as its files say."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**saved, "done": 1}, run / "checkpoint.pt")
    (run / "eval.json").unlink()


def killed_copies(directory):
    """What a kill would have left, {the file that was about to be renamed: the directory}; of
    several such kills the last."""
    copies = sorted((path for path in directory.parent.iterdir() if path.name.isdigit()),
                    key=lambda path: int(path.name))
    return {str(new.relative_to(copy)): copy for copy in copies for new in copy.rglob("*.new")}
