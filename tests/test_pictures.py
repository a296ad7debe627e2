"""--teacher, a control of the discriminator scripts, and .github/pictures.py."""
import json
import re
import shutil
import sys
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import byol_disc
import common
import linear_eval
import pictures
import processes
from common import UserError, augment, draw_shapes, seed_of

DISCRIMINATOR = dict(layers="last", ebm_iters=4000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A SimCLR run, a copy of it that is at epoch 1 of 2, an EBM, and BYOL taught by the run."""
    place = tmp_path_factory.mktemp("teacher")
    for script, flags in [("simclr_disc", ["--coeff", "0", "--run-dir", "simclr"]), ("common", []),
                          ("byol_disc", ["--teacher", "simclr", "--run-dir", "student"])]:
        assert processes.run(script, place, *flags) == 0, (place / "err").read_text()
    shutil.copytree(place / "simclr", place / "stopped")
    processes.unfinish(place / "stopped")
    return place


def test_a_teacher_is_the_encoder_of_a_finished_run(made, command, monkeypatch, tmp_path):
    """The config says what it is, wherever it lies; each has a row."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    shutil.move("simclr", "moved")
    teach = partial(command, "byol_disc", "--run-dir", "student", "--teacher")
    assert "is finished" in teach("moved")[1]
    student = json.loads((made / "student" / "config.json").read_text())
    assert student["teacher"] == "simclr_disc of 2 epochs" and student["f"]
    names, _ = linear_eval.row_labels([(student | other, {}) for other in (
        {}, {"teacher": "simclr_disc of 9 epochs"}, {"teacher": None, **DISCRIMINATOR})])
    assert len(set(names)) == 3 and "teacher=simclr_disc of 2 epochs" in names[0]
    for teacher, flags, problem in [("student", [], "made with --teacher simclr_disc of 2 epochs"),
                                    ("nowhere", [], "nowhere"),
                                    ("stopped", ["--run-dir", "new"], "not finished")]:
        status, _, err = teach(teacher, *flags)
        assert status == 2 and problem in err and err.count("\n") == 1
    saved = torch.load("moved/checkpoint.pt", weights_only=True)
    saved["model"]["encoder.net.0.weight"] += 1         # the teacher was trained anew
    torch.save(saved, "moved/checkpoint.pt")
    status, out, err = teach("moved")
    assert status == 2 and "another EBM or frozen network" in err and "accuracy" not in out


def test_its_features_are_those_of_the_encoder_standardised(made, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "data_checksum", lambda args: 0)
    monkeypatch.setattr(sys, "argv", processes.argv("byol_disc", [
        "--teacher", str(made / "simclr"), "--run-dir", str(tmp_path / "run")]))
    args, images = byol_disc.parse(), draw_shapes(64, seed=3)[0]
    teacher = common.Run(args, images, None).get_discriminator(images)
    encoder = common.load_encoder(made / "simclr")[0].eval()
    torch.manual_seed(seed_of(0, 0))                    # the pass over which it standardised
    views = augment(images)
    h, raw = teacher.features(views, "last"), encoder(views)
    assert torch.allclose(h, (raw - raw.mean(0)) / raw.std(0, correction=0), atol=1e-3)
    assert not torch.allclose(h, raw, atol=0.1)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


# --- Pictures of a results file ---------------------------------------------------------------

def row(script, seed, linear, **flags):
    config = {"width": 16, "images": 1, "script": script, "seed": seed, "run_dir": "run", **flags}
    config |= {"epochs": flags.get("epochs", 20)} if script != "ebm" else {}
    result = {**dict.fromkeys(linear_eval.METRICS, linear), "knn5": 90 - linear}
    return {"config": config, "result": result, "log": []}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings():
    """Rows of the baseline, and BYOL with D, a SimCLR teacher and an untrained D, at two seeds."""
    rows, d, untrained = [], DISCRIMINATOR, DISCRIMINATOR | {"ebm_iters": 0}
    for seed, (plain, of_d, with_d, of_simclr, with_simclr) in enumerate([(50, 60, 52, 62, 55),
                                                                          (51, 61, 54, 61, 55)]):
        rows += [row("byol_disc", seed, plain, coeff=0), row("ebm", seed, of_d, **d),
                 row("byol_disc", seed, with_d, coeff=1, **d),
                 row("simclr_disc", seed, of_simclr, coeff=0),
                 row("byol_disc", seed, with_simclr, coeff=1, teacher="simclr_disc of 20 epochs"),
                 row("ebm", seed, 45, **untrained),
                 row("byol_disc", seed, 50.5, coeff=1, **untrained)]
    return rows


def test_a_difference_is_to_the_baseline_that_is_alike(tmp_path, capsys):
    """Of its seed and flags; its x is the accuracy of its own features, its error the table's."""
    def measure(rows):
        return {name: values for _, name, *values in pictures.measure(write(tmp_path / "a", rows))}

    rows = settings()
    points = measure(rows)
    assert {name: values[:3] for name, values in points.items()} == {
        "discriminator, 4,000 iterations, last stage": [60.5, 29.5, 2.5],
        "simclr_disc of 20 epochs": [61.5, 28.5, 4.5],
        "discriminator, untrained, last stage": [45, 45, 0]}
    runs = [(line["config"], line["result"]) for line in rows if line["config"]["script"] != "ebm"]
    printed = re.search(r"\+2.50 ± ([0-9.]+)", linear_eval.table(runs, False, "test"))[1]
    assert {f"{values[3]:.2f}" for values in points.values()} == {printed}
    other = settings()[:12] + [row("byol_disc", 2, 53, coeff=0),
                               row("byol_disc", 2, 58, coeff=1, **DISCRIMINATOR),
                               row("ebm", 2, 60, **DISCRIMINATOR)]     # more seeds, more spread
    for line in other:                                                 # not the runs of a again
        line["result"]["knn_cosine"] = 1.0
    machines = {"a": rows, "b": other}
    both = [({**line["config"], "machine": machine}, line["result"])
            for machine, lines in machines.items() for line in lines
            if line["config"]["script"] != "ebm"]
    of_both = pictures.measure(*(write(tmp_path / name, x) for name, x in machines.items()))
    table = linear_eval.table(both, False, "test")
    printed_of_both = {*re.findall(r"first row[^|]*\| .[0-9.]+ ± ([0-9.]+)", table)}
    assert {f"{values[-1]:.2f}" for values in of_both} == printed_of_both
    assert len(printed_of_both) == 3 and printed not in printed_of_both    # of 1, 2 and 3 seeds
    for change in [{"images": 2}, {"epochs": 30}, {"seed": 2}]:
        other = {**rows[2], "config": {**rows[2]["config"], **change}}
        capsys.readouterr()
        assert len(measure([*rows[:2], other, *rows[3:9], *rows[10:]])) == 2
        assert "is left out" in capsys.readouterr().out
    for i, shift, expected in [(4, "+1", [61, 29, 5]), (11, "-1", [61.5, 28.5, 4.5])]:
        rows[i]["config"]["teacher"] = f"simclr_disc of 20 epochs, seed {shift}"
        assert measure(rows)["simclr_disc of 20 epochs, another seed"][:3] == expected
    capsys.readouterr()
    again = row("byol_disc", 0, 90, coeff=1, teacher="simclr_disc of 20 epochs, seed +1", more=1)
    rows[4]["config"]["more"] = 0
    assert measure([*rows, again])["simclr_disc of 20 epochs, another seed"][2] == 4.5
    assert "no other run of its third view and seed" in capsys.readouterr().out
    rows[2]["config"]["disc_input"], rows[9]["config"]["disc_input"] = "image", "augment"
    points = measure(rows)
    assert points["discriminator, 4,000 iterations, last stage"][:3] == [61, 29, 3]
    assert points["discriminator, 4,000 iterations, last stage, of the image itself"][:3] == [
        60, 30, 2]
    rows[0]["result"]["untrained"] = rows[3]["result"]      # of 62, the student's initial encoder
    rows.append(row("byol_disc", 0, 56, coeff=1, teacher="byol_disc of 0 epochs"))
    assert measure(rows)["byol_disc of 0 epochs"][:3] == [62, 28, 6]
    for wrong, message in [(rows[1:], "first row has to be the baseline"),
                           (rows[:7], "0 degrees of freedom")]:        # no second seed
        with pytest.raises(UserError, match=message):
            measure(wrong)


def test_the_scatter_shows_third_views_of_other_machines_hollow(tmp_path, monkeypatch, capsys):
    file, other = (write(tmp_path / f"{name}.jsonl", rows) for name, rows in [
        ("a", settings()), ("other", [*settings()[:2], row("byol_disc", 0, 51, coeff=1,
                                                           **DISCRIMINATOR), *settings()[3:]])])
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    for files, hollow in [([file], 0), ([file, other], 3)]:
        pictures.scatter(*files)
        parts = [*ElementTree.parse(tmp_path / "scatter.svg").getroot().iter()]
        fills = [part.get("fill") for part in parts if part.get("rx")]
        n = 3 + hollow
        assert len(fills) == 3 * n and fills.count("white") == 3 * hollow  # two diagrams and a key
        words = [part.text for part in parts if part.tag.endswith("text")]
        key = ["SimCLR encoder, 20 epochs", "discriminator, 4,000 iterations, last stage",
               "discriminator, untrained, last stage"]              # by their differences
        assert [word for word in words if word.startswith(("SimCLR", "disc"))] == [
            name + end for name in key for end in ["", " (other)"][:len(files)]]
        marks = [part for part in parts if part.get("rx")]
        places = [[float(part.get("y")) for part in marks[i * n:(i + 1) * n]] for i in range(3)]
        assert all(place == sorted(place) for place in places)      # 1 is at the top
        assert fills[:n] == fills[n:2 * n] == fills[2 * n:]
        rounded = [part.get("rx") for part in marks]
        assert rounded == 3 * ([*"0"] * len(files) + [*"5"] * 2 * len(files))
        out = capsys.readouterr().out
        for title, xs in [("linear-probe", [60.5, 61.5, 45]), ("kNN (k = 5)", [29.5, 28.5, 45])]:
            correlation = np.corrcoef(xs, [2.5, 4.5, 0])[0, 1]
            assert f"correlation with {title} accuracy: {correlation:.2f}\n" in out


def test_the_other_diagrams_are_drawn_again_as_they_are(tmp_path, monkeypatch):
    """From the results and the picture beside them."""
    here = pictures.HERE
    shutil.copytree(here / "results", tmp_path / "results")
    shutil.copy(here / "views.png", tmp_path)
    drawing = (here / "method.svg").read_text()
    (tmp_path / "method.svg").write_text(re.sub('base64,[^"]*', "base64,", drawing))
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.method()
    pictures.curves()
    for name in ("method.svg", "curves.svg"):
        assert (tmp_path / name).read_text() == (here / name).read_text()


def test_minutes_are_of_the_fastest_epochs(tmp_path, capsys):
    log = [{"epoch": i, "images_per_s": speed} for i, speed in enumerate([1, 2, 5])]
    rows = [row("byol_disc", 0, 50, epochs=epochs, subset=n) for epochs, n in [(3, 600), (4, 0)]]
    rows[0]["log"], rows[1]["log"] = log, [{**at, "seconds": 15} for at in log]
    pictures.minutes(write(tmp_path / "rows.jsonl", rows))
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        f" {value} minutes, n = 1" for value in (6.0, 1.0)]


def test_keep_adds_finished_runs_and_ebms_once(made, tmp_path, small):
    file = write(tmp_path / "rows.jsonl", [first := {**row("byol_disc", 0, 50), "more": 1}])
    for _ in range(2):
        pictures.keep(file, made / "student", made / "ebm.pt")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows[0] == first and len(linear_eval.read_rows(file)) == len(rows) == 4
    assert rows[1]["result"] == json.loads((made / "student" / "eval.json").read_text())
    assert [at.get("epoch") for at in rows[1]["log"]] == [None, 0, 1, 2]
    assert [r["config"]["layers"] for r in rows[2:]] == ["last", "all"] and rows[2]["log"]
    with pytest.raises(UserError, match="not a finished run"):
        pictures.keep(file, made / "stopped")


def test_rows_of_images(made, tmp_path, monkeypatch):
    """Their size and, of samples, which row of an EBM's picture they show."""
    monkeypatch.setattr(pictures, "load_images", lambda *_: draw_shapes(60, seed=3))
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    pictures.views(made / "ebm.pt", "DIR")
    assert Image.open(tmp_path / "views.png").size == (170 + 2 * 342, 2 * 240)
    pictures.samples(f"a={made / 'ebm.ebm'}", f"b={made / 'ebm.ebm'}")
    drawn, grid = (np.array(Image.open(path)) for path in (tmp_path / "samples.png",
                                                          made / "ebm.ebm" / "samples.png"))
    assert drawn.shape == (3 * 34 + 2, 70 + 546, 3)
    for top, row_of_grid in [(0, 0), (34, 136), (68, 136)]:
        assert (drawn[top:top + 34, 70:] == grid[row_of_grid:row_of_grid + 34]).all()
