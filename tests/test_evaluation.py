"""Frozen features, kNN and the linear probe, against loops and cases with a known answer."""
import inspect
import json
import math
import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import linear_eval
from common import Encoder, UserError, draw_shapes
from linear_eval import METRICS, extract_features, knn_accuracy, linear_accuracy, table


def test_the_backbone_stays_frozen():
    encoder = Encoder(8)
    images, _ = draw_shapes(20, seed=3)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = extract_features(encoder, images)
    assert features.shape == (20, 64) and not features.requires_grad and encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    alone = extract_features(encoder, images[3:4])
    assert torch.allclose(alone, features[3:4], atol=1e-5)              # no batch statistics
    encoder(images / 255)                                               # a control: this is seen
    assert any(not torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


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
    (1, None, [(3, None)]), (5, None, [(3, None), (9, None)]),
    (9, 0.1, [(9, None), (9, 1.0), (5, 0.1)])])
def test_knn_equals_loops(k, temperature, others):
    centers = torch.randn(4, 8)
    train_y, test_y = torch.randint(4, (90,)), torch.randint(4, (200,))
    train_x, test_x = (centers[y] + 1.2 * torch.randn(len(y), 8) for y in (train_y, test_y))
    ours = knn_accuracy(train_x, train_y, test_x, test_y, k, temperature)
    assert ours == pytest.approx(knn_in_loops(train_x, train_y, test_x, test_y, k, temperature))
    assert 50 < ours < 100
    for other in others:
        assert ours != pytest.approx(knn_in_loops(train_x, train_y, test_x, test_y, *other)), other
    assert knn_accuracy(train_x, train_y.roll(1), test_x, test_y, k, temperature) < 50


def test_metrics_are_the_base_codes():
    """k = 5, Euclidean; k = 200, cosine, T = 0.1; a probe of 500 epochs."""
    assert METRICS["linear"] is linear_accuracy and len(METRICS) == 3
    assert inspect.signature(linear_accuracy).parameters["epochs"].default == 500
    assert METRICS["knn5"].func is METRICS["knn_cosine"].func is knn_accuracy
    assert METRICS["knn5"].keywords == {"k": 5}
    assert METRICS["knn_cosine"].keywords == {"k": 200, "temperature": 0.1}


def test_cosine_knn_of_few_images_is_none():
    """Where 200 are over a tenth of the training images the most frequent class would win."""
    x, y = torch.randn(2000, 4), torch.randint(3, (2000,))
    assert METRICS["knn_cosine"](x, y, x[:9], y[:9]) is not None
    assert METRICS["knn_cosine"](x[1:], y[1:], x[:9], y[:9]) is None
    assert METRICS["knn5"](x[:40], y[:40], x[:9], y[:9]) is not None


def test_modules_get_their_own_mode_back_also_after_an_error():
    """A stem that is frozen in eval mode stays so; meanwhile all are in eval mode."""
    encoder, images, seen = Encoder(8), draw_shapes(20, seed=3)[0], []
    encoder.net[1].eval()
    before = [module.training for module in encoder.modules()]

    def encode(x):
        seen.append([module.training for module in encoder.modules()])
        return x.flatten(1) if len(seen) == 1 else 1 / 0

    for error in (nullcontext(), pytest.raises(ZeroDivisionError)):
        with error:
            extract_features(encoder, images, encode)
        assert [module.training for module in encoder.modules()] == before
    assert len(seen) == 2 and not any(map(any, seen)) and any(before) and not all(before)


@pytest.mark.parametrize("scale", [1, 1e-4])            # where the weight decay tells
def test_linear_probe_equals_its_protocol(scale, monkeypatch):
    """Adam from 1e-2, weight decay 5e-6, down to 1e-6 by a factor an epoch; here three epochs."""
    x, y, made = scale * torch.randn(2500, 6), torch.randint(3, (2500,)), []
    linear = nn.Linear
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
        return w.detach(), 100 * ((x @ w.T + b).argmax(1) == y).float().mean().item()

    accuracy, (weight, expected) = linear_accuracy(x, y, x, y, epochs=3), probe(1e-4)
    assert accuracy == pytest.approx(expected, abs=0.05)
    assert torch.allclose(made[0].weight, weight, atol=1e-5)
    assert not torch.allclose(weight, probe(1)[0], atol=1e-3)
    assert scale == 1 or not torch.allclose(weight, probe(1e-4, 0)[0], atol=1e-4)


def test_linear_probe_finds_a_linear_rule_and_nothing_else():
    x = torch.randn(3000, 6)
    linear, circle = (x @ torch.randn(6, 3)).argmax(1), (x.square().sum(1) > 5.35).long()
    assert linear_accuracy(x[:2000], linear[:2000], x[2000:], linear[2000:], epochs=300) > 90
    assert linear_accuracy(x[:2000], circle[:2000], x[2000:], circle[2000:], epochs=300) < 60


def test_raw_pixels_do_not_give_the_shapes_away():
    (train_x, train_y), (test_x, test_y) = draw_shapes(2000, seed=0), draw_shapes(1000, seed=1)
    pixels = [train_x.flatten(1) / 255 - 0.5, train_y, test_x.flatten(1) / 255 - 0.5, test_y]
    assert linear_accuracy(*pixels, epochs=50) < 15 and knn_accuracy(*pixels, k=5) < 40


def test_table_pairs_the_differences_by_seed():
    def run(seed, coeff, linear):
        return ({"script": "byol_disc", "seed": seed, "coeff": coeff},
                {"linear": linear, "knn5": 2 * linear, "knn_cosine": 40.0})

    rows = [run(0, 0.0, 50.0), run(1, 0.0, 60.0), run(2, 0.0, 70.0),
            run(2, 1.0, 74.0), run(0, 1.0, 51.0), run(3, 1.0, 99.0), run(1, 1.0, 62.5),
            run(1, 2.0, 9.0)]
    lines = table(rows, False, "test").splitlines()
    assert [line.count("difference to") for line in lines[2:7]] == [0, 0, 1, 0, 1]
    # 4, 1 and 2.5: mean 2.5, standard deviation 1.5, over the root of 3; seed 3 has no pair
    assert "| +2.50 ± 0.87 | +5.00 ± 1.73 | +0.00 ± 0.00 | 3 |" in lines[4]
    assert "| -51.00 ± 1.50* | -102.00 ± 3.00* |" in lines[6] and lines[6].endswith("| 1 |")
    assert "2 degrees of freedom" in lines[-1]


def test_one_error_is_pooled_over_rows_and_seeds():
    """That of a two-way table without gaps is known: what row and seed means leave."""
    values = torch.randn(3, 4, dtype=torch.float64) + 10 * torch.randn(4, dtype=torch.float64)
    rows = [({"script": "byol_disc", "seed": j, "coeff": float(i)},
             dict.fromkeys(("linear", "knn5", "knn_cosine"), values[i, j].item()))
            for i in range(3) for j in range(4)]
    left = values - values.mean(1, keepdim=True) - values.mean(0) + values.mean()
    error = (left.square().sum() / 6 * 2 / 4).sqrt().item()
    lines = table(rows, False, "test").splitlines()
    for i, line in [(1, lines[4]), (2, lines[6])]:
        assert f"| {(values[i] - values[0]).mean():+.2f} ± {error:.2f} |" in line.replace("*", "")
    assert "6 degrees of freedom" in lines[-1]
    assert f"standard deviations {error * 2 ** 0.5:.2f}, " in lines[-1]
    known = 4.339 * error / 2 ** 0.5                                    # Tukey's, 3 rows, n = 4
    for beyond in (0.97, 1.03):                                         # a star from there on
        moved = values[0] + beyond * known + (values[1] - values[1].mean()) - (
            values[0] - values[0].mean())                               # the residuals stay
        told = table([(c, dict.fromkeys(r, moved[c["seed"]].item()) if c["coeff"] == 1 else r)
                      for c, r in rows], False, "test").splitlines()
        assert (f"+{beyond * known:.2f} ± {error:.2f}* |" in told[4]) == (beyond > 1)
    other = [({**c, "epochs": 22}, dict.fromkeys(r, r["linear"] + c["seed"] ** 2))
             for c, r in rows if c["coeff"] == 0]                       # in no way like a row
    longer = table([({**c, "epochs": 20}, r) for c, r in rows] + other, False, "test").splitlines()
    assert f"± {error:.2f}" in longer[4].replace("*", "") and "over 3 settings" in longer[-1]
    assert f"± {error:.2f}" in longer[8].replace("*", "") and "all pairs of 4" in longer[-1]
    alone = table([({**c, "epochs": 20}, r) for c, r in rows if c["coeff"] == 0] + other, False,
                  "test").splitlines()
    assert "No differences" in alone[-1] and "with as many epochs" in alone[-1]
    unpaired = table([({**c, "seed": (c["seed"] + int(c["coeff"])) % 4}, r) for c, r in rows],
                     False, "test").splitlines()
    assert f"± {error:.2f}" not in unpaired[4]                          # a control


@pytest.mark.parametrize("rows, freedom, known", [(2, 4, 3.927), (6, 10, 4.912)])
def test_what_can_be_told_apart_is_tukeys(rows, freedom, known):
    assert linear_eval.studentized_range(rows, freedom) == pytest.approx(known, rel=0.015)


def row(seed=0, linear=50.0, data=7, **flags):
    """A row of a table, of which `data` is None in results of older code."""
    accuracies = {"linear": linear, "knn5": 30.0, "knn_cosine": 40.0}
    config = {"script": "byol_disc", "seed": seed, "run_dir": f"runs/{seed}", "epochs": 5}
    return ({**config, "images": 7, "f": seed, "ebm": f"{seed}.pt", **flags},
            {**accuracies, "untrained": {**accuracies, "linear": 10.0 + seed},
             **({} if data is None else {"data": data})})


def labels(rows, **flags):
    """(label, number of seeds) of each row of the table, but for the differences."""
    lines = [line.split(" | ") for line in table(rows, False, "test", **flags).splitlines()]
    return [(line[0].removeprefix("| byol_disc").strip(), int(line[-1].rstrip(" |")))
            for line in lines[2:] if line[0].startswith("| byol_disc")]


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


@pytest.mark.parametrize("other", [{"code": "b"}, {"code": "a+b"}, {"code": None}])
def test_two_codes_are_two_rows(other):
    """Unless they are let share one; no word is lost on the code where it is the same."""
    one = [row(seed, code="a") for seed in (0, 1)]
    two = [({k: v for k, v in c.items() if v is not None}, r)
           for c, r in (row(seed, **other) for seed in (2, 3))]
    code = other["code"] or "unknown"
    assert labels(one + two) == [("code=a", 2), (f"code={code}", 2)]
    assert labels(one + two, any_code=True) == [("", 4)]
    assert "code" not in table(one, False, "test")


def test_a_flag_that_older_runs_lack_counts_as_its_default():
    old = [row(seed, defaults={"lr": 1}) for seed in (0, 1)]
    new = [row(2, defaults={"lr": 1, "margin": 0.0}, margin=0.0),
           row(0, defaults={"lr": 1, "margin": 0.0}, margin=0.5)]
    assert labels(old + new) == [("margin=0.0", 3), ("margin=0.5", 1)]
    assert labels(new[::-1] + old) == [("margin=0.5", 1), ("margin=0.0", 3)]
    assert labels(old + new[:1]) == [("", 3)]


def test_a_seed_counts_once_in_a_row(capsys):
    """Of two results of one seed the first counts, and the other is named."""
    rows = [row(0, 50.0), row(0, 51.0, run_dir="copy"), row(1, 52.0)]
    assert "| 51.00 ± 1.41 |" in table(rows, False, "test")
    assert "copy: left out" in capsys.readouterr().out


def test_a_table_says_why_it_has_no_difference_or_no_cosine_knn():
    two = [row(seed, 50.0 + seed * coeff, coeff=coeff) for coeff in (0, 1) for seed in (0, 1)]
    lines = table(two, False, "test")
    assert "difference to" not in lines and "would have 1 degrees of freedom" in lines
    assert "No differences" not in table(two[:2], False, "test")        # nothing to compare
    three = [*two, row(2, 50.0, coeff=0), row(2, 51.0, coeff=1)]
    assert "difference to the first row" in table(three, False, "test")
    assert "200 neighbours" not in lines
    three[0][1]["knn_cosine"] = None
    lines = table(three, False, "test").splitlines()
    assert " | - | 3 |" in lines[2] and "its 200 neighbours are over a tenth" in lines[-2]


def test_results_are_read_from_a_file(tmp_path):
    rows, path = [row(0), row(1)], tmp_path / "rows.jsonl"
    flags = SimpleNamespace(dataset=None, data_dir=None, split="test")
    path.write_text("".join(json.dumps({"config": c, "result": r}) + "\n" for c, r in rows))
    assert linear_eval.read_rows(path, flags) == rows
    for damage in ("[1]\n", "{}\n", "{"):
        path.write_text(damage)
        with pytest.raises(UserError, match="rows.jsonl: not a results file"):
            linear_eval.read_rows(path, flags)


def test_the_checksum_is_of_all_images_and_labels(monkeypatch):
    """CRC-32 of the four tensors, whatever was evaluated."""
    parts = {"train": draw_shapes(20, seed=3), "test": draw_shapes(10, seed=4)}
    for module in (common, linear_eval):
        monkeypatch.setattr(module, "load_images", lambda *args: parts[args[2]])
    args = SimpleNamespace(dataset="synthetic", data_dir="", device="cpu", precision="fp32")

    def data(split="test"):
        return linear_eval.evaluate(Encoder(8), args, metrics=[], split=split)["data"]

    before = data()
    assert before == zlib.crc32(b"".join(
        x.numpy().tobytes() for split in ("train", "test") for x in parts[split]))
    for split, part in parts.items():
        for x in part:
            x.view(-1)[-1] += 1
            assert data() != before
            x.view(-1)[-1] -= 1
    assert data() == data("val") == before


@pytest.mark.parametrize("split, n", [("test", 30), ("val", 6)])
def test_a_split_keeps_each_label_and_holds_images_out(split, n, monkeypatch, capsys):
    """val: a tenth of the training images, never seen by the probe, and no test image at all. One
    class alone is not evaluated: it would be 100 %, untrained too."""
    images, seen = draw_shapes(90, seed=3)[0], []
    images[:, 0, 0, 0] = torch.arange(90, dtype=torch.uint8)            # each is recognisable
    labels = torch.arange(90) % 3 // 2
    parts = {"train": (images[:60], labels[:60]), "test": (images[60:], labels[60:])}
    monkeypatch.setattr(linear_eval, "load_images", lambda *args: parts[args[2]])
    monkeypatch.setitem(METRICS, "linear", lambda *data: seen.append(data) or 0.0)
    args = SimpleNamespace(dataset="synthetic", data_dir="DIR", device="cpu", precision="fp32")

    def evaluate():
        encode = lambda x: 255 * x[:, 0, 0, :1]
        return linear_eval.evaluate(Encoder(8), args, encode, ["linear"], split)

    result = evaluate()
    assert result["linear"] == 0.0 and result["split"] == split
    train_x, train_y, test_x, test_y = seen[0]
    which = torch.cat([train_x, test_x]).round().flatten().long()
    assert torch.equal(torch.cat([train_y, test_y]), labels[which])
    assert sorted(which.tolist()) == [*range(90 if split == "test" else 60)]
    assert len(test_x) == n and (split == "val" or min(which[60:]) == 60)
    parts["train"] = images[:9], labels[:9]
    assert evaluate() and len(seen[1][2]) == max(1, n - 5 if split == "val" else n)   # at least one
    labels.zero_()
    assert evaluate() is None and len(seen) == 2
    assert capsys.readouterr().out == "not evaluated: DIR has only one class\n"
