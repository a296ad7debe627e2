"""Bad input, to all six programs: exit status 2, one line that names it, and no file written."""
import io
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import byol_disc
import byol_langevin
import common
import linear_eval
import simclr_disc
import simclr_langevin
from common import UserError
from processes import run

LANGEVIN, DISC = [simclr_langevin, byol_langevin], [simclr_disc, byol_disc]
BYOL, SIMCLR = [byol_disc, byol_langevin], [simclr_disc, simclr_langevin]
TRAINING = LANGEVIN + DISC
ALL = [*TRAINING, common]
FLAGS = ["--dataset", "synthetic", "--subset", "512", "--width", "8", "--ebm-iters", "1"]


class Pickled:
    def __reduce__(self):
        return os.mkdir, ("code was run",)


def foreign(content):
    def put(path):
        torch.save(content, path)
    return put


def times():
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")
            if path.is_file() and path.name != ".lock"}


def refused(program, flags, monkeypatch, capsys):
    """The line on stderr with which the program ends, having left but the lock of a run."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    before = times()
    with pytest.raises(SystemExit) as end:
        common.launch(program.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert times() == before
    return err


CASES = [
    (ALL, "--width 7", "--width"), (ALL, "--width 1025", "--width"),
    (ALL, "--device meta", "--device meta"), (TRAINING, "--emb 10000000000000", "--emb"),
    (ALL, "--width 8.5", "--width"), (ALL, "--seed -1", "--seed"),
    (ALL, "--seed 9999999999999999999", "--seed"), (ALL, "--subset -1", "--subset"),
    (ALL, "--subset 5001", "--subset 5001"), (ALL, "--ebm-iters -1", "--ebm-iters"),
    (ALL, "--ebm-rotation nan", "--ebm-rotation"), (ALL, "--ebm-objective vae", "--ebm-objective"),
    (ALL, "--precision fp16", "--precision"), (ALL, "--device nowhere", "--device nowhere"),
    (ALL, "--dataset mnist", "--dataset"), (ALL, "--dataset folder", "--data-dir data"),
    (ALL, "--dataset cifar10 --data-dir /proc/none", "--data-dir"),
    (ALL, "--ebm file/ebm.pt", "file/ebm.ebm: Not a directory"), (ALL, "--unknown 1", "--unknown"),
    (ALL, "--wid 8", "--wid"), (ALL, "--ebm ebm.partial", "--ebm ebm.partial"),
    (ALL, f"--subset {10 ** 50}", "--subset"),
    (LANGEVIN, "--use dataset --view augment", "--view augment"),
    (TRAINING, "--run-dir file/run", "file/run"), (TRAINING, "--epochs 0", "--epochs"),
    (TRAINING, "--run-dir file", "file: File exists; name another"),
    (TRAINING, f"--run-dir {256 * 'x'}", "File name too long"),
    (ALL, f"--ebm {252 * 'x'}.pt", "File name too long"),
    (TRAINING, f"--batch-size {10 ** 250}", "--run-dir: too many flags to name it by"),
    (TRAINING, f"--epochs {10 ** 10}", "--epochs"), (ALL, f"--ebm-iters {10 ** 10}", "--ebm-iters"),
    (TRAINING, "--batch-size 1", "--batch-size"), (TRAINING, "--batch-size 513", "size 513"),
    (TRAINING, "--lr inf", "--lr"), (TRAINING, "--lr -1", "--lr"), (TRAINING, "--emb 0", "--emb"),
    (TRAINING, "--coeff -0.1", "--coeff"), (TRAINING, "--coeff nan", "--coeff"),
    (TRAINING, "--eval-every -1", "--eval-every"), (TRAINING, "--schedule flat", "--schedule"),
    (LANGEVIN, "--alpha 1.1", "--alpha"), (LANGEVIN, "--alpha -0.1", "--alpha"),
    (LANGEVIN, "--steps -1", "--steps"), (LANGEVIN, "--steps 1.5", "--steps"),
    (LANGEVIN, "--step-size -1", "--step-size"), (LANGEVIN, "--noise-std -1", "--noise-std"),
    (LANGEVIN, "--noise-unit inf", "--noise-unit"), (LANGEVIN, "--grad-clip nan", "--grad-clip"),
    (LANGEVIN, "--use both", "--use"), (LANGEVIN, "--view disc", "--view"),
    (DISC, "--layers first", "--layers"), (DISC, "--alpha 0.5", "--alpha"),
    (SIMCLR, "--temperature 0", "--temperature"), (BYOL, "--tau 1.1", "--tau"),
    (BYOL, "--tau nan", "--tau"),
    ([linear_eval], "", "paths"), ([linear_eval], "nowhere", "nowhere"),
    ([linear_eval], "file", "nothing"), ([linear_eval], "nowhere.pt", "nowhere.pt"),
]


@pytest.mark.parametrize("programs, flags, named", CASES, ids=[flags for _, flags, _ in CASES])
def test_a_mistake_is_one_line_and_writes_no_file(programs, flags, named, tmp_path, monkeypatch,
                                                  capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for program in programs:
        given = flags.split() if program is linear_eval else [*FLAGS, *flags.split()]
        assert named in refused(program, given, monkeypatch, capsys)


@pytest.mark.parametrize("put, named", [
    (lambda path: path.write_bytes(b""), "not a whole file of ours (EOFError"),
    (lambda path: path.write_bytes(b"hello"), "(KeyError: 101)"),
    (lambda path: path.write_bytes(b"PK\3\4 truncated"), "not a whole file of ours"),
    (foreign({"d": 1}), "KeyError: 'version'"), (foreign([1]), "AttributeError"),
    (foreign({"config": Pickled()}), "(UnpicklingError: Weights only load failed)"),
    (foreign({"config": {}}), "KeyError: 'version'"),
    (foreign({"config": {"version": 2}}), "made with --dataset None, not synthetic"),
    (lambda path: path.mkdir(), "Is a directory")])
def test_a_file_that_is_not_ours_is_refused_and_kept(put, named, tmp_path, monkeypatch, capsys):
    """As an EBM, as a checkpoint, and to be evaluated."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ebm.pt")
    err = refused(byol_disc, [*FLAGS, "--ebm", "ebm.pt"], monkeypatch, capsys)
    assert "ebm.pt" in err and named in err
    (tmp_path / "other").mkdir()
    put(tmp_path / "other" / "checkpoint.pt")
    err = refused(byol_disc, [*FLAGS, "--coeff", "0", "--run-dir", "other"], monkeypatch, capsys)
    assert "other/checkpoint.pt" in err and (named in err or "KeyError: 'ranks'" in err)
    err = refused(linear_eval, ["ebm.pt"], monkeypatch, capsys)
    assert "ebm.pt" in err and (named in err or "KeyError: 'data_dir'" in err)
    assert not (tmp_path / "code was run").exists()


def test_what_is_only_read_need_not_be_writable(tmp_path, monkeypatch, capsys):
    """An EBM that is there, and a finished run; another is told so before anything takes long."""
    monkeypatch.setattr(sys, "argv", ["byol_disc.py", *FLAGS, "--run-dir", str(tmp_path / "run"),
                                      "--ebm", str(tmp_path / "ebm.pt")])
    args, images = byol_disc.parse(), torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    common.train_ebm(images, args)

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(common.FileLock, "acquire", closed)
    run = common.Run(args, images, None)
    assert run.get_ebm(images) is not None
    (tmp_path / "ebm.pt").rename(tmp_path / "other.pt")
    for write in (lambda: run.get_ebm(images), lambda: common.train_ebm(images, args),
                  lambda: next(run.epochs())):
        with pytest.raises(UserError, match="(run|ebm.ebm): Permission denied; name another"):
            write()
    accuracies = dict.fromkeys(linear_eval.METRICS, 50.0)
    common.write_json(tmp_path / "run" / "eval.json", {**accuracies, "untrained": accuracies})
    common.write_json(tmp_path / "run" / "config.json", run.config)
    with pytest.raises(SystemExit):
        common.Run(args, images, None)
    assert "run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval.json", "chain.json"])
def test_a_result_without_its_config_answers_nothing(name, tmp_path, monkeypatch, capsys):
    """Of which flags it is cannot be known."""
    accuracies = dict.fromkeys(linear_eval.METRICS, 50.0)
    common.write_json(tmp_path / name, {**accuracies, "untrained": accuracies})
    err = refused(byol_disc, [*FLAGS, "--run-dir", str(tmp_path)], monkeypatch, capsys)
    assert "has results but no config.json; name another --run-dir" in err
    assert [*tmp_path.iterdir()] == [tmp_path / name]


def test_help_has_the_defaults_of_the_preset(monkeypatch, capsys):
    for flags, epochs in [(["--help"], 1000), (["--smoke", "--help"], common.SMOKE["epochs"])]:
        monkeypatch.setattr(sys, "argv", ["byol_disc.py", *flags])
        with pytest.raises(SystemExit):
            byol_disc.parse()
        assert f"passes over training images (default: {epochs})" in " ".join(
            capsys.readouterr().out.split())


RANKS = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")


@pytest.mark.parametrize("environment", [
    *({name: value} for name, value in RANKS.items()),
    *({name: RANKS[name] for name in RANKS if name != left_out} for left_out in RANKS),
    {**RANKS, "RANK": "1"}, {**RANKS, "RANK": "one"}, {**RANKS, "MASTER_PORT": "a"}], ids=str)
def test_half_a_torchrun_is_one_line(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    err = refused(byol_disc, FLAGS, monkeypatch, capsys)
    assert "start with torchrun, or unset its variables" in err


@pytest.mark.parametrize("script", TRAINING)
def test_a_default_name_may_have_255_bytes(script, monkeypatch):
    for length in (255, 256):
        flags = ["--batch-size", "1" + (length - len(f"{script.__name__}-batch_size=1")) * "0"]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        with pytest.raises(UserError, match="name one") if length > 255 else nullcontext():
            assert len(Path(script.parse().run_dir).name) == length
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags, "--run-dir", "run"])
        assert script.parse().run_dir == "run"


TILDES = {"~/a~.pt": "/home/a~.pt", "~nobody-here/a.pt": "~nobody-here/a.pt", "a/~.pt": "a/~.pt"}


@pytest.mark.parametrize("program", ALL)
@pytest.mark.parametrize("given", TILDES)
def test_every_path_may_begin_with_a_tilde(program, given, monkeypatch):
    """Which no shell expands after a `=`."""
    monkeypatch.setenv("HOME", "/home")
    names = ["ebm", "data_dir", *["run_dir"] * (program is not common)]
    flags = [f"--{name.replace('_', '-')}={given}" for name in names]
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *flags])
    args = vars(common.parse_flags(common.make_parser("", training=False)) if program is common
                else program.parse())
    assert [args[name] for name in names] == [TILDES[given]] * len(names)


def test_so_may_those_of_linear_eval(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(linear_eval, "evaluate_ebm",
                        lambda path, flags: seen.append((str(path), flags.data_dir)) or [])
    (tmp_path / "a.pt").touch()
    err = refused(linear_eval, ["~/a.pt", "--data-dir=~/data"], monkeypatch, capsys)
    assert err == "error: nothing to evaluate; name runs, as in runs/*\n"
    assert seen == [(f"{tmp_path}/a.pt", f"{tmp_path}/data")]
    assert "~nobody-here: there is no such" in refused(
        linear_eval, ["~nobody-here"], monkeypatch, capsys)


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", 1)


OUTPUTS = [lambda: open(os.devnull, "w"), lambda: None, lambda: open("/dev/full", "w", 1),
           broken_pipe]


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("error", [None, *OUTPUTS])
def test_training_outlives_its_output(out, error, monkeypatch, capsys):
    """Closed, on a full disk, or without a reader: a line says so, if it can, and no more."""
    shown = []
    monkeypatch.setattr(sys, "stdout", out())
    if error:
        monkeypatch.setattr(sys, "stderr", error())
    at_exit = sys.stdout

    def main():
        for _ in range(3):
            common.show("a line")
            shown.append(sys.stdout)
    common.launch(main)
    assert len(shown) == 3 and not sys.stdout.isatty()
    sys.stdout.flush()                                  # as Python does when it ends
    failing = out in OUTPUTS[2:]
    assert capsys.readouterr().err.count("going on without it\n") == (failing and not error)


def failure(kind, said=""):
    def main():
        raise kind(said)
    return main


@pytest.mark.parametrize("error", OUTPUTS)
def test_a_mistake_and_a_signal_end_it_whatever_stderr_is(error, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "kill", lambda _, number: ended.append(number))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stderr", error())
    with pytest.raises(SystemExit) as end:
        common.launch(failure(UserError, "wrong"))
    assert end.value.code == 2
    monkeypatch.setattr(sys, "stderr", error())
    common.launch(failure(KeyboardInterrupt, signal.SIGTERM))
    assert ended == [signal.SIGTERM]


@pytest.mark.parametrize("main", [
    lambda: torch.empty(10 ** 14), lambda: bytearray(10 ** 15),
    failure(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB."),
    failure(RuntimeError, "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")])
def test_a_full_memory_is_one_line(main, capsys):
    with pytest.raises(SystemExit) as end:
        common.launch(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: out of memory; use a smaller --batch-size or --width, or another --device\n")


@pytest.mark.parametrize("main", [
    failure(RuntimeError, "CUDA error: an illegal memory access was encountered"),
    lambda: torch.ones(2) + torch.ones(3), failure(KeyError), failure(AssertionError)])
def test_a_slip_of_the_code_shows_its_traceback(main):
    with pytest.raises((RuntimeError, KeyError, AssertionError)):
        common.launch(main)


def test_no_character_stops_the_output(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        common.show("1 \xb1 2, \udcff")
        raise UserError("\xfc")

    with pytest.raises(SystemExit):
        common.launch(main)
    err.flush()
    assert out.buffer.getvalue() == b"1 \\xb1 2, \\udcff\n"
    assert err.buffer.getvalue() == b"error: \\xfc\n"


DAMAGE = {
    "generated.pt": [b"", b"PK\3\4 truncated"],
    "checkpoint.pt": [b"", b"PK\3\4 truncated"],
    "config.json": [b"", b"[1]", b"\xff"],
    "log.jsonl": [b"epoch 1\n", b"5\n", b'{"epoch": "1"}\n', b"\xff\n"],
    "eval.json": [b"", b"[]", b"{}", b'{"linear": "50"}',
                  b'{"linear": 1.0, "knn5": 1.0, "knn_cosine": 1.0, "untrained": {}}'],
}


def test_a_damaged_file_of_a_run_is_one_line(tmp_path):
    """To a script that would go on with it and, where that reads it, to linear_eval.py."""
    flags = ["--run-dir", "run", "--use", "dataset", "--steps", "1", "--subset", "64"]
    assert run("byol_langevin", tmp_path, *flags) == 0
    (tmp_path / "run" / "eval.json").rename(tmp_path / "eval.json")
    assert run("byol_langevin", tmp_path, *flags) == 0                  # it goes on, and ends
    (tmp_path / "run" / "eval.json").unlink()
    for name, contents in DAMAGE.items():
        path = tmp_path / "run" / name
        whole = path.read_bytes() if path.exists() else None
        for content in contents:
            path.write_bytes(content)
            (tmp_path / "err").unlink(missing_ok=True)
            assert run("byol_langevin", tmp_path, *flags) == 2, (name, content)
            err = (tmp_path / "err").read_text()
            assert err.startswith(f"error: run/{name}: ") and err.count("\n") == 1, err
            assert path.read_bytes() == content
        path.unlink() if whole is None else path.write_bytes(whole)
