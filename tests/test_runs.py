"""A run as a user types it: what it leaves, what stops it, the same command again, its table."""
import json
import math
import os
import random
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import byol_disc
import common
import linear_eval
import processes
from common import Discriminator, Encoder, Progress, UserError, draw_shapes, save
from conftest import ROOT
from processes import unfinish

FIVE = ["--epochs", "5", "--run-dir", "run"]
FOLDER = ["--dataset", "folder", "--subset", "0", "--coeff", "0"]


def log_of(directory):
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [row.get("epoch") for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a finished run and its EBM."""
    directory = tmp_path_factory.mktemp("whole")
    assert processes.run("byol_disc", directory, *FIVE) == 0, (directory / "err").read_text()
    return directory


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of it, which a test may change, as the working directory."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_leaves_what_the_design_says(whole):
    run = whole / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["precision"] == "fp32" and config["ranks"] == 1
    source = run / f"source-{config['code']}"
    assert config["encoder_modules"] == common.modules_checksum(Encoder(8))
    assert config["common_code"] == common.code_checksum([ROOT / "common.py"])
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoint.pt", "config.json", "eval.json", "log.jsonl", source.name}
    assert {path.name: path.read_text() for path in source.iterdir()} == {
        name: (ROOT / name).read_text() for name in ("common.py", "byol_disc.py", "linear_eval.py")}
    header, floor, *rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert header["argv"][0] == "byol_disc" and header["torch"] == torch.__version__
    assert [row["epoch"] for row in [floor, *rows]] == [0, 1, 2, 3, 4, 5]
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["pair12"] + 0.1 * (rows[0]["pair13"] + rows[0]["pair23"]) / 2, abs=1e-5)
    assert [row["lr"] for row in rows[:2]] == pytest.approx([1.5e-3, 3e-3])     # two warm-up steps
    result, metrics = json.loads((run / "eval.json").read_text()), {"linear", "knn5", "knn_cosine"}
    assert set(result) == metrics | {"split", "data", "evaluation", "untrained"}
    assert result["untrained"] == {name: floor[name] for name in metrics}
    out = (whole / "out").read_text()
    assert out.count("epoch ") == 5 and "test accuracy: linear" in out


def test_a_finished_run_is_that_of_its_ebm(copied, command):
    """Of another one in the same file it shows no accuracy; it needs none that was deleted."""
    files = {path: path.read_bytes() for path in (copied / "run").iterdir() if path.is_file()}
    ebm = torch.load("ebm.pt", weights_only=True)
    for change, expected in [(lambda: None, 0), (lambda: ebm["config"].update(code="other"), 0),
                             (lambda: ebm["d"]["linear.bias"].add_(1), 2), (ebm.clear, 0)]:
        change()
        torch.save(ebm, "ebm.pt") if ebm else os.remove("ebm.pt")
        status, out, err = command("byol_disc", *FIVE)
        assert status == expected and ("test accuracy" in out) == (status == 0), err
        assert ("run: made with another EBM or frozen network" in err) == (status == 2)
        assert all(path.read_bytes() == content for path, content in files.items())


def test_a_run_that_other_code_began_goes_on_and_keeps_both(copied, command):
    unfinish(copied / "run")
    config = json.loads((copied / "run" / "config.json").read_text())
    save(copied / "run" / "config.json", {**config, "code": "other"})
    status, out, err = command("byol_disc", *FIVE)
    assert status == 0 and "run: made by other code" in out and "--run-dir" in out, err
    again = json.loads((copied / "run" / "config.json").read_text())
    assert again == {**config, "code": f"other+{config['code']}"}
    assert log_of(copied / "run")[-5:] == [None, 2, 3, 4, 5]


def test_an_edited_encoder_does_not_fit_and_says_so(copied, command, monkeypatch):
    class Edited(Encoder):
        def __init__(self, width):
            super().__init__(width)
            self.net.append(torch.nn.BatchNorm1d(self.dim))

    unfinish(copied / "run")
    before = (copied / "run" / "checkpoint.pt").read_bytes()
    for module in (common, byol_disc):
        monkeypatch.setattr(module, "Encoder", Edited)
    for script, flags in [("byol_disc", FIVE), ("linear_eval", ["run"])]:
        status, _, err = command(script, *flags)
        assert status == 2 and "run/checkpoint.pt: its weights are of another network" in err
        assert err.count("\n") == 1
    assert (copied / "run" / "checkpoint.pt").read_bytes() == before


def test_the_same_command_after_an_edit_of_the_code(tmp_path):
    """A comment changes nothing. Of another module of one's own the accuracies are not shown."""
    code, out = tmp_path / "code", tmp_path / "out"
    code.mkdir()
    for name in ("common.py", "linear_eval.py", "byol_disc.py"):
        shutil.copy(ROOT / name, code)
    (code / "mine.py").write_text("SIZE = 1\n")
    with open(code / "byol_disc.py", "a") as script:
        script.write("import mine\n")

    def run(moment=None):
        return processes.run("byol_disc", tmp_path, "--coeff", "0", "--run-dir", "run",
                             place=code, moment=moment)

    assert run(moment=7) == -9 and log_of(tmp_path / "run") == [None, 0, 1]
    (code / "common.py").write_text((code / "common.py").read_text() + "# A comment.\n")
    assert run() == 0, (tmp_path / "err").read_text()
    assert log_of(tmp_path / "run") == [None, 0, 1, None, 2]
    assert "other code" not in out.read_text() and "accuracy: linear" in out.read_text()
    (code / "mine.py").write_text("SIZE = 2\n")
    out.write_text("")
    assert run() == 0 and "run: made by other code" in out.read_text()
    assert "accuracy: linear" not in out.read_text() and "--run-dir" in out.read_text()


# --- What a Run does, with a stub in place of a method ----------------------------------------

def network():
    """A model with an encoder, and its optimizer."""
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    model.encoder = model["encoder"]
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}


def one_step(run, loss=1.0):
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.log(loss=torch.tensor(loss), z_std=torch.tensor(1.0))


def test_chain_of_a_langevin_run(stub, tmp_path):
    """I_0 has the error of its noise; steps of noise alone add theirs; the picture shows them."""
    x, f = torch.full((64, 3, 32, 32), 127, dtype=torch.uint8), Discriminator(8)
    stub(alpha=0.6, steps=12, step_size=0.0, noise_std=1.0, noise_unit=0.02,
         grad_clip=0.01).save_chain(f, x)
    chain = json.loads((tmp_path / "run" / "chain.json").read_text())
    assert chain["steps"] == [0, 5, 10, 12]
    expected = [-10 * math.log10(0.4 ** 2 / 12 + step * 0.02 ** 2) for step in chain["steps"]]
    assert chain["psnr"] == pytest.approx(expected, abs=0.05)
    assert chain["f_of_x"] == pytest.approx(f(x[:1] / 255).item(), abs=1e-4)
    assert len(chain["f"]) == 4 and chain["f"][0] != pytest.approx(chain["f_of_x"], abs=1e-4)
    with Image.open(tmp_path / "run" / "langevin.png") as picture:
        assert picture.size == (64 * 34 + 2, 5 * 34 + 2)


@pytest.mark.parametrize("shift, ok", [(0.0, True), (-1.0, False), (1.0, False)])
def test_the_encoder_is_trained_on_what_it_is_evaluated_on(stub, shift, ok):
    """Images in [0, 1]; only the first batch is looked at."""
    run = stub()
    with nullcontext() if ok else pytest.raises(UserError, match="normalise in the encoder"):
        for _ in run.epochs(**network()):
            for _ in range(2):
                run.model.encoder(torch.rand(8, 2) + shift)
                one_step(run)
                shift += 9


def test_an_epoch_has_random_numbers_of_its_own_of_all_three_libraries(stub):
    def draws(**flags):
        run, found = stub(**flags), []
        for _ in run.epochs(**network()):
            found.append((torch.rand(()).item(), np.random.rand(), random.random()))
            one_step(run)
        run.lock.release()
        return found

    first, second = draws()
    again = draws(run_dir=str(Path(stub().path).with_name("again")))
    assert again == [first, second] and not set(first) & set(second)


@pytest.mark.parametrize("when", ["at its second step", "after its last"])
def test_what_is_not_finite_stops_the_run_and_is_not_kept(stub, tmp_path, when):
    """Whether a loss says so, or only the weights that the last step leaves."""
    run, state = stub(), network()
    with pytest.raises(UserError, match="--lr 1.0: .* not finite after epoch 2, .*--run-dir"):
        for epoch in run.epochs(**state):
            for step in (1, 2):
                one_step(run, float("nan") if (epoch, step, when[:2]) == (2, 2, "at") else 1.0)
            if epoch == 2 and when.startswith("after"):
                run.model["head"].weight.data[0, 0] = float("inf")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["done"] == 1 and saved["model"]["head.weight"].isfinite().all()


def test_the_floor_is_measured_at_the_start_and_kept(stub, tmp_path):
    """Also by a run that was stopped in its first epoch, or later."""
    for stop, accuracy in [(1, 20.0), (2, 30.0), (3, 40.0)]:
        run = stub(accuracy)
        for epoch in run.epochs(**network()):
            if epoch == stop:
                break
            one_step(run)
        run.lock.release()
    run.finish(None)
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["linear"] == 40.0 and result["untrained"]["linear"] == 20.0
    assert log_of(tmp_path / "run")[:2] == [None, 0]


@pytest.mark.parametrize("later", ["same", "other"])
def test_a_floor_that_another_linear_eval_measured_is_left_out(stub, tmp_path, capsys, later):
    for stop, code in [(2, "same"), (3, later)]:
        run = stub(evaluation=code)
        for epoch in run.epochs(**network()):
            if epoch == stop:
                break
            one_step(run)
        run.lock.release()
    run.finish(run.model.encoder)
    result, out = json.loads((tmp_path / "run" / "eval.json").read_text()), capsys.readouterr().out
    assert ("measured by another linear_eval.py" in out) == (later == "other")
    assert result["untrained"] == ({"linear": 50.0} if later == "same" else {})
    assert ("linear 50.00 % (untrained 50.00)" in out) == (later == "same")
    assert "linear 50.00 %" in out and "model.encoder" not in out
    run.finish(torch.nn.Linear(2, 2))                     # one that no checkpoint calls its encoder
    assert "are not of model.encoder" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [None, "training mode", "weight"])
def test_a_frozen_network_is_in_eval_mode_and_stays_the_same(stub, fault):
    """A BatchNorm in it does not drift; who changes it all the same is told so."""
    f = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    run = stub()
    assert run.freeze(f) is f and not f.training and not f[1].training
    assert not any(p.requires_grad for p in f.parameters())
    f.train(fault == "training mode")

    with pytest.raises(UserError, match="stay frozen") if fault else nullcontext():
        for _ in run.epochs(**network()):
            f(torch.randn(8, 2))
            f[0].weight.data += fault == "weight"
            one_step(run)


def test_a_frozen_network_resumes_with_the_scale_of_the_checkpoint(stub):
    """Another CPU may compute its features' mean and variance with other roundings."""
    for scale in (1.0, 1.0 + 1e-7):
        f, run = torch.nn.BatchNorm1d(2), stub()
        f.running_var.fill_(scale)
        run.freeze(f, f=1)
        state = network()
        state["model"].discriminator = f
        for epoch in run.epochs(**state):
            one_step(run)
            if scale == 1:
                break
        run.lock.release()


def test_a_checkpoint_is_written_once_a_minute_and_at_the_end(tmp_path, monkeypatch, capsys):
    clock, written, state = [0.0], [], {"model": torch.nn.Linear(2, 2)}
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common, "save", lambda path, content: written.append(clock[0])
                        if path.name == "checkpoint.pt" else save(path, content))
    progress = Progress(tmp_path, "epoch", 10, state)
    for epoch in range(1, 11):
        clock[0] += 25
        progress.end_round(epoch, {"loss": 1.0}, "")
    assert written == [75, 150, 225, 250]
    assert "epoch 4/10    0:02:30 left" in capsys.readouterr().out
    assert log_of(tmp_path) == [None, *range(1, 11)]


# --- Other data, and the table of runs --------------------------------------------------------

def draw_folder(path, name_of):
    """40 drawn images in the folders path/name_of(i, label)."""
    for i, (image, label) in enumerate(zip(*draw_shapes(40, seed=3))):
        place = path / name_of(i, int(label)) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place)


@pytest.fixture
def evaluated(tmp_path, command, monkeypatch):
    """A finished and a half-done run on images of two classes, and a folder where those of the test
    are swapped, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, classes in [("images", "ab"), ("swapped", "ba")]:
        draw_folder(tmp_path / name / "train", lambda i, label: "ab"[label % 2])
        draw_folder(tmp_path / name / "test", lambda i, label: classes[label % 2 ^ i % 4 // 3])
    status, _, err = command("byol_disc", *FOLDER, "--data-dir", "images", "--run-dir", "run")
    assert status == 0, err
    shutil.copytree("run", "half")
    unfinish(tmp_path / "half")
    return tmp_path


def cells(out):
    """The label and the accuracies of the only row of a table; None for -."""
    row, = [line for line in out.splitlines() if line.startswith("| byol")]
    label, *values = row.split(" | ")[:4]
    return label, [None if value == "-" else float(value) for value in values]


def test_other_data_under_a_run_is_refused(evaluated, command):
    """Whether the run is finished or not; the same data are known wherever they are."""
    images, swapped = evaluated / "moved", evaluated / "swapped"
    (evaluated / "images").rename(images)

    def again(run):
        return command("byol_disc", *FOLDER, "--data-dir", "moved", "--run-dir", run)

    status, out, err = again("run")
    assert status == 0 and "is finished" in out, err
    image, other = sorted((images / "train").rglob("*.png"))[:2]
    for change in ("image", "labels"):
        if change == "image":
            whole = image.read_bytes()
            image.write_bytes(other.read_bytes())
        else:
            image.write_bytes(whole)
            shutil.copytree(swapped, images, dirs_exist_ok=True)
        for run in ("run", "half"):
            log = log_of(evaluated / run)
            status, out, err = again(run)
            assert status == 2 and err.startswith(f"error: {run}: made with other "), err
            assert "accuracy" not in out and err.count("\n") == 1 and log_of(evaluated / run) == log


def test_a_run_is_measured_on_other_labelled_data(evaluated, command):
    """By linear_eval.py, which only reads, says on which data, and keeps their rows apart."""
    result = json.loads((evaluated / "run" / "eval.json").read_text())
    said = [value and round(value, 2) for value in map(result.get, linear_eval.METRICS)]
    assert said[1] != 50                                # else a swap would not show
    before = {path: path.read_bytes() for path in (evaluated / "run").glob("*.*")}
    assert cells(command("linear_eval", "run")[1]) == ("| byol_disc", said)
    status, out, err = command("linear_eval", "run", "--data-dir", "swapped")
    swapped = [value and round(100 - value, 2) for value in said]       # of two classes
    assert status == 0 and cells(out)[1] == swapped and "swapped" in out, err
    for split in ("train", "test"):
        draw_folder(evaluated / "other" / split, lambda i, label: str(label % 3))
    for flags, name in [(["folder", "--data-dir", "other"], "other"), (["synthetic"], "synthetic")]:
        status, out, err = command("linear_eval", "run", "--dataset", *flags)
        assert status == 0 and f"measured_on={name}" in out and cells(out)[1] != said, err
    status, out, err = command("linear_eval", "run", "--data-dir", "nowhere")
    assert status == 2 and out == "" and "--data-dir nowhere" in err
    assert {path: path.read_bytes() for path in (evaluated / "run").glob("*.*")} == before
    out = command("linear_eval", "run", "half")[1]      # as many as it has done, of all
    assert "| byol_disc epochs=2 |" in out and "| byol_disc epochs=1 of 2 |" in out


def test_table_of_runs_and_ebm(copied, command):
    """The table has what the run said of itself, computed again from its checkpoint."""
    result = json.loads((copied / "run" / "eval.json").read_text())
    (copied / "run" / "eval.json").unlink()
    status, out, err = command("linear_eval", "run", "ebm.pt", "ebm.ebm", "--untrained")
    assert status == 0, err
    assert not (copied / "run" / "eval.json").exists()                  # it only reads
    lines = [line for line in out[out.index("| run |"):].splitlines() if line.startswith("| ")]
    for line, row in [(lines[1], result), (lines[2], result["untrained"])]:
        assert f"| {row['linear']:.2f} | {row['knn5']:.2f} | - | 1 |" in line
    assert [line.split(" | ")[0] for line in [*lines[1:3], *lines[4:]]] == [
        "| byol_disc", "| byol_disc, untrained encoder",
        *(f"| ebm ebm_iters={n} layers={layers}" for n in (2, 0) for layers in ("last", "all"))]


def test_an_accuracy_of_another_split_or_without_a_metric_is_measured_anew(
        evaluated, command, monkeypatch):
    result = json.loads((evaluated / "run" / "eval.json").read_text())
    for other in (dict(split="val", linear=1.0), dict(linear=1.0, data=0)):
        save(evaluated / "run" / "eval.json", {**result, **other})
        out = command("linear_eval", "run")[1]
        assert (cells(out)[1][0] == 1.0) == ("data" in other)           # a control
    monkeypatch.setitem(linear_eval.METRICS, "knn1", partial(linear_eval.knn_accuracy, k=1))
    out = command("linear_eval", "run")[1]
    assert "| knn1 | seeds |" in out and cells(out)[1][0] == round(result["linear"], 2)
    assert "no longer" not in out
    shutil.copytree(evaluated / "swapped", evaluated / "images", dirs_exist_ok=True)
    out = command("linear_eval", "run")[1]
    assert "run: its images or labels are no longer those of its training" in out


def test_what_is_no_run_costs_the_table_no_row(copied, command):
    """What is wrong with one run is said after the rows of the others."""
    (copied / "begun").mkdir()
    shutil.copytree(copied / "run", copied / "damaged")
    (copied / "damaged" / "eval.json").unlink()
    (copied / "damaged" / "checkpoint.pt").write_bytes(b"PK")
    status, out, err = command("linear_eval", "damaged", "run", "begun", "typo", "ebm.ebm")
    assert status == 2 and err.count("\n") == 1 and out.count("| byol_disc") == 1
    for part in ("damaged/checkpoint.pt: damaged", "begun/config.json", "typo/config.json"):
        assert part in err
    assert "ebm.ebm" not in out + err
