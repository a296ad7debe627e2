"""Linear and kNN accuracy of frozen features, for one or many runs, as one markdown table.

    python linear_eval.py runs/*                   # every run, finished or not; every EBM's D
    python linear_eval.py runs/* --untrained       # and the floor, an untrained encoder or D
    python linear_eval.py runs/* --keep FILE.jsonl # the rows with their logs in one file, ...
    python linear_eval.py FILE.jsonl               # ... which it reads as it does runs

The protocol is the base code's: features once, in evaluation mode, of the last epoch's encoder; the
probe learns from the labels of all training images, whatever --subset. Runs that differ in their
seed, and its EBM, alone share a row: mean, standard deviation and number of runs, a seed once.
Differences to the first row's, paired by seed, follow. Their standard error is pooled over the rows
of as many epochs, as runs that differ in those alone share too much; over all rows, if those are too
few. What an eval.json has of other images and labels than those at hand is computed again.
"""
import argparse
import json
import math
import os
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (NOT_IDENTITY, Encoder, Parser, UserError, append, autocast, captured, checksum,
                    data_checksum, describe, ebm_networks, fix_spectral_norm, has_test, launch,
                    load_ebm, load_images, naming, prepare_device, reading, same_config, seed_of,
                    show, standardise_features, training_images, world_size)

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


def linear_accuracy(train_x, train_y, test_x, test_y, epochs=500, eager=False):
    """Accuracy (%) of a linear classifier, the base code's: Adam, batches of 1000, last epoch.

    On a GPU whole batches are replayed as a CUDA graph, unless `eager`.
    """
    classifier = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=5e-6, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-6 / 1e-2) ** (1 / epochs))
    shuffled = torch.Generator().manual_seed(0)

    def forward_backward(index):
        optimizer.zero_grad(set_to_none=False)            # the last batch has the graph's gradients
        F.cross_entropy(classifier(train_x[index]), train_y[index]).backward()
        return {}

    step = captured(forward_backward, argparse.Namespace(device=train_x.device, eager=eager))
    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=shuffled).to(train_x.device)
        for index in order.split(1000):
            (step if len(index) == 1000 else forward_backward)(index)
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return 100 * (classifier(test_x).argmax(1) == test_y).float().mean().item()


METRICS = {"linear": linear_accuracy, "knn5": partial(knn_accuracy, k=5),
           "knn_cosine": partial(knn_accuracy, k=200, temperature=0.1)}


def labelled_images(args, split):
    """(images, labels) to learn from, and to be tested on: the test split's or, with "val", a tenth
    of the training images, held out. None, with a printed line, without test images, or where there
    is but one class, which any encoder tells."""
    train = load_images(args.dataset, args.data_dir, "train")
    if not train[1].any():
        show(f"not evaluated: --data-dir {args.data_dir} has one class alone")
        return None
    if split == "val":
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(1))
        held_out, kept = order.tensor_split([max(1, len(order) // 10)])
        return [x[kept] for x in train], [x[held_out] for x in train]
    if has_test(args):
        return train, load_images(args.dataset, args.data_dir, "test")
    return show(f"not evaluated: --data-dir {args.data_dir} has no test/<class>/*")


def evaluate(encoder, args, encode=None, metrics=METRICS, split="test", untrained=False):
    """Accuracies (%) {metric: value} of the encoder's frozen features, their split, and "data", a
    checksum of the images and labels; None where there is nothing to tell.

    Probe and kNN have the labels of all training images, whatever --subset. `untrained`: with an
    untrained encoder's accuracies, as in eval.json.
    """
    parts, data = labelled_images(args, split), []
    if parts is None:
        return None
    for images, labels in parts:
        with autocast(args):
            data += [extract_features(encoder, images, encode), labels.to(args.device)]
    options = {"linear": {"eager": args.eager}}
    result = {metric: METRICS[metric](*data, **options.get(metric, {})) for metric in metrics}
    result |= {"split": split, "data": checksum(*parts[0], *parts[1])}
    if untrained:
        torch.manual_seed(args.seed)
        floor = evaluate(type(encoder)(args.width).to(args.device), args, split=split)
        result["untrained"] = {metric: floor[metric] for metric in METRICS}
    return result


# --- One table over runs and EBMs ------------------------------------------------------------


def evaluate_run(path, flags):
    """[(config, accuracies)] of a run: from its eval.json where `answers` says so, else computed.

    The config says where the run is, how far, and what --precision came to, if that is known.
    """
    with reading(path / "config.json") as config:
        args, epochs = settings(config, flags), config["epochs"]
        shown = {**config, "run_dir": str(path),
                 "precision": config.get("computed_in") or config["precision"]}
    if (path / "eval.json").exists() and flags.split == "test":
        with reading(path / "eval.json") as result:
            describe(result)
        if answers(path, result, args, flags.data_dir):
            return [(shown, result)]
    if not (path / "checkpoint.pt").exists():
        raise UserError(f"{path}: no checkpoint.pt, and no eval.json known to be of --data-dir "
                        f"{args.data_dir}, --split {flags.split}; name what it is of")
    same_images(path, config, args)
    with reading(path / "checkpoint.pt") as saved:
        show(f"evaluating {path}, epoch {saved['done']}", passing=True)
        encoder = load_encoder(saved["model"], args.width)
        if saved["done"] < epochs:
            shown["epochs"] = f"{saved['done']} of {epochs}"
    return [(shown, evaluate(encoder.to(args.device), args, split=flags.split, untrained=True))]


def load_encoder(model, width):
    """The encoder of a method's state dict."""
    encoder = Encoder(width)
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in model.items()
                             if name.startswith("encoder.")})
    return encoder


def answers(path, result, args, named):
    """Whether the accuracies of a run's eval.json are of the data that args name; where that cannot
    be known, whether no data was `named` by the user."""
    gone = not named and not Path(args.data_dir).is_dir()
    if gone or "data" not in result or not has_test(args):
        return not named
    try:
        return data_checksum(args) == result["data"]
    except UserError as error:
        if named:
            raise
        show(f"{path}: as in its eval.json, not compared with the data ({error})")
        return True


def evaluate_ebm(path, flags):
    """Yield config and accuracies of an EBM's discriminator, for its last stage and for all."""
    with reading(path) as saved:
        config = {**saved["config"], "script": "ebm", "run_dir": str(path)}
        args = settings(config, flags)
    images = same_images(path, config, args)
    networks = {args.ebm_iters: load_ebm(path, flags.device)}
    if flags.untrained and args.ebm_iters:
        args.ebm_iters = 0
        torch.manual_seed(seed_of(args.seed))
        networks[0] = fix_spectral_norm(ebm_networks(args)["d"])
        standardise_features(networks[0], images, args)
    for iters, network in networks.items():
        for layers in ["last", "all"]:
            show(f"evaluating {path}, {iters} iterations, {layers}", passing=True)
            encode = partial(network.features, layers=layers)
            yield ({**config, "ebm_iters": iters, "layers": layers},
                   evaluate(network, args, encode, split=flags.split))


def settings(config, flags):
    """The flags of a run or an EBM, evaluated here."""
    return argparse.Namespace(**{**config, "device": flags.device, "eager": flags.eager,
                                 "data_dir": flags.data_dir or config["data_dir"]})


def same_images(path, config, args):
    """The training images, if they are still those of the run or the EBM at `path`."""
    images = training_images(args)
    same_config(path, config, {"images": checksum(images)})
    return images


def kept_rows(path):
    """[(config, accuracies)] of a file that --keep wrote."""
    with naming(path, "not a file that --keep wrote", "name another"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line["config"], line["result"]) for line in lines if line["result"]]


def keep(path, rows):
    """Add the rows to a file, one a line, each with the log of its run or EBM."""
    for config, result in rows:
        made = Path(config["run_dir"])
        log = (made.with_suffix(".ebm") if made.suffix == ".pt" else made) / "log.jsonl"
        log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        append(path, {"config": config, "result": result, "log": log})


UNSHOWN = NOT_IDENTITY | {"script", "seed", "f", "version"}             # a seed has an EBM, f


def labels(rows):
    """A label for each of [(config, accuracies)], of flags that not all share, and the others."""
    configs = [{**config, "data": result.get("data", "unknown")} for config, result in rows]
    flags = {flag: value for config in configs for flag, value in config.items()}
    shared = {flag: value for flag, value in flags.items()
              if all(config.get(flag, value) == value for config in configs)}
    return [" ".join([config["script"], *(f"{flag}={value}" for flag, value in config.items()
                                          if flag not in shared.keys() | UNSHOWN)])
            for config in configs], shared


def once(rows):
    """The rows, each seed of a label once, and a line on each that had another result."""
    kept, problems = {}, []
    for label, (config, result) in zip(labels(rows)[0], rows):
        first, same = kept.setdefault((label, config.get("seed")), (config, result))
        both = f"{first.get('run_dir')} and {config.get('run_dir')}"
        if any(result[metric] != same[metric] for metric in METRICS):
            problems.append(f"{both}: two results of one seed, the first counts; name one")
        elif result is not same:
            show(f"{both}: the same run, counted once")
    return list(kept.values()), problems


def pooled(groups, metric):
    """Standard deviation of the results {label: {seed: accuracies}} about a sum of an effect of the
    row and one of the seed, fitted by least squares; and its degrees of freedom."""
    places = [(label, seed) for label, seeds in groups.items() for seed in seeds]
    values = np.array([groups[label][seed][metric] for label, seed in places])
    effects = sorted({effect for place in places for effect in place}, key=str)
    design = np.array([[effect in place for effect in effects] for place in places], float)
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(values) - rank
    return (np.square(values - design @ fitted).sum() / max(freedom, 1)) ** 0.5, int(freedom)


def studentized_range(rows, freedom):
    """Its 95 % quantile, for so many rows (Tukey's, by simulation, good to 1 %)."""
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(100000, rows, generator=g), torch.randn(100000, freedom, generator=g)
    return ((x.amax(1) - x.amin(1)) / scale.square().mean(1).sqrt()).quantile(0.95).item()


def comparable(rows):
    """{label: {seed: accuracies}} of the rows whose difference to the first means something: on the
    same data, runs or EBMs as it is; and of those among them over which an error is pooled."""
    block, alike, (first, result) = {}, {}, rows[0]
    kind, epochs = (first["script"] == "ebm", result.get("data")), first.get("epochs")
    for label, (config, result) in zip(labels(rows)[0], rows):
        if (config["script"] == "ebm", result.get("data")) == kind:
            seeds = block.setdefault(label, {})
            seeds.setdefault(config.get("seed"), result)
            if config.get("epochs") == epochs:
                alike[label] = seeds
    return block, alike if pooled(alike, "linear")[1] > 1 else block


def table(rows, untrained, split):
    """Markdown of [(config, accuracies)]: a line for each setting, over its seeds, and one of its
    differences, paired by seed, to the first setting, with their pooled error, where it is known.
    """
    groups, (names, shared), (block, alike) = {}, labels(rows), comparable(rows)
    for label, (config, result) in zip(names, rows):
        groups.setdefault(label, {})[config.get("seed")] = result
    first = next(iter(groups.values()))
    deviation = {metric: pooled(alike, metric) for metric in METRICS}
    freedom = deviation["linear"][1] if deviation["linear"][1] > 1 else 0      # from 1 none is told
    least = studentized_range(len(block), freedom) if freedom else math.inf

    def line(label, results):
        values = [[result[metric] for result in results] for metric in METRICS]
        cells = [f"{mean(x):.2f}" + (f" ± {stdev(x):.2f}" if len(x) > 1 else "") for x in values]
        return "| " + " | ".join([label, *cells, str(len(results))]) + " |"

    def differences(seeds):
        paired, cells = [seed for seed in seeds if seed in first], []
        for metric, (sd, _) in deviation.items():
            value = mean(seeds[seed][metric] - first[seed][metric] for seed in paired)
            beyond = "*" if abs(value) > least * sd / len(paired) ** 0.5 else ""
            cells.append(f"{value:+.2f} ± {sd * (2 / len(paired)) ** 0.5:.2f}{beyond}")
        return "| " + " | ".join(["less the first", *cells, str(len(paired))]) + " |"

    lines = ["| run | linear | 5-NN | cosine kNN | n |", "|---|---|---|---|---|"]
    for label, seeds in groups.items():
        lines.append(line(label, seeds.values()))
        if freedom and label in block and seeds is not first and seeds.keys() & first.keys():
            lines.append(differences(seeds))
        if untrained and "untrained" in next(iter(seeds.values())):
            lines.append(line(f"{label}, untrained encoder",
                              [result["untrained"] for result in seeds.values()]))
    lines += ["", f"Accuracy in %, {split} split. Flags in common: " + ", ".join(
        f"{flag}={value}" for flag, value in shared.items()
        if flag == "script" or flag not in UNSHOWN | {"images", "data"}
        and all(flag in config for config, _ in rows))]
    if freedom:
        told = ", ".join(f"{least * sd / 3 ** 0.5:.2f}" for sd, _ in deviation.values())
        lines.append(f"Standard errors pooled over {len(alike)} rows and their seeds, {freedom} "
                     "degrees of freedom. * told apart in its column with all pairs of "
                     f"{len(block)} rows in view (95 %), at three shared seeds from {told} on.")
    return "\n".join(lines)


def as_path(text):
    return Path(os.path.expanduser(text))                 # the shell leaves --keep=~/rows.jsonl


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("paths", nargs="+", type=as_path, help="run directories, EBMs, files that --keep wrote")
    add("--keep", type=as_path, help="a file FILE.jsonl for the rows and their logs")
    add("--split", choices=["test", "val"], default="test",
        help="val: a tenth of the training images, held out from the probe, for choosing flags")
    add("--untrained", action="store_true", help="a line for the untrained encoder of a run too")
    add("--data-dir", type=os.path.expanduser,
        help="where the images are now; None: where they were, if not gone")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--eager", action="store_true", help="launch each operation of the probe's step by itself")
    args = parser.parse_args()
    prepare_device(args)
    if world_size() > 1:
        raise UserError("linear_eval.py: computes on one device; start it without torchrun")
    if missing := [path for path in args.paths if not path.exists() and path.suffix != ".new"]:
        raise UserError(f"{missing[0]}: there is no such file; name runs, EBMs or .jsonl files")
    if args.keep and args.keep.suffix != ".jsonl":
        raise UserError(f"--keep {args.keep}: name a file that ends in .jsonl")
    there = kept_rows(args.keep) if args.keep and args.keep.exists() else []
    rows, made_here, problems, places = [], [], [], {}
    for path in args.paths:
        places.setdefault(path.resolve(), path)           # a link to it is the same run
    for path in places.values():
        if path.suffix == ".jsonl":
            rows += kept_rows(path)
            continue
        made = {file.name for file in path.glob("*")} & {"eval.json", "checkpoint.pt"}
        if path.suffix == ".ebm" or not (made or path.suffix == ".pt"):
            show(f"{path}: left out, no EBM, no run to evaluate", passing=path.suffix == ".ebm")
            continue
        try:
            evaluated = (evaluate_run if made else evaluate_ebm)(path, args)
            made_here += (found := [row for row in evaluated if row[1]])
            rows += found
        except (UserError, OSError) as error:             # the others' work is not lost
            problems.append(str(error))
    show("", passing=True)
    if other := {result.get("split", "test") for _, result in rows} - {args.split}:
        raise UserError(f"--split {args.split}: there are rows of the {min(other)} split")
    rows, doubled = once(rows)
    problems += doubled
    if rows:
        print(table(rows, args.untrained, args.split))
    if args.keep:
        keep(args.keep, [row for row in made_here if row not in there])
    if problems or not rows:
        raise UserError("; ".join(problems) or "nothing to evaluate; name runs, as in runs/*")


if __name__ == "__main__":
    launch(main)
