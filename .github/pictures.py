"""Pictures and figures of README.md and RESULTS.md: python .github/pictures.py COMMAND ...

    method                      method.svg: puts images from views.png into the drawing
    curves                      curves.svg: kNN accuracy over epochs and minutes, from epyc.jsonl
    scatter FILE.jsonl ...      scatter.svg: BYOL's difference to the baseline, over the accuracy of
                                its third view's features; those of other files hollow
    views EBM.pt DIR            views.png: the views of a test image of every class in DIR/test
    samples LABEL=FOLDER ...    samples.png: training images, and samples from .ebm directories
    minutes FILE.jsonl ...      prints the minutes of training of each setting
    chain RUN EBM.pt DIR        prints the accuracy of RUN's encoder on Langevin samples of DIR/test
    harder DIR RUN ...          prints the accuracy of encoders with few labels, and under noise
    keep FILE.jsonl RUN ...     adds finished runs, or EBMs (.pt), to a results file

A results file has the runs of one machine, {"config", "result", "log"} on each line.
"""
import base64
import io
import json
import math
import re
import sys
from argparse import Namespace
from collections import defaultdict
from html import escape
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import (UserError, augment, autocast, check_config, checksum, data_checksum, langevin,
                    launch, load_ebm, load_encoder, load_images, mix_with_noise, save,
                    training_images)
from linear_eval import (by_seed, evaluate_ebm, evaluate_run, extract_features, knn_accuracy,
                         linear_accuracy, pooled, read_rows, row_labels)

BLUE, RED, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"

# --- Results files ---------------------------------------------------------------------------


def read(path):
    """The lines of a results file, each a dict."""
    read_rows(Path(path))                                   # UserError if it is none
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def keep(file, *runs):
    """Add runs to a results file, except for those whose config and result it has."""
    file, device = Path(file), "cuda" if torch.cuda.is_available() else "cpu"
    rows = read(file) if file.exists() else []
    flags = Namespace(device=device, dataset=None, data_dir=None, split="test", untrained=False)
    for path in map(Path, runs):
        is_ebm = path.suffix == ".pt"
        if not is_ebm and not (path / "eval.json").exists():
            raise UserError(f"{path}: not a finished run or an EBM (.pt)")
        log = (path.with_suffix(".ebm") if is_ebm else path) / "log.jsonl"
        log = [*map(json.loads, log.read_text().splitlines())] if log.exists() else []
        for config, result in (evaluate_ebm if is_ebm else evaluate_run)(path, flags):
            if all((config, result) != (row["config"], row["result"]) for row in rows):
                rows.append({"config": config, "result": result, "log": log})
        save(file, rows)


def minutes(*files):
    """Print the minutes of training: the fastest epoch's seconds, as other jobs may have run
    beside, times the number of epochs; the median over seeds."""
    for file in files:
        rows, taken = [row for row in read(file) if "epochs" in row["config"]], defaultdict(list)
        names, _ = row_labels([(row["config"], row["result"] or {}) for row in rows])
        for name, row in zip(names, rows):
            config = row["config"]
            images = (config["subset"] or math.nan) * (1 + (config.get("use") == "dataset"))
            seconds = [at.get("seconds", images / at["images_per_s"])       # older logs lack it
                       for at in row["log"] if "images_per_s" in at]
            if seconds:
                taken[name].append(config["epochs"] * min(seconds) / 60)
        for name, values in taken.items():
            print(f"{Path(file).stem}: {median(values):.1f} minutes, n = {len(values)}: {name}")


# --- Diagrams --------------------------------------------------------------------------------


def text(x, y, words, anchor="middle", color="#222"):
    return (f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">'
            f'{escape(str(words))}</text>')


def line(points, color, width):
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{points}" stroke="{color}" stroke-width="{width}" fill="none"/>'


def write_svg(name, width, height, parts):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="14">')
    white = '<rect width="100%" height="100%" fill="white"/>'
    (HERE / name).write_text("\n".join([head, white, *parts, "</svg>"]) + "\n")


def axes(left, top, width, xs, ys, title):
    """A panel for values xs and ys: its elements, its function from values to their place."""
    def ticks(values):                                      # round numbers around the values
        step = next(step for step in (1, 2, 5, 10, 20, 50) if np.ptp(values) <= 6 * step)
        first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
        return [step * i for i in range(first, max(last, first + 1) + 1)]

    def at(x, y):
        return (left + width * (x - xs[0]) / (xs[-1] - xs[0]),
                top + 260 * (ys[-1] - y) / (ys[-1] - ys[0]))

    xs, ys = ticks(xs), ticks(ys)
    parts = [text(left + width / 2, top + 302, title)]
    for y in ys:
        parts += [line([at(xs[0], y), at(xs[-1], y)], "#ddd", 1),
                  text(left - 8, at(xs[0], y)[1] + 5, y, "end")]
    return parts + [text(at(x, ys[0])[0], top + 280, x) for x in xs], at


CURVES = {                                      # with the minutes of the EBM, noted by hand
    "third augmented view": (BLUE, 0, dict(script="byol_langevin", coeff=1, view="augment")),
    "discriminator features": (RED, 29, dict(script="byol_disc", coeff=1, ebm_iters=4000)),
    "untrained discriminator": (GREEN, 0, dict(script="byol_disc", coeff=1, ebm_iters=0)),
    "BYOL baseline": (PINK, 0, dict(script="byol_disc", coeff=0, epochs=20)),
    "baseline, 30 epochs": (YELLOW, 0, dict(script="byol_disc", coeff=0, epochs=30))}


def curves():
    svg = [text(16, 24, "kNN accuracy (k = 5) in %, seed 0", "start")]
    rows, over_epochs, over_minutes = read(HERE / "results" / "epyc.jsonl"), [], []
    for i, (label, (color, wait, flags)) in enumerate(CURVES.items()):
        row = next(row for row in rows if {"seed": 0, **flags}.items() <= row["config"].items())
        measured = [at for at in row["log"] if "knn5" in at]
        knn = [row["result"]["untrained"]["knn5"], *(at["knn5"] for at in measured)]
        epochs = [0, *(at["epoch"] for at in measured)]
        speed = median(at["images_per_s"] for at in row["log"] if "epoch" in at)
        times = [wait + epoch * row["config"]["subset"] / speed / 60 for epoch in epochs]
        over_epochs.append((color, epochs, knn))
        over_minutes.append((color, [0, *times], [knn[0], *knn]))
        x, y = 40 + 190 * (i % 3), 368 + 24 * (i // 3)
        svg += [line([(x, y), (x + 22, y)], color, 4), text(x + 28, y + 5, label, "start")]
    for left, title, panel in [(40, "epochs", over_epochs),
                               (360, "minutes of one core, EBM included", over_minutes)]:
        xs, ys = (np.concatenate([curve[i] for curve in panel]) for i in (1, 2))
        parts, at = axes(left, 40, 265, xs, ys, title)
        svg += parts + [line(map(at, xs, ys), color, 2.5) for color, xs, ys in panel]
    write_svg("curves.svg", 640, 408, svg)


PAIRED = ("images", "width", "epochs", "schedule", "batch_size", "lr", "tau", "emb")


def name_of(config):
    """The network whose features a row is about, or its run has as third view."""
    if config.get("teacher"):
        return config["teacher"]
    if config.get("coeff") == 0:
        return f"{config['script']} of {config['epochs']} epochs"
    name = "discriminator, " + (f"{config['ebm_iters']:,} iterations" if config["ebm_iters"]
                                else "untrained")
    for flag, usual in dict(ebm_objective="gan", ebm_rotation=0).items():
        name += f", {flag} {config[flag]}" if config.get(flag, usual) != usual else ""
    return name + {"last": ", last stage", "all": ", all stages"}[config["layers"]]


def measure(*files):
    """[(file, third view, linear-probe and kNN accuracy of its features, difference, its error)] of
    BYOL at --coeff 1 in results files, printed. The difference in the linear probe is to the file's
    first row, paired by seed; its error is pooled over the files, both as in linear_eval.py's table
    if each file has the runs of one machine, evaluated alike. Teachers of other seeds than the
    student's are one third view."""
    points, squares, total = [], 0, 0
    for file in files:
        rows = [(row["config"], row["result"]) for row in read(file) if row["result"]]
        labels, _ = row_labels(rows)
        groups, configs = by_seed(rows, labels), {label: row[0] for label, row in zip(labels, rows)}
        first, baseline, own = rows[0][0], groups[labels[0]], defaultdict(list)
        if (first["script"], first.get("coeff")) != ("byol_disc", 0):
            raise UserError(f"{file}: its first row has to be the baseline, byol_disc --coeff 0")
        sd, freedom = pooled({label: groups[label] for label, config in configs.items()
                              if config.get("epochs") == first.get("epochs")}, "linear")
        squares, total = squares + freedom * sd ** 2, total + freedom
        for config, result in rows:
            of = *map(config.get, ["seed", *PAIRED[:2]]),
            if config["script"] == "ebm" or config.get("coeff") == 0:
                own[name_of(config), *of].append(result)
            if config.get("coeff") == 0 and result.get("untrained"):
                own[f"{config['script']} of 0 epochs", *of] = [result["untrained"]]
        found = defaultdict(dict)                           # {third view: {seed: its figures}}
        for label, config in configs.items():
            if config["script"] not in ("byol_disc", "byol_teacher") or config["coeff"] != 1:
                continue
            source, _, shift = name_of(config).partition(", seed ")
            name = source + ", another seed" * bool(shift)
            name += ", of the image itself" * (config.get("disc_input") == "image")
            alike = all(config.get(flag) == first.get(flag) for flag in PAIRED)
            for (machine, seed), result in groups[label].items():
                features = own[source, seed + int(shift or 0), *map(config.get, PAIRED[:2])]
                if (alike and len(features) == 1 and (machine, seed) in baseline
                        and seed not in found[name]):
                    found[name][seed] = (features[0]["linear"], features[0]["knn5"],
                                         result["linear"] - baseline[machine, seed]["linear"])
                else:
                    print(f"{file}: {name}, seed {seed}, is left out: it needs one accuracy of its "
                          f"features (there are {len(features)}), a baseline of its seed and "
                          "flags, and no other run of its third view and seed")
        points += [(file, name, *map(mean, zip(*seeds.values())), len(seeds))
                   for name, seeds in found.items() if seeds]
    if total < 2:
        raise UserError(f"{' '.join(map(str, files))}: errors have {total} degrees of freedom, "
                        "and need 2")
    for i, (*point, n) in enumerate(points):
        points[i] = *point, (2 / n * squares / total) ** 0.5
        print("{}: {}, n = {}: linear {:.1f}, 5-NN {:.1f}, difference {:+.1f} ± {:.1f}".format(
            *point[:2], n, *points[i][2:]))
    return points


def mark(x, y, color, hollow):
    """A circle for a discriminator, a square for a teacher."""
    return (f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" '
            f'rx="{5 * (color == RED)}" stroke="{color}" stroke-width="2" '
            f'fill="{"white" if hollow else color}"/>')


def scatter(file, *others):
    points = sorted(measure(file, *others), key=lambda point: -point[4])    # by difference
    places, names, linear, knn, differences, errors = zip(*points)
    hollow = [place != file for place in places]
    filled = [i for i in range(len(points)) if not hollow[i]]
    if len(filled) < 2:
        raise UserError(f"{file}: has {len(filled)} third views that can be drawn, and needs two")
    colors = [RED if name.startswith("discriminator") else BLUE for name in names]
    ends = *np.add(differences, errors), *np.subtract(differences, errors), 0
    svg = []
    for top, title, xs in [(40, "linear-probe", linear), (390, "kNN (k = 5)", knn)]:
        parts, at = axes(40, top, 620, xs, ends, f"{title} accuracy of the frozen features, %")
        parts.append(text(16, top - 16, "difference to BYOL's baseline, linear probe", "start"))
        known, values = ([numbers[i] for i in filled] for numbers in (xs, differences))
        print(f"correlation with {title} accuracy: {np.corrcoef(known, values)[0, 1]:.2f}")
        slope, start = np.polyfit(known, values, 1)
        parts.append(line([at(x, start + slope * x) for x in (min(known), max(known))], "#aaa", 1))
        for i, (x, y, error) in enumerate(zip(xs, differences, errors)):
            high, low = at(x, y + error), at(x, y - error)
            parts += [line([high, low], colors[i], 2), mark(*at(x, y), colors[i], hollow[i]),
                      text(high[0], high[1] - 4, i + 1)]
        svg += parts
    for i, (place, name) in enumerate(zip(places, names)):  # the key
        y = 736 + 22 * i
        for old, new in [("simclr_disc of", "SimCLR encoder,"), ("byol_disc of", "BYOL encoder,"),
                         (", 0 epochs", ", untrained")]:
            name = name.replace(old, new)
        svg += [mark(80, y - 5, colors[i], hollow[i]), text(60, y, i + 1, "end"),
                text(96, y, name + f" ({Path(place).stem})" * hollow[i], "start")]
    y = 736 + 22 * len(points)
    svg += [line([(48, y - 5), (84, y - 5)], "#aaa", 1), text(96, y, "linear fit to the filled "
                                                              "marks; bars: ± standard error",
                                                              "start")]
    write_svg("scatter.svg", 720, y + 22, svg)


# --- What an encoder tells of other images ----------------------------------------------------


def trained(run, directory):
    """A run's encoder and flags, on the CPU; UserError if the directory has other images."""
    encoder, _, config = load_encoder(Path(run))
    args = Namespace(**{**config, "device": "cpu", "dataset": "folder", "data_dir": directory})
    data = {"images": checksum(training_images(args)), "data": data_checksum(args)}
    check_config(run, config, {**config, **data})
    return encoder, args


def accuracies(*data):
    return f"linear {linear_accuracy(*data):.1f}, 5-NN {knn_accuracy(*data, k=5):.1f}"


def harder(directory, *runs):
    """Print accuracies with few labels, over five draws of them, and of noisy test images."""
    (x, y), (test, test_y) = (load_images("folder", directory, s) for s in ("train", "test"))
    torch.manual_seed(0)
    noisy = (test / 255 + 0.1 * torch.randn(test.shape)).clamp(0, 1)
    for run in runs:
        encoder, args = trained(run, directory)
        with autocast(args):
            x_h, test_h, noisy_h = (extract_features(encoder, i) for i in (x, test, noisy))
        for few in (10, 100):
            torch.manual_seed(0)
            draws = [torch.cat([(y == k).nonzero()[:, 0][torch.randperm(int((y == k).sum()))[:few]]
                                for k in range(int(y.max()) + 1)]) for _ in range(5)]
            values = [linear_accuracy(x_h[i], y[i], test_h, test_y) for i in draws]
            print(f"{run}: {few} labels a class: linear {mean(values):.1f} ± {stdev(values):.1f}")
        print(f"{run}: noisy: {accuracies(x_h, y, noisy_h, test_y)}")


def chain(run, ebm, directory):
    """Print PSNR and accuracies of test images x, noisy ones, and Langevin samples by the deck's
    defaults; the linear probe and kNN have learnt from training images as they are."""
    (encoder, args), f = trained(run, directory), load_ebm(ebm, "cpu")
    (train, train_y), (x, y) = (load_images("folder", directory, s) for s in ("train", "test"))
    x = x / 255
    with autocast(args):
        learnt = extract_features(encoder, train)
    for name, alpha, steps in [("x", 1, 0), ("0.75 x + 0.25 noise", 0.75, 0), ("I_0", 0.6, 0),
                               ("I_5", 0.6, 5), ("I_10", 0.6, 10), ("I_15", 0.6, 15)]:
        torch.manual_seed(0)
        with autocast(args):
            image = torch.cat([langevin(f, mix_with_noise(part, alpha), steps, 10, 0.005)
                               for part in x.split(500)])
            features = extract_features(encoder, image)
        psnr = -10 * (image - x).square().mean((1, 2, 3)).log10().mean()           # of x, infinite
        print(f"{name}: PSNR {psnr:.1f} dB, {accuracies(learnt, train_y, features, y)}")


# --- Pictures with images --------------------------------------------------------------------


def method():
    """The drawing itself is the text of method.svg; this fills its seven images."""
    with Image.open(HERE / "views.png") as picture:         # a column, without D's map
        cells = [picture.crop((650, y, 714, y + 64)).resize((32, 32), Image.Resampling.NEAREST)
                 for y in range(4, 412, 68)]
    torch.manual_seed(0)
    cells.append(TF.to_pil_image(augment(TF.pil_to_tensor(cells[0])[None])[0]))
    drawing, *parts = re.split("(?<=base64,)[^\"]*", (HERE / "method.svg").read_text())
    for cell, part in zip(cells, parts, strict=True):       # x, v1, v2, I_0, I, v3, v3
        cell.save(png := io.BytesIO(), "png")
        drawing += base64.b64encode(png.getvalue()).decode() + part
    (HERE / "method.svg").write_text(drawing)


def label_rows(name, grid, labels, margin, size):
    """Write a grid of images, with a label at the left of each row."""
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for i, label in enumerate(labels):
        pen.text((margin - 10, grid.height * (i + 0.5) / len(labels)), label, "black", font, "rm")
    picture.save(HERE / name)


def views(ebm, folder):
    torch.manual_seed(0)
    f = load_ebm(ebm, "cpu")
    images, labels = load_images("folder", folder, "test")
    x = torch.stack([images[labels == label][:2][-1] for label in labels.unique()]) / 255
    start = mix_with_noise(x, 0.6)
    end = langevin(f, start, steps=15, step_size=10, noise_std=0.005)
    view_1 = augment(x)
    maps = f.maps(view_1)[-1].square().mean(1, keepdim=True)                       # (N, 1, 8, 8)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = F.interpolate((maps - low) / (high - low), size=32).expand_as(x)
    rows = {"image x": x, "view 1": view_1, "view 2": augment(x), "I_0, noisy image": start,
            "I_15, final sample": end, "Langevin view": augment(end), "discriminator map": maps}
    grid = F.interpolate(make_grid(torch.cat([*rows.values()]), nrow=len(x))[None], scale_factor=2)
    label_rows("views.png", TF.to_pil_image(grid[0].clamp(0, 1)), rows, 170, 15)


def samples(*labelled):
    rows = {}
    for label, _, folder in (argument.partition("=") for argument in labelled):
        with Image.open(Path(folder) / "samples.png") as grid:      # rows of 34 pixels, two of each
            rows.setdefault("images", grid.crop((0, 0, grid.width, 34)))
            rows[label] = grid.crop((0, 4 * 34, grid.width, 5 * 34))        # x, x_0, x_s: of x_s
    picture = Image.new("RGB", (rows["images"].width, 34 * len(rows) + 2))
    for i, row in enumerate(rows.values()):
        picture.paste(row, (0, 34 * i))
    label_rows("samples.png", picture, rows, 70, 13)


def main():
    commands = {command.__name__: command for command in (
        method, curves, scatter, views, samples, minutes, chain, harder, keep)}
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in commands:
        return print(__doc__)
    commands[name](*arguments)


if __name__ == "__main__":
    launch(main)
