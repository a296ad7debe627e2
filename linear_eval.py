"""Linear-probe and kNN accuracy of frozen features, of one or many runs, as a markdown table.

    python linear_eval.py runs/*                    # every run, finished or not, and every EBM
    python linear_eval.py runs/* --untrained        # with the accuracy before training
    python linear_eval.py RUN --dataset cifar100    # its encoder on other labelled images
    python linear_eval.py FILE.jsonl                # results of other runs, kept in a file

The protocol is that of the reference implementation: the features of the last epoch's encoder are
computed once, in evaluation mode; the probe learns from all labelled training images, whatever
--subset. Runs that differ only in their seed, and its EBM, share a row: mean and standard deviation
over seeds. Below it stands the difference to the first row, paired by seed. Its standard error is
pooled over the rows with as many epochs as the first row, since runs that differ only in epochs are
too alike; a run that was repeated, with equal accuracies, counts once in it. EBMs have a table of
their own, without differences: rows of one EBM are not independent. Each results file counts as a
machine, with seeds and a first row of its own.
"""
import argparse
import json
import math
import os
from collections import Counter
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (DATASETS, MEASURED, NOT_IDENTITY, UserError, autocast, code_checksum,
                    data_checksum, ebm_networks, fix_spectral_norm, has_test, launch, load,
                    load_ebm, load_encoder, load_images, prepare_device, seed_of, show,
                    standardise_features, training_images, without_effect)

# --- Frozen features and their accuracy ------------------------------------------------------


@torch.no_grad()
def extract_features(encoder, images, encode=None):
    """Features (N, C) in fp32, on the encoder's device, of images (N, 3, H, W), uint8 or in [0, 1].

    Every module is in evaluation mode meanwhile, and then in its own mode again. `encode` is called
    in place of the encoder, if given.
    """
    modes, device = {m: m.training for m in encoder.modules()}, next(encoder.parameters()).device
    scale = 255 if images.dtype == torch.uint8 else 1
    if images.min() < 0 or images.max() > scale:
        raise UserError(f"images of {images.dtype} have to be in [0, 1], or uint8")
    encoder.eval()
    try:
        features = [(encode or encoder)(x.to(device) / scale).float() for x in images.split(500)]
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(features)


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature=None):
    """Accuracy (%) of k nearest neighbours, with features (N, C) and labels (N,).

    By Euclidean distance and majority (as in the reference implementation); with a temperature, by
    cosine similarity s, with votes weighted by exp(s / temperature) (arXiv:1805.01978). That is
    None if k is over a tenth of the training images, as the most frequent class would win.
    """
    if temperature and k > len(train_x) / 10:
        return None
    k, classes, correct = min(k, len(train_x)), int(train_y.max()) + 1, []
    if temperature:
        train_x, test_x = F.normalize(train_x), F.normalize(test_x)
    for x, y in zip(test_x.split(500), test_y.split(500)):
        similarity = x @ train_x.T if temperature else -torch.cdist(x, train_x)
        similarity, index = similarity.topk(k)                                     # (500, k)
        weight = (similarity / temperature).exp() if temperature else torch.ones_like(similarity)
        votes = weight.new_zeros(len(x), classes).scatter_add(1, train_y[index], weight)
        correct.append(votes.argmax(1) == y)
    return 100 * torch.cat(correct).sum().item() / len(test_x)


def linear_accuracy(train_x, train_y, test_x, test_y, epochs=500):
    """Accuracy (%) of a linear classifier after its last epoch: Adam, batches of 1000."""
    classifier = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=5e-6, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-6 / 1e-2) ** (1 / epochs))
    shuffled = torch.Generator().manual_seed(0)

    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=shuffled).to(train_x.device)
        for index in order.split(1000):
            optimizer.zero_grad()
            F.cross_entropy(classifier(train_x[index]), train_y[index]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return 100 * (classifier(test_x).argmax(1) == test_y).float().mean().item()


METRICS = {"linear": linear_accuracy, "knn5": partial(knn_accuracy, k=5),
           "knn_cosine": partial(knn_accuracy, k=200, temperature=0.1)}


def labelled_images(args, split):
    """(images, labels) to learn from and to test on; None, with a printed line, without test
    images or with only one class. "val" tests on a tenth of the training images, held out."""
    images, labels = load_images(args.dataset, args.data_dir, "train")
    if not labels.any() or (split == "test" and not has_test(args)):
        show(f"not evaluated: {args.data_dir} has "
             + ("no test images" if labels.any() else "only one class"))
        return None
    if split == "test":
        return (images, labels), load_images(args.dataset, args.data_dir, "test")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    held_out, kept = order.tensor_split([max(1, len(order) // 10)])
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def evaluate(encoder, args, encode=None, metrics=METRICS, split="test"):
    """Accuracies (%) {metric: value or None} of the encoder's frozen features.

    With them come the split, and checksums of the labelled data and of this file's code. Returns
    None if there is nothing to evaluate.
    """
    parts, data = labelled_images(args, split), []
    if parts is None:
        return None
    for images, labels in parts:
        with autocast(args):
            data += [extract_features(encoder, images, encode), labels.to(args.device)]
    result = {metric: METRICS[metric](*data) for metric in metrics}
    return {**result, "split": split, "data": data_checksum(args), "evaluation": evaluate.code}


evaluate.code = code_checksum([Path(__file__).resolve()])  # at import, as it may be edited

# --- A table of runs, and one of EBMs --------------------------------------------------------


def make_args(config, flags):
    """The flags of a run or an EBM with the device and the data of the command line; for the row's
    label, {"measured_on": data} if they are not the run's own."""
    dataset, own = flags.dataset or config["dataset"], not (flags.data_dir or flags.dataset)
    data_dir = flags.data_dir or ("data" if flags.dataset else config["data_dir"])
    args = argparse.Namespace(**{**config, "device": flags.device, "dataset": dataset,
                                 "data_dir": data_dir})
    return args, {} if own else {"measured_on": data_dir if dataset == "folder" else dataset}


def evaluate_run(path, flags):
    """[(config, accuracies)] of a run: those in its eval.json, or those of its last checkpoint."""
    config = {**load(path / "config.json", "script", "epochs", "seed"), "run_dir": str(path)}
    args, measured_on = make_args(config, flags)
    result = load(path / "eval.json") if (path / "eval.json").exists() else {}
    split = result.get("split", "test")                   # older ones do not say
    if not measured_on and split == flags.split and METRICS.keys() <= result.keys():
        if result.get("evaluation") != evaluate.code:
            show(f"{path}: measured by another linear_eval.py; with --data-dir it is measured anew")
        return [(config, result)]
    encoder, saved, _ = load_encoder(path)
    show(f"evaluating {path}, epoch {saved['done']}", passing=True)
    if saved["done"] < config["epochs"]:
        config["epochs"] = f"{saved['done']} of {config['epochs']}"
    result = evaluate(encoder.to(args.device), args, split=flags.split)
    if result and not measured_on and result["data"] != config.get("data", result["data"]):
        show(f"{path}: its images or labels are no longer those of its training")
    untrained = saved["log"][1]
    if result and all(untrained.get(key) == result[key] for key in MEASURED):
        result["untrained"] = untrained
    return [(config | measured_on, result)]


def evaluate_ebm(path, flags):
    """[(config, accuracies)] of an EBM's discriminator, for its last stage and for all stages; with
    --untrained, of an untrained one too."""
    config = {**load(path, "config", "d")["config"], "script": "ebm", "run_dir": str(path)}
    (args, measured_on), rows = make_args(config, flags), []
    networks = {args.ebm_iters: load_ebm(path, args.device)}
    if flags.untrained and args.ebm_iters:
        torch.manual_seed(seed_of(args.seed))
        networks[0] = fix_spectral_norm(ebm_networks(args)["d"])
        args.ebm_iters = 0
        own = {} if flags.dataset else {"data_dir": args.data_dir}
        images = training_images(argparse.Namespace(**{**config, **own}))
        standardise_features(networks[0], images, args)
    for iters, network in networks.items():
        for layers in ["last", "all"]:
            show(f"evaluating {path}, {iters} iterations, {layers}", passing=True)
            encode = partial(network.features, layers=layers)
            result = evaluate(network, args, encode, split=flags.split)
            rows.append(({**config, "ebm_iters": iters, "layers": layers, **measured_on}, result))
    return rows


def read_rows(path, flags=None):
    """[(config, accuracies)] of a results file: a JSON object with both on each line."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [(row["config"], row["result"] and {**dict.fromkeys(METRICS), **row["result"]})
                for row in rows]
        splits = {result.get("split", "test") for _, result in rows if result}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a results file ({error})") from error
    if flags and (flags.data_dir or flags.dataset or splits - {flags.split}):
        raise UserError(f"{path}: its results are of their own data and split; name runs instead")
    return rows


HIDDEN = NOT_IDENTITY | {"script", "seed", "f"}
OF_OLD = {"version", "eager", "compile", "computed_in"}   # in results that have no code


def row_labels(rows, any_code=False):
    """A label for each of [(config, accuracies)], made of the flags that differ; the other flags.

    A flag that a config lacks counts as its default. Flags without effect are left out, code and
    data are not.
    """
    defaults, codes, configs = {}, {}, []
    commons = {config.get("common_code") for config, _ in rows}
    for config, _ in rows:
        defaults[config["script"]] = {**defaults.get(config["script"], {}),
                                      **config.get("defaults", {})}
        codes.setdefault(config["script"], set()).add(config.get("code"))
    for config, result in rows:
        shown = {**defaults[config["script"]], **config}
        unused = HIDDEN | without_effect(argparse.Namespace(**shown))
        if "code" not in config:
            unused |= OF_OLD
        shown = {flag: value for flag, value in shown.items() if flag not in unused}
        shown |= {"data": result.get("data"), "evaluation": result.get("evaluation")}
        if len(codes[config["script"]]) > 1:
            shown["code"] = config.get("code", "unknown")
        elif len(commons) > 1:                            # one code, but not as another script
            shown["common_code"] = config.get("common_code", "unknown")
        if any_code:
            shown = {flag: value for flag, value in shown.items()
                     if flag not in ("code", "common_code", "f_code")}
        configs.append(shown)
    flags = {flag: value for config in configs for flag, value in config.items()}
    shared = {flag: value for flag, value in flags.items()
              if all(config.get(flag, value) == value for config in configs)}
    return [" ".join([config["script"], *(f"{flag}={value}" for flag, value in shown.items()
                                          if flag not in shared)])
            for (config, _), shown in zip(rows, configs)], shared


def by_seed(rows, names):
    """{label: {(machine, seed): accuracies}}; of two runs with the same label and seed, the first
    counts. Results files of several machines have seeds of their own."""
    groups = {}
    for name, (config, result) in zip(names, rows):
        seeds, seed = groups.setdefault(name, {}), (config.get("machine"), config["seed"])
        if seed in seeds:
            show(f"{config['run_dir']}: left out, as another run has its settings and seed")
        seeds.setdefault(seed, result)
    return groups


def pooled(groups, metric):
    """Residual standard deviation, and its degrees of freedom, of the results {label: {(machine,
    seed): accuracies}} in a model with an effect of the row and one of the seed, by least squares.
    """
    sizes, once = Counter(machine for seeds in groups.values() for machine, _ in seeds), {}
    for label, seeds in sorted(groups.items(), key=lambda item: -sizes[next(iter(item[1]))[0]]):
        for seed, result in seeds.items():                # repeated, it counts in the largest file
            once.setdefault((seed[1], *map(result.get, METRICS)), (label, seed))
    places = [(label, seed) for label, seed in once.values()
              if groups[label][seed][metric] is not None]
    values = np.array([groups[label][seed][metric] for label, seed in places])
    effects = sorted({effect for place in places for effect in place}, key=str)
    design = np.array([[effect in place for effect in effects] for place in places], float)
    if not len(values):
        return 0.0, 0
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(values) - rank
    return (np.square(values - design @ fitted).sum() / max(freedom, 1)) ** 0.5, int(freedom)


@cache
def studentized_range(rows, freedom):
    """95 % quantile of Tukey's studentized range, by simulation, accurate to 1 %: the largest range
    of several independent groups, of which `rows` has the sizes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100000, sum(rows), generator=g)
    scale = torch.randn(100000, freedom, generator=g)
    ranges = torch.stack([group.amax(1) - group.amin(1) for group in x.split(rows, 1)])
    return (ranges.amax(0) / scale.square().mean(1).sqrt()).quantile(0.95).item()


def table(rows, untrained, split, any_code=False):
    """Markdown of [(config, accuracies)]: a line for each setting, over its seeds, and one for its
    difference to the first setting, of the same machine, paired by seed, with the pooled error."""
    names, shared = row_labels(rows, any_code)
    groups, first, comparable, alike = by_seed(rows, names), {}, {}, {}
    for name, (config, result) in zip(names, rows):
        measured = result.get("data"), result.get("evaluation")
        baseline, kind, epochs = first.setdefault(
            config.get("machine"), (groups[name], measured, config.get("epochs")))
        if measured == kind:
            comparable[name] = baseline
            if config.get("epochs") == epochs:
                alike[name] = groups[name]
    error = {metric: pooled(alike, metric) for metric in METRICS}
    ebms = rows[0][0]["script"] == "ebm"                  # their rows are not independent
    freedom = 0 if ebms else error["linear"][1]
    families = Counter(next(iter(groups[name]))[0] for name in comparable).values()
    critical = {metric: studentized_range((*families,), degrees) if degrees > 1 else math.inf
                for metric, (_, degrees) in error.items()}

    def line(label, results):
        cells = []
        for metric in METRICS:
            values = [result.get(metric) for result in results]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 and None not in values else ""
            cells.append("-" if None in values else f"{mean(values):.2f}{spread}")
        return "| " + " | ".join([label, *cells, str(len(results))]) + " |"

    def difference(seeds, baseline):
        paired, cells = seeds.keys() & baseline.keys(), []
        for metric, (sd, degrees) in error.items():
            pairs = [(seeds[seed][metric], baseline[seed][metric]) for seed in paired]
            if degrees < 2 or any(None in pair for pair in pairs):
                cells.append("-")
                continue
            value = mean(a - b for a, b in pairs)
            star = "*" if abs(value) > critical[metric] * sd / len(paired) ** 0.5 else ""
            cells.append(f"{value:+.2f} ± {sd * (2 / len(paired)) ** 0.5:.2f}{star}")
        machine, _ = next(iter(seeds))
        label = "difference to the first row" + (f" of {machine}" if machine else "")
        return "| " + " | ".join([label, *cells, str(len(paired))]) + " |"

    def these(labels):
        others = [label for label in groups if label not in labels]
        return f"{len(labels)} settings" + (f" (without {'; '.join(others)})" if others else "")

    lines = [f"| run | {' | '.join(METRICS)} | seeds |", "|---" * (len(METRICS) + 2) + "|"]
    for label, seeds in groups.items():
        lines.append(line(label, list(seeds.values())))
        baseline = comparable.get(label, {})
        if freedom > 1 and seeds is not baseline and seeds.keys() & baseline.keys():
            lines.append(difference(seeds, baseline))
        if untrained and all(result.get("untrained") for result in seeds.values()):
            lines.append(line(f"{label}, untrained encoder",
                              [result["untrained"] for result in seeds.values()]))
    lines += ["", f"Accuracy in %, {split} split. Flags in common: " + ", ".join(
        f"{flag}={value}" for flag, value in shared.items() if flag not in ("images", "data"))]
    if any(result["knn_cosine"] is None for _, result in rows):
        lines.append("cosine kNN is -: its 200 neighbours are over a tenth of the training images.")
    if freedom > 1:
        sd = ", ".join(f"{sd:.2f}" for sd, _ in error.values())
        degrees = [str(degrees) for _, degrees in error.values()]
        degrees = ", ".join(degrees if len({*degrees}) > 1 else degrees[:1])
        lines.append(f"± of a difference: from the standard deviations {sd}, pooled over "
                     f"{these(alike)} and their seeds, {degrees} degrees of freedom. * p < 0.05, "
                     f"corrected for all pairs of {these(comparable)}"
                     f"{', each within a machine' * (len(families) > 1)} (Tukey's HSD).")
    elif ebms:
        lines.append("No differences: rows of one EBM are not independent.")
    elif len(groups) > 1:
        lines.append(f"No differences: their error would have {freedom} degrees of freedom, and "
                     "needs 2. Add a seed, or a setting with as many epochs.")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="run directories, EBMs (.pt), results files (.jsonl)")
    add("--split", choices=["test", "val"], default="test",
        help="val = a tenth of the training images, held out from the probe, to choose flags by")
    add("--untrained", action="store_true", help="report the untrained encoder, too")
    add("--dataset", choices=DATASETS,
        help="evaluate on this labelled data set, in place of the run's own")
    add("--data-dir", type=os.path.expanduser,
        help="directory of the labelled data, to evaluate anew on what is there")
    add("--any-code", action="store_true", help="let runs of different code share a row")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args()
    prepare_device(args)
    rows, problems, paths = [], [], dict.fromkeys(args.paths)        # each once
    stems = [path.stem for path in paths if path.suffix == ".jsonl"]
    for path in paths:
        try:
            path, machine = path.expanduser(), "here"
            if path.suffix == ".jsonl":
                machine = path.stem if stems.count(path.stem) == 1 else str(path)
                more = read_rows(path, args)
            elif path.suffix == ".pt":
                more = evaluate_ebm(path, args)
            else:
                more = evaluate_run(path, args) if path.suffix != ".ebm" else []
            rows += [(config | ({"machine": machine} if stems and len(paths) > 1 else {}), result)
                     for config, result in more]
        except (UserError, OSError, RuntimeError) as error:   # the others are still evaluated
            problems.append(str(error))
        except (KeyError, AttributeError) as error:
            problems.append(f"{path}: not a run or an EBM of this code ({error})")
    rows = [(config, result) for config, result in rows if result]
    show("", passing=True)
    for of_ebms in (False, True):
        some = [row for row in rows if (row[0]["script"] == "ebm") == of_ebms]
        if some:
            print(table(some, args.untrained, args.split, args.any_code))
    if problems or not rows:
        raise UserError("; ".join(problems) or "nothing to evaluate; name runs, as in runs/*")


if __name__ == "__main__":
    launch(main)
