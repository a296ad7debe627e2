"""Pictures and figures of README.md and RESULTS.md: python .github/pictures.py NAME ...

    method                      method.svg: the method, with images from views.png
    curves [FILE.jsonl]         curves.svg: 5-NN accuracy over epochs, and over minutes of one core
    scatter FILE.jsonl          scatter.svg: BYOL's gain against how good view 3's teacher is
    minutes FILE.jsonl ...      prints the minutes that each setting's training took
    chain RUN EBM.pt DIR        prints what RUN's encoder tells of test images along their chains
    harder DIR RUN ...          prints what encoders are worth with few labels, and under noise
    views EBM.pt DIR            views.png: the views of a test image of every class in DIR/test
    samples LABEL=FOLDER ...    samples.png: training images, and samples, from .ebm folders

A line of a .jsonl file is a run: {"config", "result", "log"}. A file is of one machine.
"""
import base64
import inspect
import io
import json
import math
import sys
from argparse import Namespace
from functools import partial
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
from common import (EBM_ROUND, UserError, augment, autocast, langevin, launch, load_ebm,
                    load_images, mix_with_noise, naming, reading)
from linear_eval import (comparable, extract_features, knn_accuracy, labels, linear_accuracy,
                         load_encoder, once, pooled, same_images)

BLUE, RED, GREEN, PINK, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"


def read(path):
    """The runs in a file of results, each a dict."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        if all({"config", "result", "log"} <= row.keys() for row in rows):
            return rows
    except (ValueError, AttributeError):                    # no text, no JSON, no dicts
        pass
    raise UserError(f"{path}: not a file of results, a run a line")


# --- SVG by hand -----------------------------------------------------------------------------


def shape(tag, words="", **style):
    """An element; `stroke_width=2` is its stroke-width="2"."""
    style = [f'{name.replace("_", "-")}="{value}"' for name, value in style.items()]
    return f"<{' '.join([tag, *style])}>{escape(words)}</{tag}>"


def text(x, y, words, anchor="middle", **style):
    return shape("text", str(words), x=f"{x:.0f}", y=f"{y:.0f}", text_anchor=anchor, **style)


def line(d, color="#444", width=1.5, **style):
    return shape("path", d=d, stroke=color, stroke_width=width, **{"fill": "none", **style})


def through(points):
    return "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def write_svg(name, width, height, parts):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="14" fill="#222">')
    white = '<rect width="100%" height="100%" fill="white"/>'
    (HERE / name).write_text("\n".join([head, white, *parts, "</svg>"]) + "\n")


def ticks(values, most=7):
    """Round numbers from below the least value to above the greatest, at most so many steps."""
    for step in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
        if high - low <= most:
            return [step * i for i in range(low, max(high, low + 1) + 1)]


def axes(left, width, xs, ys, title, top=40, height=260):
    """A panel from the first to the last of its ticks: its parts, and the place of a point."""
    def at(x, y):
        return (left + width * (x - xs[0]) / (xs[-1] - xs[0]),
                top + height * (ys[-1] - y) / (ys[-1] - ys[0]))

    parts = [text(left + width / 2, top + height + 42, title)]
    for y in ys:
        parts += [line(through([at(xs[0], y), at(xs[-1], y)]), "#ddd", 1),
                  text(left - 8, at(xs[0], y)[1] + 5, y, "end")]
    return parts + [text(at(x, ys[0])[0], top + height + 20, x) for x in xs], at


# --- Accuracy over epochs and over time ------------------------------------------------------

ARMS = {"a third ordinary view": (BLUE, dict(script="byol_langevin", coeff=1, view="augment")),
        "D's view": (RED, dict(script="byol_disc", coeff=1, ebm_iters=4000, layers="last")),
        "an untrained D's": (GREEN, dict(script="byol_disc", coeff=1, ebm_iters=0, layers="last")),
        "plain BYOL": (PINK, dict(script="byol_disc", coeff=0, epochs=20)),
        "plain BYOL, 30 epochs": (YELLOW, dict(script="byol_disc", coeff=0, epochs=30))}
EBM_MINUTES = {"epyc": 29}                      # 4,000 iterations on one core: the README's table


def over_epochs(runs):
    """[(epoch, mean, least, greatest)] of the seeds' accuracies, the untrained encoder's first."""
    seeds = [{0: run["result"]["untrained"]["knn5"]} | {
        at["epoch"]: at["knn5"] for at in run["log"] if "knn5" in at} for run in runs]
    shared = [epoch for epoch in seeds[0] if all(epoch in seed for seed in seeds)]
    return [(epoch, mean(values), min(values), max(values)) for epoch in shared
            for values in [[seed[epoch] for seed in seeds]]]


def over_minutes(runs, machine):
    """The same over minutes. A run whose D is trained waits for that."""
    config, points, wait = runs[0]["config"], over_epochs(runs), 0
    if "f" in config and config["ebm_iters"] > 0:
        if machine not in EBM_MINUTES:
            raise UserError(f"{machine}: EBM_MINUTES does not say how long an EBM takes there")
        wait = EBM_MINUTES[machine]
    speed = median(at["images_per_s"] for run in runs for at in run["log"] if "epoch" in at)
    return [(0, *points[0][1:])] + [(wait + epoch * config["subset"] / speed / 60, *accuracies)
                                    for epoch, *accuracies in points]


def curves(file=HERE / "results" / "epyc.jsonl"):
    rows = [row for row in read(file) if row["result"] and any("knn5" in at for at in row["log"])]
    arms = {label: (color, runs) for label, (color, wanted) in ARMS.items() if (runs := [
        row for row in rows if wanted.items() <= row["config"].items()])}
    if not arms:
        raise UserError(f"{file}: has no run of ARMS with --eval-every")
    n = " to ".join(map(str, sorted({len(runs) for _, runs in arms.values()})))
    svg = [text(16, 24, f"5-NN accuracy in %, n = {n}", "start")]
    for i, (label, (color, _)) in enumerate(arms.items()):
        x, y = 40 + 200 * (i % 3), 368 + 24 * (i // 3)
        svg += [line(f"M{x},{y}h22", color, 4), text(x + 28, y + 5, label, "start")]
    for left, title, curve in [
            (40, "epochs", over_epochs), (360, "minutes of one core, EBM included",
                                          partial(over_minutes, machine=Path(file).stem))]:
        panel = [(color, curve(runs)) for color, runs in arms.values()]
        xs, *ys = zip(*(point for _, points in panel for point in points))
        parts, at = axes(left, 265, ticks(xs), ticks(sum(ys, ())), title)
        svg += parts
        for color, points in panel:
            middle, low, high = ([at(point[0], point[i]) for point in points] for i in (1, 2, 3))
            svg += [line(through(low + high[::-1]), "none", fill=color, opacity=0.15),
                    line(through(middle), color, 2.5)]
    write_svg("curves.svg", 640, 408, svg)


# --- What a better teacher gives -------------------------------------------------------------


def name_of(config):
    """The features that a line is about, a D's or a plain run's, or that a run has as view 3."""
    if "teacher" in config:
        return config["teacher"]
    if config.get("coeff") == 0:
        return f"{config['script']} of {config['epochs']} epochs"
    iters, objective = config["ebm_iters"], config.get("ebm_objective", "gan")
    trained = f"{iters:,} iterations" if iters else "untrained"
    other = f" of {objective}" if iters and objective != "gan" else ""
    if iters and config.get("ebm_rotation"):
        other += f", rotation {config['ebm_rotation']}"
    return f"D, {trained}{other}" + (", all stages" if config["layers"] == "all" else "")


def pairs(rows):
    """{teacher: {seed: (its accuracies, those of BYOL with it, those of plain BYOL)}} of a
    machine's runs; what else pairs must share is in `seed` too, after its number."""
    rows, doubled = once([(row["config"], row["result"]) for row in rows if row["result"]])
    for problem in doubled:
        print(problem)
    teachers, plain, found, alike = {}, {}, {}, ("schedule", "batch_size", "lr", "tau", "emb")

    def key(config, *more):
        return tuple(config.get(flag) for flag in ("seed", "images", "width", *more))

    for config, result in rows:
        if config.get("coeff") == 0 or config["script"] == "ebm":
            teachers[name_of(config), key(config)] = result
        if config.get("coeff") == 0 and config["script"] == "byol_disc":
            plain[key(config, "epochs", *alike)] = result
    for config, result in rows:
        if config.get("coeff") == 1 and config["script"] in ("byol_disc", "byol_teacher"):
            name, seed = name_of(config), key(config, "epochs", *alike)
            if (name, key(config)) in teachers and seed in plain:
                found.setdefault(name, {})[seed] = teachers[name, key(config)], result, plain[seed]
            else:
                print(f"left out: {name}, seed {config['seed']}; its own accuracies or plain "
                      "BYOL's are missing")
    return found


def place(x, y, words, taken):
    """A label beside (x, y) that meets none of the boxes `taken`; its own is added to them."""
    width = 7 * len(words)
    boxes = [(x + dx, x + dx + width, y + dy - 14, y + dy + 4)
             for dx in (12, -16 - width) for dy in (5, 24, -14)]
    free = [(left, right, top, bottom) for left, right, top, bottom in boxes
            if 50 < left and right < 660 and not any(
                left < r and l < right and top < b and t < bottom for l, r, t, b in taken)]
    taken.append((free or boxes)[0])
    return text(taken[-1][0], taken[-1][3] - 4, words, "start")


def scatter(file):
    with naming(file, "not results that can be drawn", "name another"):
        found = pairs(rows := read(file))
    if len(kinds := {seed[1:] for seeds in found.values() for seed in seeds}) != 1:
        raise UserError(f"{file}: has {len(kinds)} kinds of BYOL at --coeff 1 with all that a pair "
                        "takes; name one with one kind: images, width, epochs, ...")
    epochs = kinds.pop()[2]
    _, alike = comparable(sorted(((row["config"], row["result"]) for row in rows if row["result"]),
                                 key=lambda row: row[0].get("epochs") != epochs))
    points = {}
    for metric in ("linear", "knn5"):
        sd, freedom = pooled(alike, metric)
        for name, seeds in found.items():
            own, gain = (mean(row[i][metric] - row[2][metric] * (i == 1) for row in seeds.values())
                         for i in (0, 1))
            error = sd * (2 / len(seeds)) ** 0.5 if freedom > 1 else 0
            points.setdefault(name, {})[metric] = own, gain, error
    for name, at in points.items():
        print(f"{name}, n = {len(found[name])}: " + ", ".join(
            f"{metric} {own:.1f}, gain {gain:+.1f}" + (f" ± {error:.1f}" if error else "")
            for metric, (own, gain, error) in at.items()))
    gains, errors = zip(*(at["linear"][1:] for at in points.values()))
    ends = ticks([0, *(gain + sign * e for gain, e in zip(gains, errors) for sign in (-1, 1))])
    svg = [text(16, 24, "gain of BYOL over plain BYOL in the linear probe, points", "start"),
           text(140, 724, "● a generative model's D", fill=RED),
           text(380, 724, "■ another encoder", fill=BLUE)]
    for top, metric, title in [(40, "linear", "linear probe"), (390, "knn5", "5-NN")]:
        xs = [at[metric][0] for at in points.values()]
        parts, at = axes(40, 520, ticks(xs), ends,
                         f"{title} of the teacher's frozen features, %", top)
        if min(xs) < max(xs) and min(gains) < max(gains):
            print(f"correlation of gains in the probe with the teachers' {title}: "
                  f"{np.corrcoef(xs, gains)[0, 1]:.2f}")
            slope, start = np.polyfit(xs, gains, 1)
            line_ends = [at(x, start + slope * x) for x in (min(xs), max(xs))]
            parts.append(line(through(line_ends), "#aaa", 1))
        taken = [(x - 8, x + 8, y - 8, y + 8) for x, y in map(at, xs, gains)]
        for name, own, gain, error in zip(points, xs, gains, errors):
            color, (x, y) = RED if name.startswith("D, ") else BLUE, at(own, gain)
            words = name.replace(", 4,000 iterations", ", trained")
            words = words.replace("simclr_disc", "SimCLR").replace("byol_disc", "BYOL")
            parts += [line(through([at(own, gain - error), at(own, gain + error)]), color, 2),
                      shape("rect", x=f"{x - 6:.1f}", y=f"{y - 6:.1f}", width=12, height=12,
                            fill=color, rx=6 if color == RED else 0), place(x, y, words, taken)]
        svg += parts
    write_svg("scatter.svg", 660, 740, svg)


# --- What a run takes -------------------------------------------------------------------------


def minutes(first, *more):
    """Print the minutes of training: the rounds of a run or an EBM at their median seconds."""
    for file in (first, *more):
        runs = [row for row in read(file) if "script" in row["config"]
                and not (row["config"]["script"] == "ebm" and row["config"]["layers"] == "all")]
        names, taken = labels([(row["config"], row["result"] or {}) for row in runs])[0], {}
        for name, row in zip(names, runs):
            config = row["config"]
            seconds = [at["seconds"] for at in row["log"] if "seconds" in at]
            if not seconds and config.get("use") != "dataset":          # older code logged none
                seconds = [config["subset"] / at["images_per_s"] for at in row["log"]
                           if "images_per_s" in at and config["subset"]]
            if seconds:
                total = config.get("epochs") or math.ceil(config["ebm_iters"] / EBM_ROUND)
                taken.setdefault(name, []).append(total * median(seconds) / 60)
        for name, values in taken.items():
            print(f"{Path(file).stem}: {mean(values):.1f} minutes, n = {len(values)}: {name}")
        if not taken:
            print(f"{file}: no log says how long a round took")


# --- What an encoder tells of other images ----------------------------------------------------


def trained(run, directory):
    """The encoder of the run in a directory, and its flags, on the CPU; UserError where DIR has
    other training images."""
    with reading(Path(run) / "config.json") as config:
        args = Namespace(**{**config, "device": "cpu", "dataset": "folder", "data_dir": directory})
    same_images(run, config, args)
    with reading(Path(run) / "checkpoint.pt") as saved:
        return load_encoder(saved["model"], args.width), args


def harder(directory, *runs):
    """Print accuracies with few labels, over five draws of them, and of noisy test images."""
    (x, y), (test, test_y) = (load_images("folder", directory, s) for s in ("train", "test"))
    torch.manual_seed(0)
    noisy = (test / 255 + 0.1 * torch.randn(test.shape)).clamp(0, 1)
    for run in runs:
        encoder, args = trained(run, directory)
        with autocast(args):
            x_h, test_h, noisy_h = (extract_features(encoder, i) for i in (x, test, noisy))
        words = []
        for few in (10, 100):
            torch.manual_seed(0)
            draws = [torch.cat([(y == k).nonzero()[:, 0][torch.randperm(int((y == k).sum()))[:few]]
                                for k in range(int(y.max()) + 1)]) for _ in range(5)]
            values = [linear_accuracy(x_h[i], y[i], test_h, test_y) for i in draws]
            words.append(f"{few} labels a class {mean(values):.1f} ± {stdev(values):.1f}")
        print(f"{run}: linear, {', '.join(words)}; noisy "
              f"{linear_accuracy(x_h, y, noisy_h, test_y):.1f}, 5-NN "
              f"{knn_accuracy(x_h, y, noisy_h, test_y, k=5):.1f}")


def chain(run, ebm, directory):
    """Print PSNR to x, and the accuracies of a probe and of 5-NN that know real images alone, of
    DIR's test images x, of noisy ones, and of chains from them by the deck's defaults."""
    (encoder, args), f = trained(run, directory), load_ebm(ebm, "cpu")
    (train, train_y), (x, y) = (load_images("folder", directory, s) for s in ("train", "test"))
    x = x / 255
    with autocast(args):
        learnt = extract_features(encoder, train)
        for name, alpha, steps in [("x", 1, 0), ("0.75 x + 0.25 noise", 0.75, 0), ("I_0", 0.6, 0),
                                   ("I_5", 0.6, 5), ("I_10", 0.6, 10), ("I_15", 0.6, 15)]:
            torch.manual_seed(0)
            image = torch.cat([langevin(f, mix_with_noise(part, alpha), steps, 10, 0.005)
                               for part in x.split(500)])
            psnr = -10 * (image - x).square().mean((1, 2, 3)).log10().mean()       # of x, infinite
            data = learnt, train_y, extract_features(encoder, image), y
            with torch.autocast("cpu", enabled=False):
                print(f"{name}: PSNR {psnr:.1f} dB, linear "
                      f"{linear_accuracy(*data):.1f}, 5-NN {knn_accuracy(*data, k=5):.1f}")


# --- The method ------------------------------------------------------------------------------

V1, V2, IDEA1, IDEA2, Z3 = 40, 120, 214, 316, 265           # the rows' middles
TIP = ('<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
       'orient="auto"><path d="M0,0L8,4L0,8z" fill="#444"/></marker>')
code = partial(text, font_family="monospace")


def tile(image, x, y, name):
    data = io.BytesIO()
    image.save(data, "png")
    data = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return [shape("image", href=data, x=x, y=y - 26, width=52, height=52),
            code(x + 26, y + 40, name)]


def arrow(x, y, to, above="", below="", down=0):
    middle = (x + to) / 2
    return [line(f"M{x},{y}C{middle},{y} {middle},{y + down} {to},{y + down}",
                 marker_end="url(#tip)")] + [text(middle - 3, y + dy, words, font_size=13)
                                             for dy, words in [(-7, above), (16, below)] if words]


def network(name, x, top, bottom, color):
    return [shape("rect", x=x, y=top, width=46, height=bottom - top, rx=6, fill=fill,
                  fill_opacity=opacity, stroke=color, stroke_width=1.5)
            for fill, opacity in [("white", 1), (color, 0.2)]] + [
                code(x + 23, (top + bottom) / 2 + 6, name, font_size=17)]


def pair(a, b, top, bottom, right, y, color):
    return [line(f"M660,{top}C{right},{top} {right},{bottom} 660,{bottom}", color, 2.5),
            text(684, y, f"pair({a}, {b})", "start", fill=color)]


def method():
    with Image.open(HERE / "views.png") as picture:         # its eighth column, without D's map
        cells = [picture.crop((650, y, 714, y + 64)).resize((32, 32), Image.Resampling.NEAREST)
                 for y in range(4, 412, 68)]
    torch.manual_seed(0)
    cells.append(TF.to_pil_image(augment(TF.pil_to_tensor(cells[0])[None])[0]))
    svg = [TIP, line(f"M68,178H86M86,{V1}V{IDEA2}")]
    for y, color, words in [(IDEA1, YELLOW, "idea 1: an image from the EBM"),
                            (IDEA2, BLUE, "idea 2: features of its discriminator D, frozen")]:
        svg += [shape("rect", x=92, y=y - 49, width=498, height=96, rx=8, fill=color, opacity=0.12),
                text(102, y - 33, words, "start", font_weight="bold")]
    for y in (V1, V2, IDEA1, IDEA2):
        svg += arrow(438, y, 464) + arrow(510, y, 538)
        svg += arrow(86, y, 386, "augment") if y != IDEA1 else []
    for x, y, *rest in [(86, IDEA1, 150, "noise"), (202, IDEA1, 268, "langevin", "on f"),
                        (320, IDEA1, 386, "augment"), (584, V1, 622), (584, V2, 622),
                        (584, IDEA1, 622, "", "", 45), (584, IDEA2, 622, "", "", -45)]:
        svg += arrow(x, y, *rest)
    for image, x, y, name in zip(cells, [16, 386, 386, 150, 268, 386, 386],
                                 [178, V1, V2, IDEA1, IDEA1, IDEA1, IDEA2],
                                 ["x", "v1", "v2", "I_0", "I", "v3", "v3"]):
        svg += tile(image, x, y, name)
    svg += network("E", 464, V1 - 24, IDEA1 + 28, GREEN)
    svg += network("g", 538, V1 - 24, IDEA1 + 28, GREEN)
    svg += network("D", 464, IDEA2 - 24, IDEA2 + 28, BLUE)
    svg += network("g_D", 538, IDEA2 - 24, IDEA2 + 28, GREEN)
    for y, name in [(V1, "z1"), (V2, "z2"), (Z3, "z3")]:
        svg += [shape("circle", cx=640, cy=y, r=17, fill="white", stroke="#444", stroke_width=1.5),
                code(640, y + 5, name)]
    svg += pair(1, 2, V1 + 6, V2 - 6, 685, 85, "#444")
    svg += pair(2, 3, V2 + 6, Z3 - 6, 685, 198, RED)
    svg += pair(1, 3, V1 - 6, Z3 + 6, 834, 157, RED)
    svg += [code(400, 396, "loss = pair(1, 2) + coeff * (pair(1, 3) + pair(2, 3)) / 2",
                 font_size=18),
            text(400, 424, "SimCLR: pair(a, b) = nt_xent(z_a, z_b).  "
                 "BYOL: pair(a, b) = byol_loss(p_a, t_b) + byol_loss(p_b, t_a),"),
            text(400, 444, "p = q(z), t = z of the target networks, moving averages. "
                 "E encoder, g, g_D projectors, q predictor.")]
    write_svg("method.svg", 800, 460, svg)


# --- Pictures of images ----------------------------------------------------------------------


def label_rows(name, grid, labels, margin, size):
    """Write a grid of images, at the left of each row its label."""
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
    with torch.no_grad():
        maps = f.maps(view_1)[-1].square().mean(1, keepdim=True)                   # (N, 1, 8, 8)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = F.interpolate((maps - low) / (high - low), size=32).expand_as(x)
    rows = {"image x": x, "view 1": view_1, "view 2": augment(x), "I_0, the chain's start": start,
            "I_15, its end": end, "view 3 of idea 1": augment(end), "D's map, idea 2": maps}
    grid = F.interpolate(make_grid(torch.cat([*rows.values()]), nrow=len(x))[None], scale_factor=2)
    label_rows("views.png", TF.to_pil_image(grid[0].clamp(0, 1)), rows, 170, 15)


def samples(first, *more):
    side, columns, rows = 34, 16, {}            # as save_image lays them out
    for label, _, folder in (argument.partition("=") for argument in (first, *more)):
        with Image.open(Path(folder) / "samples.png") as grid:
            parts = [grid.crop((0, side * row, side * columns + 2, side * row + side))
                     for row in (0, 4)]         # two rows each of x, x_0 and x_s
        rows = {"images": parts[0], **rows, label: parts[1]}
    grid = Image.new("RGB", (side * columns + 2, side * len(rows) + 2))
    for i, part in enumerate(rows.values()):
        grid.paste(part, (0, side * i))
    label_rows("samples.png", grid, rows, 70, 13)


def main():
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return print(__doc__)
    named = {f.__name__: f for f in (method, curves, scatter, minutes, chain, harder, views,
                                    samples)}
    try:
        inspect.signature(draw := named.get(name)).bind(*arguments)
    except TypeError:
        raise UserError(f"{' '.join(sys.argv[1:])}: no such name, or not its arguments; "
                        "see --help") from None
    draw(*arguments)


if __name__ == "__main__":
    launch(main)
