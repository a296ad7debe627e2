"""A run as a user types it: to the end, repeated, with a flag, its code or its data changed."""
import importlib
import json
import math
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import linear_eval
import processes
from common import Discriminator, Encoder, Progress, Run, UserError, draw_shapes, save
from conftest import ROOT

FIVE = ["--epochs", "5", "--run-dir", "run"]
PLAIN = ["--coeff", "0", "--run-dir"]


def finish(script, directory, *flags, place=None):
    """Its exit status, and what it adds to stdout and stderr."""
    before = [len(text(directory, name)) for name in ("out", "err")]
    status = processes.run(script, directory, *flags, place=place)
    return status, *(text(directory, name)[n:] for name, n in zip(("out", "err"), before))


def text(directory, name):
    return (directory / name).read_text() if (directory / name).exists() else ""


def weights(directory):
    return torch.load(directory / "run" / "checkpoint.pt", weights_only=True)["model"]


def log_of(directory):
    rows = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [row.get("epoch") for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, *finish("byol_disc", directory, *FIVE)


def test_a_run_leaves_what_the_design_says(whole):
    directory, status, out, err = whole
    assert status == 0, err
    run = directory / "run"
    config = json.loads((run / "config.json").read_text())
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoint.pt", "config.json", "eval.json", "log.jsonl",
        f"source-{config['code']}"}
    for name in ("common.py", "byol_disc.py"):
        copy = run / f"source-{config['code']}" / name
        assert copy.read_text() == (ROOT / name).read_text()
    header, floor, *rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert header["argv"][0] == "byol_disc" and header["torch"] == torch.__version__
    assert header["threads"] >= 1 and header["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert [row["epoch"] for row in [floor, *rows]] == [0, 1, 2, 3, 4, 5]
    assert {"loss", "pair12", "pair13", "pair23", "lr", "z_std", "images_per_s"} < set(rows[0])
    assert rows[0]["loss"] == pytest.approx(
        rows[0]["pair12"] + 0.1 * (rows[0]["pair13"] + rows[0]["pair23"]) / 2, abs=1e-5)
    assert [row["lr"] for row in rows[:2]] == pytest.approx([1.5e-3, 3e-3])     # two warm-up steps
    torch.manual_seed(0)
    start, end = Encoder(8).net[0].weight, weights(directory)
    online, target = end["encoder.net.0.weight"], end["target_encoder.net.0.weight"]
    assert not any(map(torch.equal, [online, target, target], [start, start, online]))
    result, metrics = json.loads((run / "eval.json").read_text()), {"linear", "knn5", "knn_cosine"}
    assert set(result) == metrics | {"split", "data", "evaluation", "untrained"}
    assert result["untrained"] == {name: floor[name] for name in metrics}
    assert config["precision"] == "fp32" and config["ranks"] == 1
    assert out.count("epoch ") == 5 and "test accuracy: linear" in out


def test_a_finished_run_says_so_and_stops(whole):
    directory = whole[0]
    before = (directory / "run" / "log.jsonl").read_bytes()
    status, out, _ = finish("byol_disc", directory, *FIVE, "--ebm", "gone.pt")
    assert status == 0 and "is finished; test accuracy: linear" in out
    assert not (directory / "gone.pt").exists()
    assert (directory / "run" / "log.jsonl").read_bytes() == before
    status, _, err = finish("byol_disc", directory, *FIVE, "--coeff", "0.2")
    assert status == 2 and err.startswith("error: run: made with --coeff 0.1, not 0.2;")
    assert "--run-dir" in err and err.count("\n") == 1


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that makes a Run on 64 gray images, whose evaluation gives `accuracy`."""
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    images = torch.full((64, 3, 32, 32), 127, dtype=torch.uint8)

    def make(accuracy=50.0, **flags):
        args = SimpleNamespace(**{**dict(
            run_dir=str(tmp_path / "run"), file=common.__file__, dataset="synthetic", data_dir="",
            seed=0, device="cpu", precision="fp32", batch_size=8, epochs=2, lr=1.0, eval_every=0),
            **flags})
        return Run(args, images, lambda *_, **__: {"linear": accuracy})
    return make


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


def test_a_frozen_network_is_in_eval_mode_and_stays_the_same(stub):
    """A BatchNorm in it does not drift; who changes it all the same is told so."""
    frozen = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for fault, said in [(None, ""), ("train", "stay frozen"), ("weight", "stay frozen")]:
        run, f = stub(run_dir=f"{stub().path}-{fault}"), frozen.train().requires_grad_(True)
        assert run.freeze(f) is f and not f.training and not f[1].training
        assert not any(p.requires_grad for p in f.parameters())
        if fault == "train":
            f.train()
        with pytest.raises(UserError, match=said) if said else nullcontext():
            for _ in run.epochs(**network()):
                f(torch.randn(8, 2))
                f[0].weight.data += fault == "weight"
                one_step(run)
        run.lock.release()


def test_a_directory_of_somebody_else_is_left_as_it_is(stub, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"learning": "my own"}')
    with pytest.raises(UserError, match="config.json"):
        stub()
    assert (tmp_path / "run" / "config.json").read_text() == '{"learning": "my own"}'


def test_a_checkpoint_of_another_network_is_not_called_damaged(tmp_path):
    model = torch.nn.Linear(2, 2)
    Progress(tmp_path, "epoch", 1, {"model": model}).write()
    for other in (torch.nn.Linear(3, 2), torch.nn.Identity(), torch.nn.BatchNorm1d(2)):
        with pytest.raises(UserError, match="checkpoint.pt: .* another network"):
            Progress(tmp_path, "epoch", 1, {"model": other})
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="checkpoint.pt: damaged"):
        Progress(tmp_path, "epoch", 1, {"model": model})


@pytest.mark.parametrize("script", ["simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"])
def test_every_flag_but_those_of_places_tells_runs_apart(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--run-dir", str(tmp_path / "run"), "--ebm",
                                      str(tmp_path / "ebm.pt")])
    flags = vars(importlib.import_module(script).parse())
    flags = {**flags, "images": 1, "data": 2, "f": 3, "ranks": 1}
    where = {"run_dir", "data_dir", "ebm", "device", "eval_every", "graph", "smoke", "file"}
    for flag, value in flags.items():
        if flag == "defaults":
            continue
        with nullcontext() if flag in where else pytest.raises(UserError, match="made with"):
            common.check_config("run", {**flags, flag: "other"}, flags)
    assert len(flags) > 20


def test_a_flag_that_a_config_lacks_counts_as_its_default():
    """Of either; what has no default is unknown and refuses nothing."""
    old, new = {"lr": 1, "defaults": {"lr": 1}}, {"lr": 1, "defaults": {"lr": 1, "margin": 0.0}}
    for margin, refused in [(0.0, False), (0.5, True)]:
        for pair in [(old, {**new, "margin": margin}), ({**new, "margin": margin}, old)]:
            with pytest.raises(UserError, match="--margin") if refused else nullcontext():
                common.check_config("run", *pair)
    common.check_config("run", {"lr": 1}, {"lr": 1, "code": "b", "f": 7})


OF_STEPS = ["--step-size 3", "--noise-std 3", "--noise-unit 0.1", "--grad-clip 1"]
OF_EBM = ["--ebm-iters 7", "--ebm-objective cd", "--ebm-rotation 1"]


@pytest.mark.parametrize("script, fixed, flags", [
    ("byol_disc", "--coeff 0", ["--layers all", "--disc-input image", "--teacher gone", *OF_EBM]),
    ("simclr_disc", "--teacher TEACHER", ["--layers all", *OF_EBM]),
    ("simclr_disc", "--ebm-iters 0", ["--ebm-rotation 1"]),
    ("simclr_langevin", "--coeff 0", ["--view augment", "--steps 3", "--alpha 0.2", *OF_STEPS,
                                      *OF_EBM]),
    ("simclr_langevin", "--view augment", ["--steps 3", "--alpha 0.2", *OF_STEPS, *OF_EBM]),
    ("byol_langevin", "--use dataset", ["--coeff 0.5", "--coeff 0"]),
    ("byol_langevin", "--steps 0", [*OF_STEPS, *OF_EBM]),
    ("byol_langevin", "--step-size 0", ["--grad-clip 1", *OF_EBM]),
    ("byol_langevin", "--noise-std 0", ["--noise-unit 0.1"])])
def test_a_flag_without_effect_makes_no_other_run(script, fixed, flags, tmp_path, monkeypatch,
                                                  capsys):
    """Nor directory, nor row, and a line names it; it does without what takes its effect."""
    teacher = {"script": "byol_disc", "epochs": 1, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(teacher))
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    monkeypatch.setattr(common, "claim", lambda directory, config, script: config)
    images = torch.zeros(512, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        flags = " ".join(flags).replace("TEACHER", str(tmp_path)).split()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        args = importlib.import_module(script).parse()
        made = Run(args, images, None)
        made.lock.release()
        config = {k: v for k, v in made.config.items() if k not in common.NOT_IDENTITY}
        return args.run_dir, config, (made.config, {"linear": 1.0})

    plain, default = run(fixed), run("")
    for flag in flags:
        capsys.readouterr()
        with_flag, name = run(fixed, flag), flag.split()[0][2:].replace("-", "_")
        assert with_flag[:2] == plain[:2]
        assert f"without effect, given the other flags: {name}\n" in capsys.readouterr().out
        labels = linear_eval.row_labels([plain[2], with_flag[2]])[0]
        assert labels[0] == labels[1]
        if flag not in ("--teacher gone", "--coeff 0"):                 # a control
            alone = run(flag)
            assert alone[:2] != default[:2] and "without effect" not in capsys.readouterr().out
            assert len({*linear_eval.row_labels([alone[2], default[2]])[0]}) == 2


def test_code_is_known_by_what_it_computes(tmp_path):
    """Comments, docstrings, blank lines, quotes and line breaks are of no account."""
    def code(text):
        (tmp_path / "a.py").write_text(text)
        return common.code_checksum([tmp_path / "a.py"])

    plain = code('def f(x):\n    return [x, "a"]\n')
    for same in ('def f(x):\n    """Text."""\n    return [x, "a"]\n',
                 '"""Text."""\n# More.\n\n\ndef f(x):  # and more\n  return [x,\n    \'a\']\n'):
        assert code(same) == plain
    for other in ('def f(x):\n    return [x, "b"]\n', 'def f(x):\n    return [x, "a"], 0\n'):
        assert code(other) != plain


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Code with modules of its own, a finished run `done` of it and a half-done run `half`."""
    place = tmp_path_factory.mktemp("copied")
    (place / "code" / "nets").mkdir(parents=True)
    for name in ("common.py", "linear_eval.py", "byol_disc.py"):
        shutil.copy(ROOT / name, place / "code")
    edit(place / "code" / "byol_disc.py", "from linear_eval", "import mine\nfrom nets import "
         "backbone\nfrom linear_eval")
    for name in ("mine.py", "nets/__init__.py", "nets/backbone.py"):
        (place / "code" / name).write_text("SIZE = 1\n")
    run = partial(processes.run, "byol_disc", place, *PLAIN, place=place / "code")
    assert run("done") == 0, text(place, "err")
    assert run("half", moment=6) == -9 and log_of(place / "half") == [None, 0, 1]
    return place


def edit(path, old, new):
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))



@pytest.mark.parametrize("file, old, new, other", [
    ("byol_disc.py", "(pair13 + pair23) / 2 ", "(pair13 + pair23) / 3 ", True),
    ("nets/backbone.py", "1", "2", True),
    ("common.py", '"""Wait for the other ranks."""', '"""Wait."""  # for the others', False)])
def test_edited_code_and_the_same_command(copied, tmp_path, file, old, new, other):
    """The accuracies of a finished run of other code are not shown; a half-done one goes on."""
    place, code = tmp_path / "copy", tmp_path / "copy" / "code"
    shutil.copytree(copied, place)
    edit(code / file, old, new)
    status, out, err = finish("byol_disc", place, *PLAIN, "done", place=code)
    assert status == 0 and ("accuracy" in out) != other, err
    assert ("made by other code" in out and "--run-dir" in out) == other
    status, out, err = finish("byol_disc", place, *PLAIN, "half", place=code)
    assert status == 0, err
    assert ("half: begun by other code" in out and "--run-dir" in out) == other
    config = json.loads((place / "half" / "config.json").read_text())
    assert ("+" in config["code"]) == other
    sources = {path.name for path in (place / "half").glob("source-*")}
    assert sources == {f"source-{part}" for part in config["code"].split("+")}
    assert log_of(place / "half") == [None, 0, 1, None, 2]


@pytest.mark.parametrize("file", ["byol_disc.py", "common.py", "mine.py", "nets/__init__.py"])
def test_the_code_of_a_run_is_that_of_its_files(copied, tmp_path, file):
    shutil.copytree(copied / "code", tmp_path / "code")
    before = common.source_files(tmp_path / "code" / "byol_disc.py")
    code = common.code_checksum(before)
    (tmp_path / "code" / file).write_text((tmp_path / "code" / file).read_text() + "\nMORE = 1\n")
    assert common.source_files(tmp_path / "code" / "byol_disc.py") == before
    assert common.code_checksum(before) != code


def test_an_edited_encoder_does_not_fit_and_says_so(copied, tmp_path):
    place, code = tmp_path / "copy", tmp_path / "copy" / "code"
    shutil.copytree(copied, place)
    edit(code / "common.py", "nn.AdaptiveAvgPool2d(1), nn.Flatten())",
         "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(self.dim))")
    before = (place / "half" / "checkpoint.pt").read_bytes()
    for script, flags in [("byol_disc", [*PLAIN, "half"]), ("linear_eval", ["half"])]:
        status, out, err = finish(script, place, *flags, place=code)
        assert status == 2 and "of another network" in err and err.count("\n") == 1
        assert "damaged" not in err
    assert (place / "half" / "checkpoint.pt").read_bytes() == before


def draw_folder(path, name_of):
    """40 drawn images in the folders path/name_of(i, label)."""
    for i, (image, label) in enumerate(zip(*draw_shapes(40, seed=3))):
        place = path / name_of(i, int(label)) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A finished and a half-done run on images of two classes, and a folder where those of the test
    are swapped."""
    directory = tmp_path_factory.mktemp("evaluated")
    for name, classes in [("images", "ab"), ("swapped", "ba")]:
        draw_folder(directory / name / "train", lambda i, label: "ab"[label % 2])
        draw_folder(directory / name / "test", lambda i, label: classes[label % 2 ^ i % 4 // 3])
    flags = [*FOLDER, "--data-dir", "images"]
    status = processes.run("byol_disc", directory, *flags, "--run-dir", "run")
    assert status == 0, text(directory, "err")
    assert processes.run("byol_disc", directory, *flags, "--run-dir",
                         "half", "--epochs", "3", moment=6) == -9
    return directory


FOLDER = ["--dataset", "folder", "--subset", "0", "--coeff", "0"]


def cells(out):
    """The label and the accuracies of the only row of a table; None for -."""
    row, = [line for line in out.splitlines() if line.startswith("| byol")]
    label, *values = row.split(" | ")[:4]
    return label, [None if value == "-" else float(value) for value in values]


def test_other_data_under_a_run_is_refused(evaluated, tmp_path):
    """Whether the run is finished or not; the same data are known wherever they are."""
    directory, images = tmp_path / "copy", tmp_path / "copy" / "moved"
    shutil.copytree(evaluated, directory)
    (directory / "images").rename(images)
    image, other = sorted((images / "train").rglob("*.png"))[:2]
    flags = {run: [*FOLDER, "--run-dir", run, "--epochs", epochs, "--data-dir", "moved"]
             for run, epochs in [("run", "2"), ("half", "3")]}
    status, out, err = finish("byol_disc", directory, *flags["run"])
    assert status == 0 and "is finished" in out, err
    for change in ("labels", "image"):
        if change == "labels":
            (images / "test").rename(images / "kept")
            (directory / "swapped" / "test").rename(images / "test")
        else:
            shutil.rmtree(images / "test")
            (images / "kept").rename(images / "test")
            image.write_bytes(other.read_bytes())
        for run in flags:
            log = log_of(directory / run)
            status, out, err = finish("byol_disc", directory, *flags[run])
            assert status == 2 and err.startswith(f"error: {run}: made with other "), err
            assert "accuracy" not in out and err.count("\n") == 1 and log_of(directory / run) == log


def test_a_run_is_measured_on_other_labelled_data(evaluated, tmp_path):
    """By linear_eval.py, which only reads, says on which data, and keeps their rows apart."""
    result = json.loads((evaluated / "run" / "eval.json").read_text())
    said = [value and round(value, 2) for value in map(result.get, linear_eval.METRICS)]
    assert said[1] != 50                                # else a swap would not show
    assert cells(finish("linear_eval", evaluated, "run")[1]) == ("| byol_disc", said)
    before = {path: path.read_bytes() for path in (evaluated / "run").glob("*.*")}
    status, out, err = finish("linear_eval", evaluated, "run", "--data-dir", "swapped")
    swapped = [value and round(100 - value, 2) for value in said]       # of two classes
    assert status == 0 and cells(out)[1] == swapped and "swapped" in out, err
    other = tmp_path / "other"
    for split in ("train", "test"):
        draw_folder(other / split, lambda i, label: str(label % 3))
    status, out, err = finish("linear_eval", evaluated, "run", "--dataset", "folder", "--data-dir",
                              str(other))
    assert status == 0 and f"measured_on={other}" in out and cells(out)[1] != said, err
    status, out, err = finish("linear_eval", evaluated, "run", "--dataset", "synthetic")
    assert status == 0 and "measured_on=synthetic" in out, err
    status, out, err = finish("linear_eval", evaluated, "run", "--data-dir", "nowhere")
    assert status == 2 and out == "" and "--data-dir nowhere" in err
    assert {path: path.read_bytes() for path in (evaluated / "run").glob("*.*")} == before


def test_an_unfinished_run_has_a_row_of_its_own(evaluated):
    """That of its epochs done, and of those it would have."""
    status, out, err = finish("linear_eval", evaluated, "run", "half")
    rows = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| byol")]
    assert status == 0 and rows == ["| byol_disc epochs=2", "| byol_disc epochs=1 of 3"], err


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


def test_table_of_runs_and_ebm(whole):
    """The table has what the run said of itself, computed again from its checkpoint."""
    (whole[0] / "run" / "eval.json").rename(whole[0] / "said.json")
    status, out, err = finish("linear_eval", whole[0], "run", "ebm.pt", "ebm.ebm", "--untrained")
    assert status == 0, err
    assert not (whole[0] / "run" / "eval.json").exists()                # it only reads
    (whole[0] / "said.json").rename(whole[0] / "run" / "eval.json")
    result = json.loads((whole[0] / "run" / "eval.json").read_text())
    lines = [line for line in out[out.index("| run |"):].splitlines() if line.startswith("| ")]
    for line, row in [(lines[1], result), (lines[2], result["untrained"])]:
        assert f"| {row['linear']:.2f} | {row['knn5']:.2f} | - | 1 |" in line
    assert [line.split(" | ")[0] for line in [*lines[1:3], *lines[4:]]] == [
        "| byol_disc", "| byol_disc, untrained encoder",
        *(f"| ebm ebm_iters={n} layers={layers}" for n in (2, 0) for layers in ("last", "all"))]


def test_what_is_no_run_costs_the_table_no_row(whole, tmp_path):
    """What is wrong with one run is said after the rows of the others."""
    place = tmp_path / "all"
    shutil.copytree(whole[0], place)
    (place / "begun").mkdir()
    shutil.copytree(place / "run", place / "damaged")
    (place / "damaged" / "eval.json").unlink()
    (place / "damaged" / "checkpoint.pt").write_bytes(b"PK")
    status, out, err = finish("linear_eval", place, "damaged", "run", "begun", "typo", "ebm.ebm")
    assert status == 2 and err.count("\n") == 1 and out.count("| byol_disc") == 1
    for part in ("damaged/checkpoint.pt: damaged", "begun/config.json", "typo/config.json"):
        assert part in err
    assert "ebm.ebm" not in out + err
    status, _, err = finish("byol_disc", place, "--epochs", "5", "--run-dir", "damaged")
    assert status == 2 and err.startswith("error: damaged/checkpoint.pt: damaged"), err
