"""Frozen features, kNN and the linear probe, against loops and cases with a known answer."""
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import linear_eval
from common import Encoder, draw_shapes
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
    assert len(lines) == 8 and [line.count("less the first") for line in lines[2:6]] == [0, 0, 1, 0]
    # 4, 1 and 2.5: mean 2.5, standard deviation 1.5, over the root of 3
    assert "| 2.50 ± 0.87 | 5.00 ± 1.73 | 0.00 ± 0.00 | 3 |" in lines[4]


@pytest.mark.parametrize("split", ["test", "val"])
def test_one_class_alone_is_not_evaluated(split, monkeypatch, capsys):
    """It would be 100 %, untrained too. With two, each image keeps its label."""
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

    assert evaluate() == {"linear": 0.0}
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
    monkeypatch.setitem(METRICS, "linear", lambda *data: seen.append(data) or 0.0)
    args = SimpleNamespace(dataset="synthetic", data_dir="", device="cpu", precision="fp32")
    encoder = Encoder(8)
    result = linear_eval.evaluate(encoder, args, lambda x: 255 * x[:, 0, 0, :1], ["linear"], "val")
    train_x, train_y, val_x, val_y = seen[0]
    both = torch.cat([train_x, val_x]).round().flatten().long()
    assert asked == ["train"] and result == {"linear": 0.0}
    assert len(val_x) == len(val_y) == 20 and sorted(both.tolist()) == list(range(200))
    assert torch.equal(torch.cat([train_y, val_y]), labels[both])
    images, labels = images[:9], labels[:9]                             # of nine it is one
    linear_eval.evaluate(encoder, args, metrics=["linear"], split="val")
    assert [len(x) for x in seen[1]] == [8, 8, 1, 1]
