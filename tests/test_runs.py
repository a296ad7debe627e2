"""A run as a user types it: to the end, killed and resumed, repeated, and with a flag changed."""
import importlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from filelock import Timeout
from PIL import Image

import common
import linear_eval
import processes
from common import Discriminator, Encoder, Run, Training, UserError, draw_shapes, save

FIVE, MADE = ["--epochs", "5", "--run-dir", "run"], {"version": 2, "device": "cpu"}


def finish(script, directory, *flags):
    """Its exit status, and what it adds to stdout and stderr."""
    before = [len(text(directory, name)) for name in ("out", "err")]
    status = processes.run(script, directory, *flags)
    return status, *(text(directory, name)[n:] for name, n in zip(("out", "err"), before))


def text(directory, name):
    return (directory / name).read_text() if (directory / name).exists() else ""


def weights(directory):
    return torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, *finish("byol_disc", directory, *FIVE)


def test_a_run_leaves_what_the_design_says(whole):
    directory, status, out, err = whole
    assert status == 0, err
    run = directory / "run"
    names = sorted(path.name for path in run.iterdir())
    assert names == [".lock", "checkpoint.pt", "config.json", "eval.json", "log.jsonl"]
    header, *rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert header["argv"][0] == "byol_disc" and header["torch"] == torch.__version__
    assert header["threads"] >= 1 and header["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"loss", "pair12", "pair13", "pair23", "lr", "z_std", "images_per_s"} < set(rows[0])
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["pair12"] + 0.1 * (rows[0]["pair13"] + rows[0]["pair23"]) / 2, abs=1e-5)
    assert [row["lr"] for row in rows[:2]] == pytest.approx([1.5e-3, 3e-3])     # two warm-up steps
    torch.manual_seed(0)
    start, end = Encoder(8).net[0].weight, weights(directory)
    online, target = end["encoder.net.0.weight"], end["target_encoder.net.0.weight"]
    assert not any(map(torch.equal, [online, target, target], [start, start, online]))
    result = json.loads((run / "eval.json").read_text())
    metrics = {"linear", "knn5", "knn_cosine"}
    assert set(result) == metrics | {"split", "data", "untrained"}
    assert set(result["untrained"]) == metrics
    assert json.loads((run / "config.json").read_text())["computed_in"] == "fp32"
    assert out.count("epoch ") == 5 and "trained   encoder" in out


def test_a_finished_run_says_so_and_stops(whole):
    directory = whole[0]
    before = (directory / "run" / "log.jsonl").read_bytes()
    status, out, _ = finish("byol_disc", directory, *FIVE)
    assert status == 0 and "is finished\ntrained   encoder: linear" in out
    assert (directory / "run" / "log.jsonl").read_bytes() == before


def test_other_flags_are_refused(whole):
    status, _, err = finish("byol_disc", whole[0], *FIVE, "--coeff", "0.2")
    assert status == 2 and err == ("error: run: made with --coeff 0.1, not 0.2; name another "
                                   "--run-dir, --ebm or --data-dir, or use the same flags\n")


def test_stopped_by_a_signal_it_says_how_to_go_on(whole, tmp_path):
    (tmp_path / "ebm.pt").write_bytes((whole[0] / "ebm.pt").read_bytes())
    log = tmp_path / "run" / "log.jsonl"
    process = processes.start("byol_disc", tmp_path, *FIVE, "--eval-every", "1")     # not at once
    while process.is_alive() and not (log.exists() and '"epoch": 2' in log.read_text()):
        time.sleep(0.002)
    process.terminate()
    assert processes.wait(process) == -signal.SIGTERM
    assert text(tmp_path, "err").strip() == ("stopped: the same command goes on from the last "
                                             "checkpoint, if any (one a minute)")
    interrupted = weights(tmp_path)
    status, out, err = finish("byol_disc", tmp_path, *FIVE)
    assert status == 0, err
    assert "epoch 1/5" not in out
    expected, resumed = weights(whole[0]), weights(tmp_path)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert not all(torch.equal(expected[name], interrupted[name]) for name in expected)
    log = log_of(tmp_path)
    assert log.count(None) == 2 and [epoch for epoch in log if epoch] == [1, 2, 3, 4, 5]


def test_chain_of_a_langevin_run(tmp_path):
    """I_0 has the error of its noise; steps of noise alone add theirs; the picture shows them."""
    args = SimpleNamespace(run_dir=str(tmp_path / "run"), dataset="synthetic", data_dir="", seed=0,
                           device="cpu", precision="fp32", batch_size=8, alpha=0.6, steps=12,
                           step_size=0.0, noise_std=1.0, noise_unit=0.02, grad_clip=0.01)
    x, f = torch.full((64, 3, 32, 32), 127, dtype=torch.uint8), Discriminator(8)
    Run(args, x, None).save_chain(f, x)
    chain = json.loads((tmp_path / "run" / "chain.json").read_text())
    assert chain["steps"] == [0, 5, 10, 12]
    expected = [-10 * math.log10(0.4 ** 2 / 12 + step * 0.02 ** 2) for step in chain["steps"]]
    assert chain["psnr"] == pytest.approx(expected, abs=0.05)
    assert chain["f_of_x"] == pytest.approx(f(x[:1] / 255).item(), abs=1e-4)
    assert len(chain["f"]) == 4 and chain["f"][0] != pytest.approx(chain["f_of_x"], abs=1e-4)
    with Image.open(tmp_path / "run" / "langevin.png") as picture:
        assert picture.size == (64 * 34 + 2, 5 * 34 + 2)


@pytest.mark.parametrize("when", ["at its second step", "after its last"])
def test_what_is_not_finite_stops_the_run_and_is_not_kept(tmp_path, monkeypatch, when):
    """Whether a loss says so, or only the weights that the last step leaves."""
    args = SimpleNamespace(run_dir=str(tmp_path / "run"), dataset="synthetic", data_dir="", seed=0,
                           device="cpu", precision="fp32", batch_size=8, epochs=2, lr=1.0,
                           eval_every=0)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    run, model = Run(args, torch.zeros(8), None), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(UserError, match="not finite at step 2 of epoch 2, .*; try a smaller one"):
        for epoch in run.epochs(model=model, optimizer=optimizer):
            for step in (1, 2):
                loss = float("nan") if (epoch, step, when[:2]) == (2, 2, "at") else 1.0
                run.log(loss=torch.tensor(loss), z_std=torch.tensor(1.0))
            if epoch == 2 and when.startswith("after"):
                model.weight.data[0, 0] = float("inf")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1 and saved["model"]["weight"].isfinite().all()


def test_a_checkpoint_of_other_code_is_refused(tmp_path):
    training = Training(tmp_path, MADE)
    save(tmp_path / "checkpoint.pt", config=MADE, done=1, ranks=1,
         model=torch.nn.Linear(2, 2).state_dict())
    assert training.restore({"model": torch.nn.Linear(2, 2)}) == 1
    for other in (torch.nn.Linear(3, 2), torch.nn.Identity(), torch.nn.BatchNorm1d(2)):
        with pytest.raises(UserError, match="not a whole file of ours .* of older code"):
            training.restore({"model": other})


@pytest.mark.parametrize("script", ["simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"])
def test_every_flag_but_six_tells_runs_apart(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--run-dir", str(tmp_path / "run"), "--ebm",
                                      str(tmp_path / "ebm.pt")])
    flags = vars(importlib.import_module(script).parse())
    where = ("run_dir", "data_dir", "ebm", "device", "eval_every", "eager")
    for flag, value in flags.items():
        with (nullcontext() if flag in where else
              pytest.raises(UserError, match="other code" if flag == "version" else
                            f"made with --{flag.replace('_', '-')} other, not {value}")):
            common.same_config("run", {**flags, flag: "other"}, flags)
    assert len(flags) > 20


def test_another_number_of_ranks_is_refused(tmp_path):
    training, model = Training(tmp_path, MADE), torch.nn.Linear(2, 2)
    for _ in training.rounds("epoch", 1, 1, {"model": model}):
        training.log(loss=torch.tensor(1.0))
        training.keep(training.means(), "")
    training.ranks = 2
    with pytest.raises(UserError, match="checkpoint.pt: made on 1 ranks; start as many"):
        training.restore({"model": model})


@pytest.mark.parametrize("name, content", [
    ("config.json", '{"learning": "my own"}'), ("log.jsonl", '{"epoch": 1}\n{"epoch": 2}\n')])
def test_a_directory_of_somebody_else_is_left_as_it_is(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        training = Training(tmp_path, MADE)
        next(training.rounds("epoch", 1, 1, {}))
    assert (tmp_path / name).read_text() == content


def test_a_log_from_before_the_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    for argv in (["first"], ["second"]):
        monkeypatch.setattr(sys, "argv", argv)
        common.start_log(tmp_path / "log.jsonl", "epoch", 0, "cpu")
        common.append(tmp_path / "log.jsonl", {"epoch": 1})
    first, *rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["argv"] == ["second"] and rows == [{"epoch": 1}]
    monkeypatch.setattr(sys, "argv", ["third"])
    common.append(tmp_path / "log.jsonl", {"epoch": 2})
    common.start_log(tmp_path / "log.jsonl", "epoch", 1, "cpu")
    rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [row.get("argv", row.get("epoch")) for row in rows] == [["second"], 1, ["third"]]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_log_names_this_codes_commit_or_none(tmp_path, monkeypatch):
    """Marked where a script beside it is not as committed; never that of another repository."""
    def git(*words, of=tmp_path):
        words = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(of), *words]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    def logged():
        common.start_log(tmp_path / "log.jsonl", "epoch", 0, "cpu")
        return json.loads((tmp_path / "log.jsonl").read_text())["commit"]

    def write(name, content):
        (tmp_path / name).write_text(content)

    write("common.py", "")
    write("README.md", "")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert logged() is None                             # no repository
    git("init", "-q")
    git("add", "README.md")
    git("commit", "-qm", "another's")
    assert logged() is None                             # one that does not have this code
    git("add", "common.py")
    git("commit", "-qm", "this code")
    commit = git("rev-parse", "HEAD")
    write("README.md", "more")
    assert logged() == commit and len(commit) == 40
    for name in ("common.py", "mine.py"):
        write(name, "1")
        assert logged() == f"{commit}+changes"
        git("add", name)
        assert logged() == f"{commit}+changes"
        git("commit", "-qm", "its change")
        commit = git("rev-parse", "HEAD")
        assert logged() == commit
    (tmp_path / "other").mkdir()
    git("init", "-q", of=tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert logged() == commit
    monkeypatch.setenv("PATH", "")
    assert logged() is None                             # no git


def test_the_log_names_the_gpu_computed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", "name of {}".format)
    for device, expected in [("cuda:1", "name of cuda:1"), ("cpu", None)]:
        common.start_log(tmp_path / "log.jsonl", "epoch", 0, device)
        assert json.loads((tmp_path / "log.jsonl").read_text())["gpu"] == expected


def draw_folder(path, name_of):
    """40 drawn images in the folders path/name_of(i, label)."""
    for i, (image, label) in enumerate(zip(*draw_shapes(40, seed=3))):
        place = path / name_of(i, int(label)) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place)


@pytest.fixture
def stopped(tmp_path):
    """A run on a folder of 40 drawn images, killed before its second epoch's line in the log."""
    draw_folder(tmp_path / "images" / "train", lambda *_: "all")
    flags = ["--dataset", "folder", "--subset", "0", "--coeff", "0", "--run-dir", "run"]

    def go_on(data_dir, **kwargs):
        return processes.run("byol_disc", tmp_path, *flags, "--data-dir", str(data_dir), **kwargs)

    assert go_on("images", moment=5) == -9                  # before the fifth file or line
    assert log_of(tmp_path) == [None, 1]
    return tmp_path, go_on


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A finished run on images of two classes, and a folder where those of the test are swapped."""
    directory = tmp_path_factory.mktemp("evaluated")
    for name, classes in [("images", "ab"), ("swapped", "ba")]:
        draw_folder(directory / name / "train", lambda i, label: "ab"[label % 2])
        draw_folder(directory / name / "test", lambda i, label: classes[label % 2 ^ i % 4 // 3])
    assert finish("byol_disc", directory, *LABELLED, "--data-dir", "images")[0] == 0
    return directory


LABELLED = ["--dataset", "folder", "--subset", "0", "--coeff", "0", "--run-dir", "run"]


def cells(out):
    """The accuracies of the only row of a table."""
    row, = [line for line in out.splitlines() if line.startswith("| byol")]
    return [float(cell) for cell in row.split(" | ")[1:4]]


@pytest.mark.parametrize("known", [True, False], ids=["new", "old"])
def test_a_finished_run_answers_for_its_own_data_alone(evaluated, tmp_path, known):
    """For others it is refused by its script, and measured anew by linear_eval.py, which only
    reads. So it is where an eval.json of older code does not say what it is of."""
    directory = tmp_path / "copy"
    shutil.copytree(evaluated, directory)
    path = directory / "run" / "eval.json"
    result = json.loads(path.read_text())
    if not known:
        del result["data"]
        path.write_text(json.dumps(result))
    said = [round(result[metric], 2) for metric in linear_eval.METRICS]
    assert said[1] != 50                                # else a swap would not show

    status, out, _ = finish("byol_disc", directory, *LABELLED, "--data-dir", "images")
    assert status == 0 and "run is finished" in out
    status, out, err = finish("byol_disc", directory, *LABELLED, "--data-dir", "swapped")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.endswith("python linear_eval.py run --data-dir swapped\n")
    assert cells(finish("linear_eval", directory, "run")[1]) == said
    swapped = [round(100 - accuracy, 2) for accuracy in said]           # of two classes
    assert cells(finish("linear_eval", directory, "run", "--data-dir", "swapped")[1]) == swapped
    status, out, err = finish("linear_eval", directory, "run", "--data-dir", "nowhere")
    assert status == 2 and out == "" and "--data-dir nowhere: has no train" in err
    assert json.loads(path.read_text()) == result

    (directory / "run" / "checkpoint.pt").unlink()
    status, out, err = finish("linear_eval", directory, "run", "--data-dir", "swapped")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "run: no checkpoint.pt, and no eval.json known to be of --data-dir swapped" in err
    (directory / "images").rename(directory / "moved")                  # and none is named
    assert cells(finish("linear_eval", directory, "run")[1]) == said
    (directory / "swapped").rename(directory / "images")
    status, out, err = finish("linear_eval", directory, "run")
    assert (status, out) == (2, "") if known else cells(out) == said


def test_a_link_to_a_run_and_its_copy_are_the_same_run(evaluated, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(evaluated, directory)
    (directory / "latest").symlink_to("run")
    shutil.copytree(directory / "run", directory / "backup")
    status, out, err = finish("linear_eval", directory, "run", "latest", "./run", "backup")
    assert status == 0 and out.startswith("run and backup: the same run, counted once\n| run |")
    assert cells(out) and " | 1 |" in out and "±" not in out
    result = json.loads((directory / "backup" / "eval.json").read_text())
    (directory / "backup" / "eval.json").write_text(json.dumps({**result, "linear": 1.0}))
    status, out, err = finish("linear_eval", directory, "latest", "backup")
    assert status == 2 and cells(out)[0] == round(result["linear"], 2) and " | 1 |" in out
    assert err == "error: latest and backup: two results of one seed, the first counts; name one\n"


def test_an_unfinished_run_has_a_row_of_its_own(evaluated, tmp_path):
    """That of its epochs done, and of those it would have."""
    directory = tmp_path / "copy"
    shutil.copytree(evaluated, directory)
    flags = [*LABELLED, "--data-dir", "images", "--run-dir", "long", "--seed", "1"]
    assert processes.run("byol_disc", directory, *flags, "--epochs", "3", moment=7) == -9
    status, out, err = finish("linear_eval", directory, "run", "long")
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| byol")]
    assert status == 0 and rows == ["| byol_disc epochs=2", "| byol_disc epochs=2 of 3"], err


def test_runs_in_other_number_formats_have_rows_of_their_own(evaluated, tmp_path):
    """By what --precision came to, which a run of older code does not say."""
    config = json.loads((evaluated / "run" / "config.json").read_text())
    for seed, came_to in enumerate(["fp32", "bf16", None, "fp32"]):
        shutil.copytree(evaluated / "run", tmp_path / str(seed))
        common.write_json(tmp_path / str(seed) / "config.json", {
            **config, "precision": "auto", "computed_in": came_to, "seed": seed})
    status, out, err = finish("linear_eval", tmp_path, *"0123")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| byol")]
    assert status == 0 and [(row[0], row[-1]) for row in rows] == [
        ("| byol_disc precision=fp32", "2 |"), ("| byol_disc precision=bf16", "1 |"),
        ("| byol_disc precision=auto", "1 |")], err


AUTO = {**MADE, "precision": "auto"}


@pytest.mark.parametrize("saved, wanted, refused", [
    ({"computed_in": "bf16"}, {"computed_in": "bf16"}, ""),
    ({"computed_in": "bf16"}, {"computed_in": "bf16", "precision": "bf16"}, ""),
    ({"computed_in": "bf16"}, {"computed_in": "fp32"},
     "--precision bf16, not fp32; .* or use the same flags and --run-dir$"),
    ({}, {"computed_in": "fp32"}, ""), ({"computed_in": None}, {"computed_in": "fp32"}, ""),
    ({}, {"computed_in": "fp32", "precision": "fp32"}, "--precision auto, not fp32;")])
def test_a_run_goes_on_in_the_number_format_it_began_in(tmp_path, saved, wanted, refused):
    """However that is asked for; a run of older code, which does not say, with the same flag."""
    state = {"model": torch.nn.Linear(2, 2)}
    save(tmp_path / "checkpoint.pt", config={**AUTO, **saved}, done=1, ranks=1,
         model=state["model"].state_dict())
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        next(Training(tmp_path, {**AUTO, **wanted}).rounds("epoch", 2, 1, state))
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["computed_in"] == saved.get("computed_in")


def test_a_run_and_an_ebm_note_the_number_format(tmp_path, monkeypatch):
    def lock(training, **_):
        raise UserError(training.config["computed_in"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["byol_disc.py", *processes.EBM, "--precision", "auto"])
    monkeypatch.setattr(Training, "lock_directory", lock)
    args, images = importlib.import_module("byol_disc").parse(), torch.zeros(8)
    for bf16, expected in [(True, "bf16"), (False, "fp32")]:
        monkeypatch.setattr(common, "in_bf16", lambda _: bf16)
        run = Run(args, images, None)
        for begin in (lambda: common.train_ebm(images, args), run.lock_directory):
            with pytest.raises(UserError, match=expected):
                begin()


@pytest.mark.parametrize("run_dir, refused", [
    *((place, True) for place in ("ebm.ebm", "./x/../ebm.ebm", "{here}/ebm.ebm", "link", "x/new",
                                  "other.ebm", "other")),
    *((place, False) for place in ("ebm", "ebm.ebm/run", "x"))])
def test_a_run_is_not_kept_where_an_ebm_is(run_dir, refused, tmp_path, monkeypatch):
    """By whatever path: the EBM's would be the run's log, and its lock held already."""
    monkeypatch.chdir(tmp_path)
    for link, place in [("link", "ebm.ebm"), ("deep.ebm", "x/new"), ("other", "other.ebm")]:
        (tmp_path / link).symlink_to(place)
    ebm = "deep.pt" if run_dir == "x/new" else "ebm.pt"
    flags = ["--run-dir", run_dir.format(here=tmp_path), "--ebm", ebm]
    for script in ("simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        with pytest.raises(UserError, match=f"--run-dir .*: is an EBM's .--ebm {ebm}.; name"
                           ) if refused else nullcontext():
            importlib.import_module(script).parse()
    assert common.parse_flags(common.make_parser("x", training=False), flags[2:]).ebm == ebm


@pytest.mark.parametrize("error, said", [
    (Timeout("run/.lock"), "another process is at this run; .* if none is, remove .*run/.lock$"),
    (OSError(95, "Operation not supported"), "run: Operation not supported; name another place"),
    (NotImplementedError("no flock"), "run: no flock; name another place")])
def test_a_lock_that_cannot_be_had_is_a_line(error, said, tmp_path, monkeypatch):
    """One that a killed process left where the file system has none is named."""
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(common.FileLock, "acquire", fail)
    with pytest.raises(UserError, match=said):
        Training(tmp_path / "run", MADE).lock_directory()


def log_of(directory):
    rows = map(json.loads, (directory / "run" / "log.jsonl").read_text().splitlines())
    return [row.get("epoch") for row in rows]


@pytest.mark.parametrize("path", ["images/", "./images", "{here}/images", "elsewhere"])
def test_the_same_images_are_known_wherever_they_are(stopped, path):
    directory, go_on = stopped
    if path == "elsewhere":
        (directory / "images").rename(directory / path)
    assert go_on(path.format(here=directory)) == 0, (directory / "err").read_text()
    assert log_of(directory) == [None, 1, None, 2]


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_other_images_are_refused(stopped, change):
    directory, go_on = stopped
    images = directory / "images" / "train" / "all"
    if change == "added":
        (images / "new.png").write_bytes((images / "0.png").read_bytes())
    elif change == "removed":
        (images / "0.png").unlink()
    else:
        (images / "0.png").write_bytes((images / "1.png").read_bytes())
    assert go_on("images") == 2
    assert (directory / "err").read_text() == (
        "error: run: made with other images; name another --run-dir, --ebm or --data-dir, or use "
        "the same flags\n")
    assert log_of(directory) == [None, 1]


def test_a_run_knows_its_ebm_by_its_weights(tmp_path):
    """Under another name it goes on with it; with another one, made with the same flags, not."""
    def go_on(ebm, **kwargs):
        return processes.run("byol_disc", tmp_path, "--run-dir", "run", "--ebm", ebm, **kwargs)

    assert processes.run("simclr_disc", tmp_path, "--run-dir", "other", "--ebm", "other.pt",
                         "--seed", "1", "--epochs", "1") == 0, (tmp_path / "err").read_text()
    assert go_on("ebm.pt") == 0
    (tmp_path / "ebm.pt").rename(tmp_path / "moved.pt")
    (tmp_path / "run" / "eval.json").unlink()
    assert go_on("moved.pt") == 0, (tmp_path / "err").read_text()
    for finished in (True, False):
        (tmp_path / "err").unlink(missing_ok=True)
        assert go_on("other.pt") == 2 and (tmp_path / "run" / "eval.json").exists() == finished
        assert (tmp_path / "err").read_text().startswith("error: run: made with another EBM or")
        assert not finished or go_on("gone.pt") == 0    # one that is gone makes no difference
        assert not (tmp_path / "gone.pt").exists()
        (tmp_path / "run" / "eval.json").unlink(missing_ok=True)


def test_an_ebm_that_is_missing_for_a_while_costs_no_run(tmp_path):
    """The EBM is looked for, and nothing noted of it before it is known."""
    common.write_json(tmp_path / "config.json", {**MADE, "f": 7})
    save(tmp_path / "checkpoint.pt", config={**MADE, "f": 7}, done=1)
    for f, refused in [(None, False), (8, True), (7, False)]:
        training = Training(tmp_path, dict(MADE))
        if f:
            training.config["f"] = f
        with pytest.raises(UserError, match="another EBM") if refused else nullcontext():
            training.check_config()
    assert json.loads((tmp_path / "config.json").read_text())["f"] == 7


def test_what_another_process_has_made_meanwhile_is_seen_and_kept(tmp_path):
    training = Training(tmp_path, {**MADE, "seed": 0})
    common.write_json(tmp_path / "config.json", {**MADE, "seed": 1})
    (tmp_path / "eval.json").touch()
    with pytest.raises(UserError, match="made with --seed 1, not 0"):
        training.lock_directory()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_a_checkpoint_is_written_once_a_minute_and_at_the_end(tmp_path, monkeypatch, capsys):
    """By a clock that nobody sets, while that of the wall goes back."""
    clock, written, write_whole, model = [0.0], [], common.write_whole, torch.nn.Linear(2, 2)
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common.time, "time", lambda: -clock[0])
    monkeypatch.setattr(common, "write_whole", lambda path, fill: written.append(clock[0])
                        if path.name == "checkpoint.pt" else write_whole(path, fill))
    training = Training(tmp_path / "run", MADE)
    for _ in training.rounds("epoch", 10, 1, {"model": model}):
        clock[0] += 20
        training.log(loss=torch.tensor(1.0))
        row = training.means()
        clock[0] += 5                                   # for what is no training, such as kNN
        training.keep(row, "")
    assert written == [75, 150, 225, 250]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")][1:]
    assert [row["seconds"] for row in rows] == 10 * [20]
    assert "epoch 4/10    0:02:30 left" in capsys.readouterr().out

    monkeypatch.undo()
    before = model.weight.clone()
    training = Training(tmp_path / "again", MADE)
    for _ in training.rounds("epoch", 2, 1, {"model": model}):
        training.log(loss=torch.tensor(1.0))
        training.keep(training.means(), "")
    model.weight.data.zero_()
    assert Training(tmp_path / "again", MADE).restore({"model": model}) == 2
    assert torch.equal(model.weight, before) and before.ne(0).all()


def test_a_clock_that_stands_still_stops_no_run(monkeypatch):
    monkeypatch.setattr(common.time, "monotonic", lambda: 5.0)
    run = SimpleNamespace(rows=[{}], args=SimpleNamespace(batch_size=8), round_began=5.0)
    run.seconds = lambda: Run.seconds(run)
    assert Run.speed(run) > 1e6
    run.round_began = 3.0
    assert Run.speed(run) == 4.0


def test_table_of_runs_and_ebm(whole):
    """The table has what the run said of itself, computed again from its checkpoint."""
    (whole[0] / "run" / "eval.json").rename(whole[0] / "said.json")
    status, out, err = finish("linear_eval", whole[0], "run", "ebm.pt", "ebm.ebm", "--untrained")
    assert status == 0, err
    assert not (whole[0] / "run" / "eval.json").exists()                # it only reads
    (whole[0] / "said.json").rename(whole[0] / "run" / "eval.json")
    result = json.loads((whole[0] / "run" / "eval.json").read_text())
    lines = out[out.index("| run |"):].splitlines()
    for line, row in [(lines[2], result), (lines[3], result["untrained"])]:
        cells = [f"{row[metric]:.2f}" for metric in ("linear", "knn5", "knn_cosine")]
        assert " | ".join([*cells, "1 |"]) in line
    labels = [line.split(" | ")[0] for line in lines[2:8]]
    run = "| byol_disc ebm_iters=2 layers=last"
    assert labels == [run, f"{run}, untrained encoder", *(
        f"| ebm ebm_iters={n} layers={layers}" for n in (2, 0) for layers in ("last", "all"))]


def test_what_is_no_run_costs_the_table_no_row(whole, tmp_path):
    """Leftovers are named, and what is wrong with one run is said after the rows of the others."""
    shutil.copytree(whole[0], tmp_path / "all")
    for name in ("begun/.lock", "ebm.new"):
        (tmp_path / "all" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "all" / name).touch()
    for name in ("damaged", "elsewhere", "older"):
        shutil.copytree(whole[0] / "run", tmp_path / "all" / name)
        (tmp_path / "all" / name / "eval.json").unlink()
    (tmp_path / "all" / "damaged" / "checkpoint.pt").write_bytes(b"PK")
    config = tmp_path / "all" / "elsewhere" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "images": 12345}))
    older = {**json.loads(config.read_text()), "ebm_objective": "ade"}
    del older["version"]
    (tmp_path / "all" / "older" / "config.json").write_text(json.dumps(older))
    paths = ["damaged", "run", "elsewhere", "begun", "ebm.new", "ebm.ebm", "older"]
    status, out, err = finish("linear_eval", tmp_path / "all", *paths)
    assert status == 2 and err.count("\n") == 1 and out.count("| byol_disc") == 1
    assert "damaged/checkpoint.pt: not a whole file" in err
    assert "elsewhere: made with other images; name another" in err
    assert "older/config.json: not a whole file of ours (KeyError: 'version')" in err
    assert "ebm.ebm" not in out and "begun: left out" in out and "ebm.new: left out" in out
    status, out, err = finish("linear_eval", tmp_path / "all", "run", "typo")
    assert status == 2 and out == "" and err.startswith("error: typo: there is no such")
    status, out, err = finish("linear_eval", tmp_path / "all", "begun")
    assert status == 2 and "begun: left out" in out
    assert err == "error: nothing to evaluate; name runs, as in runs/*\n"


def test_a_run_with_a_damaged_checkpoint(whole, tmp_path):
    """Is shown from its eval.json; without one it is a line, to a script and to linear_eval.py."""
    shutil.copytree(whole[0], tmp_path / "copy")
    checkpoint = tmp_path / "copy" / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    for script, flags in [("byol_disc", FIVE), ("linear_eval", ["run"])]:
        status, out, err = finish(script, tmp_path / "copy", *flags)
        assert status == 0 and ("is finished" in out or "| byol_disc " in out), err
    (tmp_path / "copy" / "run" / "eval.json").unlink()
    for script, flags in [("byol_disc", FIVE), ("linear_eval", ["run"])]:
        status, _, err = finish(script, tmp_path / "copy", *flags)
        assert status == 2 and err.count("\n") == 1, err
        assert err.startswith("error: run/checkpoint.pt: not a whole file of ours"), err
