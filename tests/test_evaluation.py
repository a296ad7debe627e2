"""Frozen features, kNN and the linear probe, against loops and cases with a known answer."""
import inspect
import json
import math
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import linear_eval
from common import Encoder, UserError, draw_shapes
from linear_eval import METRICS, extract_features, knn_accuracy, linear_accuracy, once, table


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


@pytest.mark.parametrize("k, temperature", [(1, None), (5, None), (20, 0.1)])
def test_knn_equals_loops(k, temperature):
    centers = torch.randn(4, 8)
    train_y, test_y = torch.randint(4, (90,)), torch.randint(4, (60,))
    train_x, test_x = (centers[y] + 1.2 * torch.randn(len(y), 8) for y in (train_y, test_y))
    ours = knn_accuracy(train_x, train_y, test_x, test_y, k, temperature)
    assert ours == pytest.approx(knn_in_loops(train_x, train_y, test_x, test_y, k, temperature))
    assert 50 < ours < 100
    assert knn_accuracy(train_x, train_y.roll(1), test_x, test_y, k, temperature) < 50


def test_metrics_are_the_base_codes():
    """k = 5, Euclidean; k = 200, cosine, T = 0.1; a probe of 500 epochs."""
    torch.manual_seed(2)
    centers = torch.randn(4, 8)
    train_y, test_y = torch.randint(4, (260,)), torch.randint(4, (120,))
    data = [centers[train_y] + 2 * torch.randn(260, 8), train_y,
            centers[test_y] + 2 * torch.randn(120, 8), test_y]
    named = {"knn5": (5, None), "knn_cosine": (200, 0.1)}
    for name, others in [("knn5", [(4, None), (6, None), (5, 0.1)]),
                         ("knn_cosine", [(200, 0.5), (200, 0.07), (200, None)])]:
        ours = METRICS[name](*data)
        assert ours == pytest.approx(knn_in_loops(*data, *named[name]))
        assert all(ours != pytest.approx(knn_in_loops(*data, *other)) for other in others)
    assert METRICS["knn_cosine"].keywords["k"] == 200                   # of no account at this T
    assert METRICS.keys() == {"linear", *named} and METRICS["linear"] is linear_accuracy
    assert inspect.signature(linear_accuracy).parameters["epochs"].default == 500


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


def test_table_joins_seeds_and_nothing_else():
    """Rows that differ in seed and EBM file: mean, standard deviation, n; other flags part them."""
    def run(seed, coeff, linear):
        accuracies = {"linear": linear, "knn5": 30.0, "knn_cosine": 40.0}
        config = {"script": "byol_disc", "seed": seed, "ebm": f"{seed}.pt", "coeff": coeff,
                  "f": seed, "images": 7, "run_dir": f"runs/{seed}", "version": 2}
        return ({**config, "epochs": 5},
                {**accuracies, "untrained": {**accuracies, "linear": 10.0 + seed}})

    lines = table([run(0, 0.1, 50.0), run(1, 0.1, 54.0), run(0, 1.0, 60.0)], True, "test")
    lines = lines.splitlines()
    assert lines[2] == "| byol_disc coeff=0.1 | 52.00 ± 2.83 | 30.00 ± 0.00 | 40.00 ± 0.00 | 2 |"
    assert lines[3].startswith("| byol_disc coeff=0.1, untrained encoder | 10.50 ± 0.71 |")
    assert lines[4] == "| byol_disc coeff=1.0 | 60.00 | 30.00 | 40.00 | 1 |"
    assert lines[-1] == ("Accuracy in %, test split. Flags in common: "
                         "script=byol_disc, epochs=5")


def test_table_pairs_the_differences_by_seed():
    def run(seed, coeff, linear):
        return ({"script": "byol_disc", "seed": seed, "coeff": coeff},
                {"linear": linear, "knn5": 2 * linear, "knn_cosine": 40.0})

    rows = [run(0, 0.0, 50.0), run(1, 0.0, 60.0), run(2, 0.0, 70.0),
            run(2, 1.0, 74.0), run(0, 1.0, 51.0), run(3, 1.0, 99.0), run(1, 1.0, 62.5),
            run(1, 2.0, 9.0)]
    lines = table(rows, False, "test").splitlines()
    assert [line.count("less the first") for line in lines[2:7]] == [0, 0, 1, 0, 1]
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
    known = 4.339 * error / 2 ** 0.5                                    # Tukey's, 3 rows, n = 4
    for beyond in (0.97, 1.03):                                         # a star from there on
        moved = values[0] + beyond * known + (values[1] - values[1].mean()) - (
            values[0] - values[0].mean())                               # the residuals stay
        told = table([(c, dict.fromkeys(r, moved[c["seed"]].item()) if c["coeff"] == 1 else r)
                      for c, r in rows], False, "test").splitlines()
        assert (f"+{beyond * known:.2f} ± {error:.2f}* |" in told[4]) == (beyond > 1)
        least = float(told[-1].split("from ")[1].split(",")[0])
        assert least == pytest.approx(known * (4 / 3) ** 0.5, rel=0.02)
    other = [({**c, "epochs": 22}, dict.fromkeys(r, r["linear"] + c["seed"] ** 2))
             for c, r in rows if c["coeff"] == 0]                       # in no way like a row
    longer = table([({**c, "epochs": 20}, r) for c, r in rows] + other, False, "test").splitlines()
    assert f"± {error:.2f}" in longer[4].replace("*", "") and "over 3 rows" in longer[-1]
    assert f"± {error:.2f}" in longer[8].replace("*", "") and "all pairs of 4" in longer[-1]
    alone = table([({**c, "epochs": 20}, r) for c, r in rows if c["coeff"] == 0] + other, False,
                  "test").splitlines()
    shift = torch.tensor([0.0, 1, 4, 9]).std() / 2                      # n = 4, paired
    assert f"+3.50 ± {shift:.2f}" in alone[4].replace("*", "")     # nothing else is there
    unpaired = table([({**c, "seed": (c["seed"] + int(c["coeff"])) % 4}, r) for c, r in rows],
                     False, "test").splitlines()
    assert f"± {error:.2f}" not in unpaired[4]                          # a control


@pytest.mark.parametrize("rows, freedom, known", [(2, 4, 3.927), (3, 10, 3.877), (6, 10, 4.912),
                                                  (10, 18, 5.071)])
def test_what_can_be_told_apart_is_tukeys(rows, freedom, known):
    assert linear_eval.studentized_range(rows, freedom) == pytest.approx(known, rel=0.015)


def test_rows_are_kept_in_a_file_and_read_again(tmp_path):
    """With the log of the run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"argv": []}\n{"epoch": 1}\n')
    config = {"script": "byol_disc", "seed": 0, "run_dir": str(tmp_path / "run")}
    rows, path = [(config, {"linear": 50.0}), ({**config, "seed": 1}, {"linear": 51.0})], (
        tmp_path / "rows.jsonl")
    linear_eval.keep(path, rows[:1])
    linear_eval.keep(path, rows[1:])
    assert linear_eval.kept_rows(path) == rows
    assert json.loads(path.read_text().splitlines()[0])["log"] == [{"argv": []}, {"epoch": 1}]
    for damage in ("[1]\n", "{}\n", "{"):
        path.write_text(damage)
        with pytest.raises(UserError, match="rows.jsonl: .*not a file that --keep wrote"):
            linear_eval.kept_rows(path)


def test_table_parts_other_data_and_other_number_formats():
    """What the one or the other is not known of has a row of its own too."""
    accuracies = dict(linear=50.0, knn5=30.0, knn_cosine=40.0)
    rows = [({"script": "s", "seed": seed, "precision": precision}, {**accuracies, **data})
            for seed, data, precision in [
                (0, {"data": 1}, "bf16"), (0, {"data": 2}, "bf16"), (0, {}, "bf16"),
                (0, {"data": 1}, "fp32"), (0, {"data": 1}, "auto"), (1, {"data": 1}, "bf16")]]
    lines = [line.split(" | ") for line in table(rows, False, "test").splitlines()]
    assert [(line[0], line[-1]) for line in lines[2:7]] == [
        ("| s precision=bf16 data=1", "2 |"), ("| s precision=bf16 data=2", "1 |"),
        ("| s precision=bf16 data=unknown", "1 |"), ("| s precision=fp32 data=1", "1 |"),
        ("| s precision=auto data=1", "1 |")]
    assert "data" not in table(rows[::5], False, "test")                # a control: they share it


def test_a_seed_counts_once_in_a_row(capsys):
    """A copy is named, another result of the same seed too; the first is kept."""
    def run(name, linear, seed=0, **flags):
        return ({"script": "s", "run_dir": name, "seed": seed, **flags},
                {"linear": linear, "knn5": 30.0, "knn_cosine": 40.0})

    rows = [run("a", 50.0, coeff=1), run("b", 50.0, coeff=1), run("c", 51.0, coeff=1, f=7),
            run("d", 50.0, 1, coeff=1), run("e", 50.0, coeff=2), run("f", 50.0, 1, coeff=2)]
    kept, problems = once(rows)
    assert [config["run_dir"] for config, _ in kept] == ["a", "d", "e", "f"]
    assert capsys.readouterr().out == "a and b: the same run, counted once\n"
    assert problems == ["a and c: two results of one seed, the first counts; name one"]
    assert [row[-6:] for row in table(kept, False, "test").splitlines()[2:4]] == 2 * [" | 2 |"]


def test_the_checksum_is_of_all_images_and_labels(monkeypatch):
    """CRC-32 of the four tensors, in either split of the training images too."""
    parts = {"train": draw_shapes(20, seed=3), "test": draw_shapes(10, seed=4)}
    for module in (common, linear_eval):
        monkeypatch.setattr(module, "load_images", lambda *args: parts[args[2]])
    args = SimpleNamespace(dataset="synthetic", data_dir="", device="cpu", precision="fp32",
                           eager=False)

    def data(split="test"):
        return linear_eval.evaluate(Encoder(8), args, metrics=[], split=split)["data"]

    before = data(), data("val")
    assert before[0] == zlib.crc32(b"".join(
        x.numpy().tobytes() for split in ("train", "test") for x in parts[split]))
    for split, part in parts.items():
        for x in part:
            x.view(-1)[-1] += 1
            assert data() != before[0] and (data("val") != before[1]) == (split == "train")
            x.view(-1)[-1] -= 1
    assert (data(), data("val")) == before and common.data_checksum(args) == before[0]


def test_an_eval_json_is_compared_with_data_that_can_be_loaded(tmp_path, monkeypatch, capsys):
    """Nothing is downloaded for that; other data than named, or damaged, is no answer."""
    def load_images(*args):
        loaded.append(args)
        raise UserError("damaged")
    loaded, result = [], {"data": 1}
    monkeypatch.setattr(common, "load_images", load_images)
    args = SimpleNamespace(dataset="cifar10", data_dir=str(tmp_path / "gone"))
    assert linear_eval.answers("run", result, args, None) and not loaded
    args.data_dir = str(tmp_path)
    assert linear_eval.answers("run", {}, args, None) and not loaded
    assert linear_eval.answers("run", result, args, None) and loaded
    assert capsys.readouterr().out == (
        "run: as in its eval.json, not compared with the data (damaged)\n")
    assert not linear_eval.answers("run", {}, args, str(tmp_path))
    with pytest.raises(UserError, match="damaged"):
        linear_eval.answers("run", result, args, str(tmp_path))


@pytest.mark.parametrize("split", ["test", "val"])
def test_one_class_alone_is_not_evaluated(split, monkeypatch, capsys):
    """It would be 100 %, untrained too. With two, each image keeps its label."""
    images, seen = draw_shapes(90, seed=3)[0], []
    images[:, 0, 0, 0] = torch.arange(90, dtype=torch.uint8)            # each is recognisable
    labels = torch.arange(90) % 3 // 2
    parts = {"train": (images[:60], labels[:60]), "test": (images[60:], labels[60:])}
    monkeypatch.setattr(linear_eval, "load_images", lambda *args: parts[args[2]])
    monkeypatch.setitem(METRICS, "linear", lambda *data, eager: seen.append(data) or 0.0)
    args = SimpleNamespace(dataset="synthetic", data_dir="DIR", device="cpu", precision="fp32",
                           eager=False)

    def evaluate():
        encode = lambda x: 255 * x[:, 0, 0, :1]
        return linear_eval.evaluate(Encoder(8), args, encode, ["linear"], split)

    assert evaluate()["linear"] == 0.0
    train_x, train_y, test_x, test_y = seen[0]
    which = torch.cat([train_x, test_x]).round().flatten().long()
    assert torch.equal(torch.cat([train_y, test_y]), labels[which])
    assert sorted(which.tolist()) == [*range(90 if split == "test" else 60)]
    labels.zero_()
    assert evaluate() is None and len(seen) == 1
    assert capsys.readouterr().out == "not evaluated: --data-dir DIR has one class alone\n"


def test_split_val_holds_training_images_out(monkeypatch):
    """A tenth of the training images, never seen by the probe, and no test image at all."""
    images, labels = draw_shapes(200, seed=3)
    images[:, :, 0, 0] = torch.arange(200, dtype=torch.uint8)[:, None]  # each is recognisable
    asked, seen = [], []
    monkeypatch.setattr(linear_eval, "load_images",
                        lambda *_: asked.append(_[2]) or (images, labels))
    monkeypatch.setitem(METRICS, "linear", lambda *data, eager: seen.append(data) or 0.0)
    args = SimpleNamespace(dataset="synthetic", data_dir="", device="cpu", precision="fp32",
                           eager=False)
    encoder = Encoder(8)
    result = linear_eval.evaluate(encoder, args, lambda x: 255 * x[:, 0, 0, :1], ["linear"], "val")
    train_x, train_y, val_x, val_y = seen[0]
    both = torch.cat([train_x, val_x]).round().flatten().long()
    assert asked == ["train"] and result["linear"] == 0.0
    assert result.keys() == {"linear", "data", "split"}
    assert len(val_x) == len(val_y) == 20 and sorted(both.tolist()) == list(range(200))
    assert torch.equal(torch.cat([train_y, val_y]), labels[both])
    images, labels = images[:9], labels[:9]                             # of nine it is one
    linear_eval.evaluate(encoder, args, metrics=["linear"], split="val")
    assert [len(x) for x in seen[1]] == [8, 8, 1, 1]
