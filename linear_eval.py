"""Linear and kNN accuracy of frozen features, for one or many runs, as one markdown table.

    python linear_eval.py runs/*                        # every run, finished or not, and EBM
    python linear_eval.py runs/byol_* --untrained       # and the floor, an untrained encoder
    python linear_eval.py runs/ebm-*.pt                 # the features of an EBM's discriminator

The protocol is the base code's: features once, in evaluation mode, of the last epoch's encoder; the
probe learns from the labels of all training images, whatever --subset. Runs that differ in their
seed, or the file of their EBM, alone share a row: mean, standard deviation and number of runs.
"""
import argparse
from pathlib import Path
from statistics import mean, stdev

import torch

from common import (METRICS, NEUTRAL, Encoder, Parser, UserError, beside_untrained, evaluate, fill,
                    launch, load, load_ebm, load_json, save_json, set_up, show)


def evaluate_run(path, flags):
    """A run's config and accuracies: from its eval.json where that has them, else computed."""
    config = load_json(path / "config.json")
    args = argparse.Namespace(**{**config, "device": flags.device})
    args.data_dir = flags.data_dir or args.data_dir
    done = path / "eval.json"
    if done.exists() and flags.split == "test":
        return config, load_json(done)
    saved = load(path / "checkpoint.pt")
    show(f"evaluating {path}, epoch {saved['done']}", last=False)
    encoder = Encoder(args.width)
    fill(encoder, {name.removeprefix("encoder."): value for name, value in saved["model"].items()
                   if name.startswith("encoder.")}, path)
    result = beside_untrained(encoder.to(args.device), args, flags.split)
    if result and saved["done"] == args.epochs and flags.split == "test":
        save_json(done, result)
    return {**config, "epochs": saved["done"]}, result


def evaluate_ebm(path, flags):
    """Config and accuracies of an EBM's discriminator, for its last stage and for all of them."""
    network, config = load_ebm(path, flags.device), load(path)["config"]
    args = argparse.Namespace(**{**config, "device": flags.device})
    args.data_dir = flags.data_dir or args.data_dir
    for layers in ["last", "all"]:
        show(f"evaluating {path}, {layers}", last=False)
        result = evaluate(network, args, lambda x: network.features(x, layers), split=flags.split)
        yield {"script": str(path), "layers": layers}, result


def table(rows, untrained, split):
    """Markdown of [(config, accuracies)]: a line for each setting, over its seeds."""
    configs = [config for config, _ in rows]
    flags = dict.fromkeys(flag for config in configs for flag in config)       # in their order
    values = {flag: [config[flag] for config in configs if flag in config] for flag in flags}
    shared = {flag: v[0] for flag, v in values.items() if all(value == v[0] for value in v)}
    settings = {}
    for config, result in rows:
        differing = [f"{flag}={value}" for flag, value in config.items()
                     if flag not in shared.keys() | NEUTRAL | {"script", "seed", "ebm"}]
        settings.setdefault(" ".join([config["script"], *differing]), []).append(result)

    def line(label, results):
        cells = []
        for metric in METRICS:
            values = [result[metric] for result in results]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        return "| " + " | ".join([label, *cells, str(len(results))]) + " |"

    lines = ["| run | linear | 5-NN | cosine kNN | n |", "|---|---|---|---|---|"]
    for label, results in settings.items():
        lines.append(line(label, results))
        if untrained and "untrained" in results[0]:
            lines.append(line(f"{label}, untrained encoder", [r["untrained"] for r in results]))
    caption = ", ".join(f"{flag}={value}" for flag, value in shared.items()
                        if flag not in {"seed", "ebm"})
    return "\n".join([*lines, "", f"Accuracy in %, {split} split. All, where they have the flag: "
                      f"{caption}"])


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, files of EBMs")
    parser.add_argument("--split", choices=["test", "val"], default="test",
                        help="val: a tenth of the training images, held out from the probe, for "
                             "choosing flags")
    parser.add_argument("--untrained", action="store_true",
                        help="a line for the untrained encoder of a run too")
    parser.add_argument("--data-dir", help="where the images are now (default: where they were)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="torch device")
    args = parser.parse_args()
    set_up(args)
    rows = []
    for path in dict.fromkeys(args.paths):
        if path.suffix == ".pt":
            rows += evaluate_ebm(path, args)
        elif (path / "checkpoint.pt").exists():
            rows.append(evaluate_run(path, args))
        elif (path / "config.json").exists():
            show(f"{path}: left out, its first epoch is not done")
        elif path.suffix not in {".jsonl", ".png", ".partial", ".lock", ".new"}:  # beside an EBM
            raise UserError(f"{path}: not a run (it has no checkpoint.pt) and not an EBM (.pt)")
    show("", last=False)
    print(table([row for row in rows if row[1]], args.untrained, args.split))


if __name__ == "__main__":
    launch(main)
