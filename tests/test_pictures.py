"""What stands beside the README: the control of another teacher, and what draws and counts."""
import json
import re
from statistics import stdev
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import byol_teacher
import linear_eval
import pictures
import processes
from common import Encoder, UserError, augment, draw_shapes, langevin


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A SimCLR run of two epochs, one stopped after the first, and BYOL with the former's view."""
    place = tmp_path_factory.mktemp("teacher")
    for name, status, moment in [("simclr", 0, None), ("stopped", -9, 5)]:
        assert status == processes.run("simclr_disc", place, "--coeff", "0", "--run-dir", name,
                                       moment=moment)
    assert teach(place, "student", "simclr") == 0, (place / "err").read_text()
    return place


def teach(place, run_dir, teacher, *flags):
    (place / "err").unlink(missing_ok=True)
    return processes.run("byol_teacher", place, "--coeff", "1", "--run-dir", run_dir, "--teacher",
                         teacher, *flags)


def test_a_teacher_is_the_encoder_of_a_finished_run(made):
    config = json.loads((made / "student" / "config.json").read_text())
    assert config["teacher"] == "simclr_disc of 2 epochs" and config["f"]
    assert teach(made, "student", "simclr") == 0        # finished
    assert teach(made, "other", "simclr", "--seed", "1", "--epochs", "1") == 0
    assert json.loads((made / "other" / "config.json").read_text())["teacher"] == (
        "simclr_disc of 2 epochs, seed -1")
    for teacher, flags, problem in [("stopped", (), "is at epoch 1 of 2; finish it first"),
                                    ("student", (), "made with --teacher simclr_disc of 2 epochs"),
                                    ("nowhere", (), "--teacher nowhere: no run's directory; name")]:
        assert teach(made, "student", teacher, *flags) == 2
        assert problem in (made / "err").read_text() and "Trace" not in (made / "err").read_text()


def test_its_features_are_those_of_the_encoder_standardised(made):
    images, args = draw_shapes(300, seed=3)[0], SimpleNamespace(
        width=8, subset=64, seed=0, device="cpu", precision="fp32")
    teacher = byol_teacher.Teacher(made / "simclr", images, args)
    saved = torch.load(made / "simclr" / "checkpoint.pt", weights_only=True)["model"]
    encoder = Encoder(8).eval()
    encoder.load_state_dict({name[8:]: x for name, x in saved.items() if name[:8] == "encoder."})
    torch.manual_seed(0)                                # the pass over which it standardised
    views = augment(images)
    h, raw = teacher.features(views, "last"), encoder(views)
    assert torch.allclose(h, (raw - raw.mean(0)) / raw.std(0), atol=1e-3)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def row(script, seed, linear, epochs=20, **flags):
    config = {"width": 16, "images": 1, "script": script, "seed": seed, "epochs": epochs, **flags}
    result = {**dict.fromkeys(linear_eval.METRICS, linear), "knn5": 90 - linear}
    return {"config": config, "result": result, "log": []}


def test_a_gain_is_over_the_plain_run_that_is_alike():
    """Of its seed, epochs, images and flags; its x is the probe of its own teacher."""
    d, view = dict(layers="last", ebm_iters=4000), dict(coeff=1, layers="last", ebm_iters=4000)
    rows = [row("byol_disc", 0, 50.0, coeff=0), row("byol_disc", 1, 40.0, coeff=0),
            row("byol_disc", 0, 51.0, 22, coeff=0), row("simclr_disc", 0, 55.0, coeff=0),
            row("ebm", 0, 54.0, **d), row("ebm", 1, 55.0, **d), row("ebm", 0, 46.0, images=2, **d),
            row("byol_disc", 0, 45.0, coeff=0, schedule="step"), row("ebm", 0, 60.0, **d,
                                                                     ebm_rotation=1.0),
            row("byol_disc", 0, 53.0, **view), row("byol_disc", 1, 42.0, **view),
            row("byol_teacher", 0, 54.5, coeff=1, teacher="simclr_disc of 20 epochs"),
            row("byol_teacher", 0, 53.5, coeff=1, teacher="byol_disc of 22 epochs")]
    assert {name: [tuple(result["linear"] for result in row) for row in seeds.values()]
            for name, seeds in pictures.pairs(rows).items()} == {
        "D, 4,000 iterations": [(54.0, 53.0, 50.0), (55.0, 42.0, 40.0)],
        "simclr_disc of 20 epochs": [(55.0, 54.5, 50.0)],
        "byol_disc of 22 epochs": [(51.0, 53.5, 50.0)]}
    student = rows[9]
    for change in [{"schedule": "other"}, {"ebm_rotation": 2.0}, {"images": 2}, {"width": 8},
                   {"epochs": 30}, {"seed": 2}]:
        other = {**student, "config": {**student["config"], **change}}
        assert pictures.pairs(rows[:9] + [other]) == {}


def test_the_scatter_has_the_errors_of_the_table(tmp_path, monkeypatch, capsys):
    """Those pooled over every run of as many epochs, a SimCLR's too."""
    rows, d = [], dict(layers="last", ebm_iters=4000)
    for seed, (plain, student, simclr, own) in enumerate([(50, 52, 61, 60), (51, 54, 60, 61)]):
        rows += [row("byol_disc", seed, plain, coeff=0), row("byol_disc", seed, 45.0, 30, coeff=0),
                 row("byol_disc", seed, student, coeff=1, **d), row("ebm", seed, own, **d),
                 row("simclr_disc", seed, simclr, coeff=0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[1:] + rows[:1])))
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.scatter(tmp_path / "rows.jsonl")
    drawn, error = re.search(r"gain (\S+) ± (\S+),", capsys.readouterr().out).groups()
    pairs = [(line["config"], line["result"]) for line in rows]
    for part, same in [(pairs, True), ([p for p in pairs if "byol" in p[0]["script"]], False)]:
        printed = re.search(rf"\{drawn}0 ± ([0-9.]+)", linear_eval.table(part, False, "test"))[1]
        assert (abs(float(printed) - float(error)) < 0.06) == same


def test_a_label_stays_in_the_picture():
    """Free of what is there where it can be, else beside its point."""
    for taken, place in [([], (112, 105)), ([(90, 400, 90, 110)], (112, 124)),
                         ([(0, 660, 0, 740)], (112, 105))]:
        x, y = re.search(r'x="(\d+)" y="(\d+)"', pictures.place(100, 100, "D" * 20, taken)).groups()
        assert (int(x), int(y)) == place and len(taken) > 0


def test_a_gain_has_the_error_of_pairs(tmp_path, monkeypatch, capsys):
    """Pooled over one teacher, it is the paired differences' own; from one seed there is none."""
    rows = []
    for seed, (plain, student, own) in enumerate([(50, 52, 60), (51, 54, 61), (49, 55, 59)]):
        rows += [row("byol_disc", seed, plain, coeff=0), row("ebm", seed, own, layers="all",
                                                             ebm_iters=0),
                 row("byol_disc", seed, student, coeff=1, layers="all", ebm_iters=0)]
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    error = stdev([2, 3, 6]) / 3 ** 0.5
    for part, words in [(rows, f"gain +3.7 ± {error:.1f}"), (rows[:3], "gain +2.0")]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, part)))
        pictures.scatter(tmp_path / "rows.jsonl")
        assert capsys.readouterr().out == (
            f"D, untrained, all stages, n = {len(part) // 3}: "
            f"linear 60.0, {words}, knn5 30.0, {words.replace('+', '-')}\n")
    for name, student, own in [("simclr_disc of 20 epochs", 55.0, 65.0),
                               ("byol_disc of 22 epochs", 53.0, 61.0)]:
        rows += [row("byol_teacher", 0, student, coeff=1, teacher=name),
                 row(name.split()[0], 0, own, int(name.split()[2]), coeff=0)]
        rows[-1]["result"]["knn5"] = own - 35
    part = rows[:3] + rows[9:]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, part + rows[:1])))
    pictures.scatter(tmp_path / "rows.jsonl")
    out = capsys.readouterr().out
    for title, xs in [("linear probe", [60, 65, 61]), ("5-NN", [30, 30, 26])]:
        of_gains = np.corrcoef(xs, [2, 5, 3])[0, 1]
        assert f"gains in the probe with the teachers' {title}: {of_gains:.2f}\n" in out
    assert "the same run, counted once" in out
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [
        *part, row("byol_disc", 0, 51.0, coeff=0)])))
    pictures.scatter(tmp_path / "rows.jsonl")
    assert "two results of one seed, the first counts" in capsys.readouterr().out
    picture = ElementTree.parse(tmp_path / "scatter.svg").getroot()
    words = [element.text for element in picture.iter() if element.text]
    assert words.count("SimCLR of 20 epochs") == words.count("D, untrained, all stages") == 2
    longer = [{**line, "config": {**line["config"], "epochs": 30}} for line in rows[:3]]
    for wrong, problem in [(part + longer, "has 2 kinds of BYOL"), (rows[:2], "has 0 kinds"),
                           ([{**row("ebm", 0, 1), "result": {"knn5": 1}}], "KeyError: 'linear'")]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, wrong)))
        with pytest.raises(UserError, match=problem):
            pictures.scatter(tmp_path / "rows.jsonl")


def test_minutes_are_the_median_rounds(tmp_path, capsys):
    ebm = row("ebm", 0, 50.0, ebm_iters=400, layers="last")
    run = row("byol_disc", 0, 50.0, epochs=3, subset=600)
    del ebm["config"]["epochs"]
    ebm["log"] = [{"argv": []}, *({"iteration": i, "seconds": s} for i, s in [(1, 30), (2, 30),
                                                                             (3, 90)])]
    run["log"] = [{"epoch": 1, "images_per_s": 1.0}, {"epoch": 2, "images_per_s": 2.0},
                  {"epoch": 3, "images_per_s": 5.0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [ebm, run])))
    pictures.minutes(tmp_path / "rows.jsonl")
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        " 2.0 minutes, n = 1", " 15.0 minutes, n = 1"]


def images_of(monkeypatch, n):
    """Stand-ins for DIR's images and for those of the run, of which the labels follow."""
    images, labels = draw_shapes(n, seed=3)
    monkeypatch.setattr(pictures, "load_images", lambda *_: (images, labels))
    monkeypatch.setattr(pictures, "same_images", lambda *_: images)
    return images, labels


def test_along_a_chain(made, monkeypatch, capsys):
    """Each row has the PSNR and the accuracies of the images that `langevin` returned for it."""
    images, y = images_of(monkeypatch, 60)
    calls, ends = [], []
    monkeypatch.setattr(pictures, "langevin", lambda f, x, steps, *flags: (
        calls.append((steps, *flags)) or ends.append(langevin(f, x, steps, *flags)) or ends[-1]))
    assert processes.run("common", made, "--ebm", "ebm.pt") == 0
    pictures.chain(made / "simclr", made / "ebm.pt", "DIR")
    assert calls == [(steps, 10, 0.005) for steps in (0, 0, 0, 5, 10, 15)]
    assert torch.equal(ends[0], images / 255) and not torch.equal(ends[1], ends[0])
    rows = [[float(word) for word in re.findall(r"(?:PSNR|linear|5-NN) ([\d.inf]+)", line)]
            for line in capsys.readouterr().out.splitlines()]
    encoder, _ = pictures.trained(made / "simclr", "DIR")
    known = linear_eval.extract_features(encoder, images)
    for end, (psnr, linear, knn) in zip(ends, rows):
        error = (end - images / 255).square().mean((1, 2, 3))
        assert psnr == pytest.approx((-10 * error.log10()).mean().item(), abs=0.06)
        data = known, y, linear_eval.extract_features(encoder, end), y
        assert linear == pytest.approx(linear_eval.linear_accuracy(*data), abs=0.06)
        assert knn == pytest.approx(linear_eval.knn_accuracy(*data, k=5), abs=0.06)
    assert len(rows) == 6 and rows[1][0] - rows[2][0] == pytest.approx(4.1, abs=0.1)


def test_few_labels_and_noise(made, monkeypatch, capsys):
    """How many labels of each class the probe sees, and which images are noisy."""
    images, _ = images_of(monkeypatch, 1500)
    sizes, seen = [], []
    monkeypatch.setattr(pictures, "extract_features", lambda encoder, x: (
        seen.append(x) or linear_eval.extract_features(encoder, x)))
    monkeypatch.setattr(pictures, "linear_accuracy", lambda x, y, test_x, test_y: (
        sizes.append(sorted(y.bincount().tolist())) or 10.0 * len(y) + test_x.isnan().sum().item()))
    pictures.harder("DIR", made / "simclr", made / "simclr")
    lines = [line.split(": linear, ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == lines[1] and len(sizes) == 22
    assert lines[0].startswith("10 labels a class 1000.0 ± 0.0, 100 labels a class 10000.0 ± "
                               "0.0; noisy 15000.0, 5-NN ")
    assert sizes[:10] == 5 * [10 * [10]] + 5 * [10 * [100]] and sum(sizes[10]) == 1500
    assert torch.equal(seen[0], images) and torch.equal(seen[1], images)
    noise = seen[2] - images / 255
    assert noise[(seen[2] > 0) & (seen[2] < 1)].std().item() == pytest.approx(0.1, abs=0.01)
    assert seen[2].min() >= 0 and seen[2].max() <= 1


def test_images_that_are_not_the_runs_are_refused(made, monkeypatch):
    monkeypatch.setattr(linear_eval, "training_images", lambda args: draw_shapes(9, seed=3)[0])
    with pytest.raises(UserError, match="made with other images"):
        pictures.trained(made / "simclr", "DIR")
