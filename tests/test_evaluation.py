"""Frozen features, kNN and the linear probe, against loops and cases with a known answer."""
import json
import math
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import linear_eval
from common import Encoder, UserError, draw_shapes, save
from linear_eval import METRICS, extract_features, knn_accuracy, linear_accuracy, table


def test_features_are_those_in_eval_mode_and_each_module_gets_its_mode_back():
    """Also after an error; a layer that is frozen in eval mode stays so."""
    encoder, images = Encoder(8), draw_shapes(20, seed=3)[0]
    encoder.net[1].eval()
    modes = [module.training for module in encoder.modules()]
    features = extract_features(encoder, images)
    assert features.shape == (20, 64) and not features.requires_grad
    with pytest.raises(ZeroDivisionError):
        extract_features(encoder, images, lambda x: 1 / 0)
    assert [module.training for module in encoder.modules()] == modes
    assert any(modes) and not all(modes)
    assert torch.allclose(features, encoder.eval()(images / 255), atol=1e-5)
    assert torch.allclose(features[3:4], extract_features(encoder, images[3:4]), atol=1e-5)
    assert not torch.allclose(features, encoder.train()(images / 255), atol=1e-2)   # a control


@pytest.mark.parametrize("convert, ok", [(lambda x: x / 255, True), (torch.Tensor.float, False),
                                         (torch.Tensor.long, False), (lambda x: x, True),
                                         (lambda x: x / 255 - 0.5, False)])
def test_only_images_in_range_are_evaluated(convert, ok):
    with nullcontext() if ok else pytest.raises(UserError, match="in .0, 1., or uint8"):
        extract_features(Encoder(8), convert(draw_shapes(4, seed=3)[0]))


def knn_in_loops(train_x, train_y, test_x, test_y, k, temperature):
    def similarity(a, b):
        return (a @ b / (a.norm() * b.norm())).item() if temperature else -(a - b).norm().item()
    correct = 0
    for x, y in zip(test_x, test_y):
        near = [(similarity(x, t), label.item()) for t, label in zip(train_x, train_y)]
        votes = [0.0] * 4
        for s, label in sorted(near, reverse=True)[:k]:
            votes[label] += math.exp(s / temperature) if temperature else 1
        correct += votes.index(max(votes)) == y
    return 100 * correct / len(test_x)


@pytest.mark.parametrize("k, temperature, others", [
    (5, None, [(3, None), (9, None)]), (9, 0.1, [(9, None), (9, 1.0), (5, 0.1)])])
def test_knn_equals_loops(k, temperature, others):
    centers = torch.randn(4, 8)
    train_y, test_y = torch.randint(4, (90,)), torch.randint(4, (150,))
    train_x, test_x = (centers[y] + 1.2 * torch.randn(len(y), 8) for y in (train_y, test_y))
    ours = knn_accuracy(train_x, train_y, test_x, test_y, k, temperature)
    assert ours == pytest.approx(knn_in_loops(train_x, train_y, test_x, test_y, k, temperature))
    assert 50 < ours < 100
    for other in others:
        assert ours != pytest.approx(knn_in_loops(train_x, train_y, test_x, test_y, *other)), other
    assert knn_accuracy(train_x, train_y.roll(1), test_x, test_y, k, temperature) < 50


def test_metrics_are_the_base_codes():
    """k = 5, Euclidean; k = 200, cosine, T = 0.1; a probe of 500 epochs."""
    assert METRICS["linear"] is linear_accuracy and linear_accuracy.__defaults__ == (500,)
    assert METRICS["knn5"].func is METRICS["knn_cosine"].func is knn_accuracy and len(METRICS) == 3
    assert METRICS["knn5"].keywords == {"k": 5}
    assert METRICS["knn_cosine"].keywords == {"k": 200, "temperature": 0.1}


def test_cosine_knn_of_few_images_is_none():
    """Where 200 are over a tenth of the training images the most frequent class would win."""
    x, y = torch.randn(2000, 4), torch.randint(3, (2000,))
    assert METRICS["knn_cosine"](x, y, x[:9], y[:9]) is not None
    assert METRICS["knn_cosine"](x[1:], y[1:], x[:9], y[:9]) is None
    assert METRICS["knn5"](x[:40], y[:40], x[:9], y[:9]) is not None


def test_linear_probe_equals_its_protocol(monkeypatch):
    """Adam from 1e-2, weight decay 5e-6, down to 1e-6 by a factor an epoch; here three epochs. Of
    small features, where the weight decay tells."""
    made, linear, x, y = [], nn.Linear, 1e-4 * torch.randn(3000, 6), torch.randint(3, (3000,))
    x, test_x, y, test_y = x[:2500], x[2500:], y[:2500], y[2500:]
    monkeypatch.setattr(nn, "Linear", lambda *a, **b: made.append(linear(*a, **b)) or made[-1])

    def probe(decay, weight_decay=5e-6):
        w, b = torch.zeros(3, 6, requires_grad=True), torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([w, b], weight_decay=weight_decay)
        shuffled = torch.Generator().manual_seed(0)
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = 1e-2 * decay ** (epoch / 3)
            for index in torch.randperm(2500, generator=shuffled).split(1000):
                optimizer.zero_grad()
                F.cross_entropy(x[index] @ w.T + b, y[index]).backward()
                optimizer.step()
        return w.detach(), b.detach()

    accuracy, (w, b) = linear_accuracy(x, y, test_x, test_y, epochs=3), probe(1e-4)
    expected = 100 * ((test_x @ w.T + b).argmax(1) == test_y).float().mean().item()
    assert accuracy == pytest.approx(expected, abs=0.05)
    assert torch.allclose(made[0].weight, w, atol=1e-5)
    assert not torch.allclose(w, probe(1)[0], atol=1e-3)
    assert not torch.allclose(w, probe(1e-4, 0)[0], atol=1e-4)


def write(path, rows):
    path.write_text("".join(json.dumps({"config": c, "result": r}) + "\n" for c, r in rows))


def row(seed=0, linear=50.0, data=7, knn5=30.0, **flags):
    """A row of a table, of which `data` is None in results of older code."""
    accuracies = {"linear": linear, "knn5": knn5, "knn_cosine": 40.0}
    config = {"script": "byol_disc", "seed": seed, "run_dir": f"runs/{seed}", "epochs": 5}
    return ({**config, "images": 7, "f": seed, "ebm": f"{seed}.pt", **flags},
            {**accuracies, "untrained": {**accuracies, "linear": 10.0 + seed},
             **({} if data is None else {"data": data})})


def labels(rows, **flags):
    """(label, number of seeds) of each row of the table, but for the differences."""
    lines = [line.split(" | ") for line in table(rows, False, "test", **flags).splitlines()]
    return [(line[0].removeprefix("| byol_disc").strip(), int(line[-1].rstrip(" |")))
            for line in lines[2:] if line[0].startswith("| byol_disc")]


def test_table_pairs_the_differences_by_seed():
    rows = [row(seed, linear, knn5=2 * linear, coeff=coeff) for coeff, seed, linear in [
        (0, 0, 50.0), (0, 1, 60.0), (0, 2, 70.0),
        (1, 2, 74.0), (1, 0, 51.0), (1, 3, 99.0), (1, 1, 62.5), (2, 1, 9.0)]]
    lines = table(rows, False, "test").splitlines()
    assert [line.count("difference to") for line in lines[2:7]] == [0, 0, 1, 0, 1]
    # 4, 1 and 2.5: mean 2.5, standard deviation 1.5, over the root of 3; seed 3 has no pair
    assert "| +2.50 ± 0.87 | +5.00 ± 1.73 | +0.00 ± 0.00 | 3 |" in lines[4]
    assert "| -51.00 ± 1.50* | -102.00 ± 3.00* |" in lines[6] and lines[6].endswith("| 1 |")
    assert "2 degrees of freedom" in lines[-1]


def test_one_error_is_pooled_over_rows_and_seeds():
    """That of a two-way table without gaps is known: what row and seed means leave."""
    values = torch.randn(3, 4, dtype=torch.float64) + 10 * torch.randn(4, dtype=torch.float64)
    left = values - values.mean(1, keepdim=True) - values.mean(0) + values.mean()
    error = (left.square().sum() / 6 * 2 / 4).sqrt().item()

    def lines_of(values, more=()):
        rows = [row(seed, values[coeff, seed].item(), coeff=coeff)
                for coeff in range(len(values)) for seed in range(4)]
        return table([*rows, *more], False, "test").splitlines()

    lines = lines_of(values)
    for i, line in [(1, lines[4]), (2, lines[6])]:
        assert f"| {(values[i] - values[0]).mean():+.2f} ± {error:.2f}" in line
    assert "6 degrees of freedom" in lines[-1]
    assert f"standard deviations {error * 2 ** 0.5:.2f}, " in lines[-1]
    shifted = torch.stack([values[0], values[1].roll(1), values[2].roll(2)])
    assert f"± {error:.2f}" not in lines_of(shifted)[4]                 # a control: unpaired

    for beyond in (0.97, 1.03):                                         # a star from there on
        apart = beyond * 4.339 * error / 2 ** 0.5                       # Tukey's, 3 rows, n = 4
        moved = values.clone()
        moved[1] += apart - (values[1] - values[0]).mean()              # the residuals stay
        assert (f"| {apart:+.2f} ± {error:.2f}* |" in lines_of(moved)[4]) == (beyond > 1)

    # Rows with other epochs are in no way like the first; their difference has the same error.
    longer = [row(seed, values[0, seed].item() + seed ** 2, coeff=0, epochs=9) for seed in range(4)]
    lines = lines_of(values, longer)
    assert all(f"± {error:.2f}" in line for line in (lines[4], lines[8]))
    assert "over 3 settings" in lines[-1] and "all pairs of 4" in lines[-1]
    lines = lines_of(values[:1], longer)
    assert "No differences" in lines[-1] and "with as many epochs" in lines[-1]


@pytest.mark.parametrize("rows, freedom, known", [(2, 4, 3.927), (6, 10, 4.912)])
def test_what_can_be_told_apart_is_tukeys(rows, freedom, known):
    assert linear_eval.studentized_range((rows,), freedom) == pytest.approx(known, rel=0.015)


def test_pairs_of_two_machines_are_not_corrected_for():
    """Three machines with a pair of rows each: no |z| of three beyond the quantile, given s."""
    s = torch.linspace(1e-3, 4, 4000, dtype=torch.float64)
    density = s ** 7 * torch.exp(-4 * s ** 2)                           # of s, 8 degrees of freedom
    share = torch.erf(linear_eval.studentized_range((2, 2, 2), 8) * s / 2) ** 3
    assert (share * density).sum() / density.sum() == pytest.approx(0.95, abs=0.003)
    one = linear_eval.studentized_range((6,), 8)                         # a control
    assert (torch.erf(one * s / 2) ** 3 * density).sum() / density.sum() > 0.975


def test_a_repeated_run_adds_nothing_to_the_error():
    """The same accuracies again, under an edited code or in another file."""
    values = {0: (50.0, 51.0, 53.0), 1: (52.0, 52.5, 55.5)}
    rows = [row(seed, linear, coeff=coeff, machine="a", code="x")
            for coeff in values for seed, linear in enumerate(values[coeff])]
    once = table(rows, False, "test")
    assert "2 degrees of freedom" in once
    pair = next(line for line in once.splitlines() if line.startswith("| difference"))
    for other in (dict(code="y"), dict(machine="b")):
        lines = table(rows + [({**config, **other}, result) for config, result in rows],
                      False, "test")
        assert pair.split("*")[0] in lines and "2 degrees of freedom" in lines
        assert pair.split("*")[0] in table(
            [({**config, "machine": "b"}, result) for config, result in rows[:3]] + rows,
            False, "test")                                              # of a part, and first
    moved = [row(seed, linear + 1 + seed % 2, coeff=0, machine="a", code="y")
             for seed, linear in enumerate(values[0])]                  # a control: other runs
    assert "4 degrees of freedom" in table(rows + moved, False, "test")


@pytest.mark.parametrize("seeds", [2, 3])
def test_each_metric_has_its_own_degrees_of_freedom(seeds):
    """One file lacks cosine kNN, and the other has few seeds: its difference there has no star, or
    with one degree of freedom no error; the equal one in the linear probe has both."""
    rows = [row(seed, 50 + 2 * coeff + (seed % 2) * (2 * coeff - 1) + 9 * seed, coeff=coeff,
                machine=machine)
            for machine, n in [("a", 8), ("b", seeds)] for coeff in (0, 1) for seed in range(n)]
    for config, result in rows:
        result["knn_cosine"] = None if config["machine"] == "a" else result["linear"]
    lines = table(rows, False, "test").splitlines()
    cells = next(line for line in lines if "difference to the first row of b" in line).split(" | ")
    assert cells[1].endswith("*") and "±" in cells[1]
    assert cells[3] == "-" if seeds == 2 else "±" in cells[3] and not cells[3].endswith("*")
    assert f"{seeds + 6}, {seeds + 6}, {seeds - 1} degrees of freedom" in lines[-1]


def test_stars_are_corrected_for_the_rows_of_each_machine(monkeypatch):
    asked, quantile = [], linear_eval.studentized_range
    monkeypatch.setattr(linear_eval, "studentized_range",
                        lambda *args: asked.append(args) or quantile(*args))
    rows = [row(seed, 9 * ord(machine) + (seed + 1) * coeff, coeff=coeff, machine=machine)
            for machine, n in [("a", 2), ("b", 3)] for coeff in range(n) for seed in range(3)]
    assert "5 settings, each within a machine" in table(rows, False, "test")
    assert asked[0] == ((2, 3), 2 + 4)


def test_table_joins_seeds_and_nothing_else():
    """Rows that differ in seed and EBM file: mean, standard deviation, n; other flags part them."""
    lines = table([row(0, 50.0, coeff=0.1), row(1, 54.0, coeff=0.1), row(0, 60.0, coeff=1.0)],
                  True, "test").splitlines()
    assert lines[2] == "| byol_disc coeff=0.1 | 52.00 ± 2.83 | 30.00 ± 0.00 | 40.00 ± 0.00 | 2 |"
    assert lines[3].startswith("| byol_disc coeff=0.1, untrained encoder | 10.50 ± 0.71 |")
    assert lines[4] == "| byol_disc coeff=1.0 | 60.00 | 30.00 | 40.00 | 1 |"
    assert "test split. Flags in common: epochs=5" in lines[-2]


def test_table_parts_other_data():
    """What it is not known of has a row of its own too; no difference is taken across data."""
    rows = [row(seed, data=data) for data in (1, 2, None) for seed in (0, 1, 2)]
    assert labels(rows) == [("data=1", 3), ("data=2", 3), ("data=None", 3)]
    assert labels([*rows[:3], row(3, data=1)]) == [("", 4)]             # a control: they share it
    more = [row(seed, 60.0 + seed, data=data, coeff=1) for data in (1, 2) for seed in (0, 1, 2)]
    lines = table([({"coeff": 0, **c}, r) for c, r in [*rows[:6], *more]], False, "test")
    assert lines.count("| difference to the first row |") == 1 and "2 settings (without" in lines
    for (_, result), evaluation in zip(rows[:3], "aab"):                # nor across evaluations
        result["evaluation"] = evaluation
    assert labels(rows[:3]) == [("evaluation=a", 2), ("evaluation=b", 1)]


def test_two_codes_are_two_rows():
    """Unless they are let share one; no word is lost on the code where it is the same."""
    one = [row(seed, code="a") for seed in (0, 1)]
    for other, code in [({"code": "b"}, "b"), ({}, "unknown")]:
        two = [row(seed, **other) for seed in (2, 3)]
        assert labels(one + two) == [("code=a", 2), (f"code={code}", 2)]
        assert labels(one + two, any_code=True) == [("", 4)]
    assert "code" not in table(one, False, "test")
    one = [row(seed, code="a", common_code="x") for seed in (0, 1)]
    two = [row(seed, code="c", script="byol_langevin", common_code="y") for seed in (0, 1)]
    assert "| byol_langevin common_code=y |" in table(one + two, False, "test")   # of two scripts
    assert "| byol_langevin |" in table(one + two, False, "test", any_code=True)


def test_flags_of_ones_own_may_have_names_of_older_ones():
    assert len(labels([row(0, version=1, code="a"), row(1, version=2, code="a")])) == 2
    assert len(labels([row(0, version=1), row(1, version=2)])) == 1


def test_ebms_have_no_differences():
    """Their rows are several readings of the same networks."""
    rows = [row(seed, 50.0 + seed * seed, script="ebm", layers=layers)
            for layers in ("last", "all") for seed in (0, 1, 2)]
    lines = table(rows, False, "test")
    assert "difference to" not in lines and lines.endswith("rows of one EBM are not independent.")


def test_a_flag_that_older_runs_lack_counts_as_its_default():
    old = [row(seed, defaults={"lr": 1}) for seed in (0, 1)]
    new = [row(seed, defaults={"lr": 1, "margin": 0.0}, margin=margin)
           for seed, margin in [(2, 0.0), (0, 0.5)]]
    assert labels(old + new) == [("margin=0.0", 3), ("margin=0.5", 1)]
    assert labels(old + new[:1]) == [("", 3)]


def test_a_seed_counts_once_in_a_row(capsys):
    """Of two results of one seed the first counts, and the other is named."""
    rows = [row(0, 50.0), row(0, 51.0, run_dir="copy"), row(1, 52.0)]
    assert "| 51.00 ± 1.41 |" in table(rows, False, "test")
    assert "copy: left out" in capsys.readouterr().out


def test_a_table_says_why_it_has_no_difference_or_no_cosine_knn():
    rows = [row(seed, 50.0 + coeff + seed, coeff=coeff) for coeff in (0, 1) for seed in (0, 1)]
    lines = table(rows, False, "test")
    assert "difference to" not in lines and "would have 1 degrees of freedom" in lines
    assert "No differences" not in table(rows[:2], False, "test")       # nothing to compare
    assert "200 neighbours" not in lines
    rows[0][1]["knn_cosine"] = None
    lines = table(rows, False, "test").splitlines()
    assert " | - | 2 |" in lines[2] and "its 200 neighbours are over a tenth" in lines[-2]


def test_results_are_read_from_a_file_of_its_own_data_and_split(tmp_path):
    rows, path = [row(0), row(1)], tmp_path / "rows.jsonl"
    flags = dict(dataset=None, data_dir=None, split="test")
    write(path, rows)
    assert linear_eval.read_rows(path, SimpleNamespace(**flags)) == rows
    for other in (dict(split="val"), dict(dataset="cifar100"), dict(data_dir="x")):
        with pytest.raises(UserError, match="own data and split"):
            linear_eval.read_rows(path, SimpleNamespace(**flags | other))
    for damage in ("[1]\n", "{}\n", "{"):
        path.write_text(damage)
        with pytest.raises(UserError, match="rows.jsonl: not a results file"):
            linear_eval.read_rows(path)


def test_machines_have_seeds_and_a_baseline_of_their_own(tmp_path, command, monkeypatch):
    """In the table of several results files, of which one error is pooled."""
    monkeypatch.chdir(tmp_path)
    for name, shift in [("a", 0.0), ("b", 20.0)]:
        rows = [row(seed, linear + shift, coeff=coeff) for coeff, values in [
            (0, [50.0, 51.0, 52.0]), (1, [52.0, 52.5, 55.0])] for seed, linear in enumerate(values)]
        write(tmp_path / f"{name}.jsonl", rows)
    _, out, _ = command("linear_eval", "a.jsonl", "b.jsonl")
    for machine, means in [("a", ["51.00", "53.17"]), ("b", ["71.00", "73.17"])]:
        for coeff, mean_of in enumerate(means):
            assert f"| byol_disc coeff={coeff} machine={machine} | {mean_of} ± " in out
        # 2, 1.5 and 3: mean 2.17, standard deviation 0.76, over the root of 3
        assert f"| difference to the first row of {machine} | +2.17 ± 0.44* " in out
    assert "4 degrees of freedom" in out
    assert "machine" not in command("linear_eval", "a.jsonl")[1]        # a control
    Path("c").mkdir()                                                   # two files of one name
    shutil.copy("b.jsonl", "c/a.jsonl")
    config, result = rows[0]
    Path("run").mkdir()                                                 # and a run in a directory
    save(Path("run/config.json"), config | {"dataset": "synthetic", "data_dir": ""})
    save(Path("run/eval.json"), result)
    _, out, _ = command("linear_eval", "a.jsonl", "c/a.jsonl", "run", "run")
    for machine, mean_of in [("a.jsonl", "51.00"), ("c/a.jsonl", "71.00"), ("here", "70.00")]:
        assert f"| byol_disc coeff=0 machine={machine} | {mean_of} " in out
    assert "left out" not in out                                        # it is named twice


def test_the_checksum_is_of_all_images_and_labels(monkeypatch):
    """CRC-32 of the four tensors."""
    parts = {"train": draw_shapes(20, seed=3), "test": draw_shapes(10, seed=4)}
    monkeypatch.setattr(common, "load_images", lambda *args: parts[args[2]])
    args = SimpleNamespace(dataset="synthetic", data_dir="")
    tensors = [x for split in ("train", "test") for x in parts[split]]
    before = common.data_checksum(args)
    assert before == zlib.crc32(b"".join(x.numpy().tobytes() for x in tensors))
    for x in tensors:
        x.view(-1)[-1] += 1
        assert common.data_checksum(args) != before
        x.view(-1)[-1] -= 1


@pytest.mark.parametrize("split, n", [("test", 30), ("val", 6)])
def test_a_split_keeps_each_label_and_holds_images_out(split, n, monkeypatch, capsys):
    """val: a tenth of the training images, never seen by the probe, and no test image at all. One
    class alone is not evaluated: it would be 100 %, untrained too."""
    images, seen = draw_shapes(90, seed=3)[0], []
    images[:, 0, 0, 0] = torch.arange(90, dtype=torch.uint8)            # each is recognisable
    labels = torch.arange(90) % 3 // 2
    parts = {"train": (images[:60], labels[:60]), "test": (images[60:], labels[60:])}
    for module in (common, linear_eval):
        monkeypatch.setattr(module, "load_images", lambda *args: parts[args[2]])
    monkeypatch.setitem(METRICS, "linear", lambda *data: seen.append(data) or 0.0)
    args = SimpleNamespace(dataset="synthetic", data_dir="DIR", device="cpu", precision="fp32")

    def evaluate():
        return linear_eval.evaluate(Encoder(8), args, lambda x: 255 * x[:, 0, 0, :1], ["linear"],
                                    split)

    result, ((train_x, train_y, test_x, test_y),) = evaluate(), seen
    assert result["linear"] == 0.0 and result["split"] == split
    which = torch.cat([train_x, test_x]).round().flatten().long()
    assert torch.equal(torch.cat([train_y, test_y]), labels[which])
    assert sorted(which.tolist()) == [*range(90 if split == "test" else 60)]
    assert len(test_x) == n and (split == "val" or min(which[60:]) == 60)
    parts["train"] = images[:9], labels[:9]
    assert evaluate() and len(seen[1][2]) == max(1, n - 5 if split == "val" else n)   # at least one
    labels.zero_()
    assert evaluate() is None and len(seen) == 2
    assert capsys.readouterr().out == "not evaluated: DIR has only one class\n"
