"""Linear and kNN accuracy of frozen features, for one or many runs, as one markdown table.

    python linear_eval.py runs/*                   # every run, finished or not; every EBM's D
    python linear_eval.py runs/* --untrained       # and the floor, an untrained encoder or D

The protocol is the base code's: features once, in evaluation mode, of the last epoch's encoder; the
probe learns from the labels of all training images, whatever --subset. Runs that differ in their
seed, or their EBM, alone share a row: mean, standard deviation and number of runs. Where they share
seeds with the first row's, their paired differences to it follow, with the standard error.
"""
import argparse
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (ACCURACIES, NOT_IDENTITY, Encoder, Parser, UserError, autocast, bake, checksum,
                    ebm_networks, has_test, launch, load, load_ebm, load_images, load_into,
                    same_config, seed_of, set_up, show, standardise, training_images, world_size)

# --- Frozen features and what can be read from them ------------------------------------------


@torch.no_grad()
def extract_features(encoder, images, encode=None):
    """Features (N, C) in fp32, on the encoder's device, of images (N, 3, H, W), uint8 or in [0, 1].

    The encoder is in evaluation mode meanwhile. `encode` is called in its place, if given.
    """
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    encode, white = encode or encoder, 255 if images.dtype == torch.uint8 else 1
    features = [encode(x.to(device) / white).float() for x in images.split(500)]
    encoder.train(was_training)
    return torch.cat(features)


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature=None):
    """Accuracy (%) of k nearest neighbours, features (N, C), labels (N,).

    By Euclidean distance and majority (the base code's); with a temperature by cosine similarity s,
    votes weighted exp(s / temperature) (arXiv:1805.01978).
    """
    k, classes, correct = min(k, len(train_x)), int(train_y.max()) + 1, []
    if temperature:
        train_x, test_x = F.normalize(train_x), F.normalize(test_x)
    for x, y in zip(test_x.split(500), test_y.split(500)):
        near = x @ train_x.T if temperature else -torch.cdist(x, train_x)
        near, index = near.topk(k)                                                 # (500, k)
        weight = (near / temperature).exp() if temperature else torch.ones_like(near)
        votes = weight.new_zeros(len(x), classes).scatter_add(1, train_y[index], weight)
        correct.append(votes.argmax(1) == y)
    return 100 * torch.cat(correct).sum().item() / len(test_x)


def linear_accuracy(train_x, train_y, test_x, test_y, epochs=500):
    """Accuracy (%) of a linear classifier, the base code's: Adam, batches of 1000, last epoch."""
    classifier = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=5e-6, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-6 / 1e-2) ** (1 / epochs))
    shuffled = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(train_x), generator=shuffled) for _ in range(epochs)]
    for order in torch.stack(orders).to(train_x.device):                           # one copy
        for index in order.split(1000):
            loss = F.cross_entropy(classifier(train_x[index]), train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return 100 * (classifier(test_x).argmax(1) == test_y).float().mean().item()


METRICS = {"linear": linear_accuracy, "knn5": partial(knn_accuracy, k=5),
           "knn_cosine": partial(knn_accuracy, k=200, temperature=0.1)}
SETTINGS = dict(dataset=str, data_dir=str, subset=int, width=int, seed=int, precision=str)


def evaluate(encoder, args, encode=None, metrics=METRICS, split="test", untrained=False):
    """Accuracies (%) {metric: value} of the encoder's frozen features.

    Probe and kNN have the labels of all training images, whatever --subset. With split "val" a
    tenth of them, held out, are the test images. `untrained`: with the split, and an untrained
    encoder's accuracies, as in eval.json. None, with a printed line, without test images or where
    there is but one class, which any encoder would tell.
    """
    train = load_images(args.dataset, args.data_dir, "train")
    if not train[1].any():
        show(f"not evaluated: --data-dir {args.data_dir} has one class alone")
        return None
    if split == "val":
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(1))
        held_out, kept = order.tensor_split([max(1, len(order) // 10)])
        train, test = [x[kept] for x in train], [x[held_out] for x in train]
    elif has_test(args):
        test = load_images(args.dataset, args.data_dir, "test")
    else:
        show(f"not evaluated: --data-dir {args.data_dir} has no test/<class>/*")
        return None
    data = []
    for images, labels in (train, test):
        with autocast(args):
            data.append(extract_features(encoder, images, encode))
        data.append(labels.to(args.device))
    result = {metric: METRICS[metric](*data) for metric in metrics}
    if untrained:
        torch.manual_seed(args.seed)
        fresh = type(encoder)(args.width).to(args.device)
        result |= {"split": split, "untrained": evaluate(fresh, args, split=split)}
    return result


# --- One table over runs and EBMs ------------------------------------------------------------


def evaluate_run(path, flags):
    """[(config, accuracies)] of a run: from its eval.json where that has them, else computed."""
    config = load(path / "config.json", version=int, script=str, epochs=int, **SETTINGS)
    if (path / "eval.json").exists() and flags.split == "test":
        return [(config, load(path / "eval.json", **ACCURACIES, untrained=ACCURACIES))]
    saved = load(path / "checkpoint.pt", done=int, model=dict)
    args, _ = settings(path, config, flags)
    show(f"evaluating {path}, epoch {saved['done']}", passing=True)
    encoder = Encoder(args.width)
    load_into(encoder, {name.removeprefix("encoder."): value for name, value
                        in saved["model"].items() if name.startswith("encoder.")}, path)
    result = evaluate(encoder.to(args.device), args, split=flags.split, untrained=True)
    return [({**config, "epochs": saved["done"]}, result)]


def evaluate_ebm(path, flags):
    """Yield config and accuracies of an EBM's discriminator, for its last stage and for all."""
    config = load(path, config=dict(ebm_objective=str, ebm_iters=int, **SETTINGS))["config"]
    args, images = settings(path, config, flags)
    networks = {"": load_ebm(path, flags.device)}
    if flags.untrained:
        torch.manual_seed(seed_of(args.seed))
        networks[", untrained"] = bake(ebm_networks(args)["d"])
        standardise(networks[", untrained"], images, args)
    for name, network in networks.items():
        for layers in ["last", "all"]:
            show(f"evaluating {path}{name}, {layers}", passing=True)
            encode = partial(network.features, layers=layers)
            yield ({"script": f"{path}{name}", "layers": layers},
                   evaluate(network, args, encode, split=flags.split))


def settings(path, config, flags):
    """The flags of a run or an EBM, evaluated here, and its training images, if still the same."""
    args = argparse.Namespace(**{**config, "device": flags.device,
                                 "data_dir": flags.data_dir or config["data_dir"]})
    images = training_images(args)
    same_config(path, config, {"images": checksum(images)})
    return args, images


def table(rows, untrained, split):
    """Markdown of [(config, accuracies)]: a line for each setting, over its seeds, and one of its
    differences, paired by seed, to the first setting, where they share several."""
    flags = {flag: value for config, _ in rows for flag, value in config.items()}
    shared = {flag: value for flag, value in flags.items()
              if all(config.get(flag, value) == value for config, _ in rows)}
    unshown = NOT_IDENTITY | {"script", "seed", "f", "version"}         # a seed has an EBM, f
    groups = {}
    for config, result in rows:
        differing = [f"{flag}={value}" for flag, value in config.items()
                     if flag not in shared.keys() | unshown]
        label = " ".join([config["script"], *differing])
        groups.setdefault(label, []).append((config.get("seed"), result))

    def line(label, results, divisor=1):
        cells = []
        for metric in METRICS:
            values = [result[metric] for result in results]
            spread = f" ± {stdev(values) / divisor:.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        return "| " + " | ".join([label, *cells, str(len(results))]) + " |"

    lines = ["| run | linear | 5-NN | cosine kNN | n |", "|---|---|---|---|---|"]
    first = dict(next(iter(groups.values()), []))
    for label, seeds in groups.items():
        results = [result for _, result in seeds]
        lines.append(line(label, results))
        pairs = [(result, first[seed]) for seed, result in seeds if seed in first]
        if len(pairs) > 1 and len(lines) > 3:
            differences = [{metric: a[metric] - b[metric] for metric in METRICS} for a, b in pairs]
            lines.append(line("less the first, ± standard error", differences, len(pairs) ** 0.5))
        if untrained and "untrained" in results[0]:
            lines.append(line(f"{label}, untrained encoder", [r["untrained"] for r in results]))
    caption = ", ".join(f"{flag}={value}" for flag, value in shared.items()
                        if flag == "script" or flag not in unshown | {"images"})
    return "\n".join([*lines, "", f"Accuracy in %, {split} split. Flags in common: {caption}"])


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="run directories, files of EBMs")
    add("--split", choices=["test", "val"], default="test",
        help="val: a tenth of the training images, held out from the probe, for choosing flags")
    add("--untrained", action="store_true", help="a line for the untrained encoder of a run too")
    add("--data-dir", help="where the images are now; None: where they were")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args()
    set_up(args)
    if world_size() > 1:
        raise UserError("linear_eval.py: computes on one device; start it without torchrun")
    if missing := [path for path in args.paths if not path.exists() and path.suffix != ".new"]:
        raise UserError(f"{missing[0]}: there is no such file")
    rows, problems = [], []
    for path in dict.fromkeys(args.paths):
        made = {file.name for file in path.glob("*")} & {"eval.json", "checkpoint.pt"}
        if path.suffix == ".ebm" or not (made or path.suffix == ".pt"):
            show(f"{path}: left out, no EBM, no run to evaluate", passing=path.suffix == ".ebm")
            continue
        try:
            evaluated = (evaluate_run if made else evaluate_ebm)(path, args)
            rows += [row for row in evaluated if row[1]]
        except UserError as error:                        # the others' work is not lost
            problems.append(str(error))
    show("", passing=True)
    if rows:
        print(table(rows, args.untrained, args.split))
    if problems or not rows:
        raise UserError("; ".join(problems) or "nothing to evaluate")


if __name__ == "__main__":
    launch(main)
