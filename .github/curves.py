"""curves.svg: python .github/curves.py LABEL=RUN,RUN... ..., each the seeds of a setting.

5-NN accuracy over the epochs, from log.jsonl: the mean over the seeds, and their range as a band.
"""
import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 50, 40
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]     # for the colour-blind too

curves = {}                                               # label: [(epoch, low, mean, high)]
for argument in sys.argv[1:]:
    label, runs = argument.split("=", 1)
    seeds = []
    for run in runs.split(","):
        rows = map(json.loads, (Path(run) / "log.jsonl").read_text().splitlines())
        seeds.append({row["epoch"]: row["knn5"] for row in rows if "knn5" in row})
    curves[label] = [(epoch, min(at), sum(at) / len(at), max(at)) for epoch in seeds[0]
                     for at in [[seed[epoch] for seed in seeds]]]
points = [point for curve in curves.values() for point in curve]
if not points or len(curves) > len(COLORS):
    sys.exit(f"name 1 to {len(COLORS)} LABEL=RUN,RUN, of runs with --eval-every")
epochs, step = max(point[0] for point in points), 5
low = min(point[1] for point in points) // step * step
high = -(-max(point[3] for point in points) // step) * step


def place(epoch, accuracy):
    return (f"{LEFT + (WIDTH - LEFT - 20) * epoch / epochs:.1f},"
            f"{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 15) * (accuracy - low) / (high - low):.1f}")


def text(x, y, words, **style):
    style = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}" {style}>{words}</text>'


svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
       'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>']
for accuracy in range(int(low), int(high) + 1, step):
    y = float(place(0, accuracy).split(",")[1])
    svg += [f'<path d="M{LEFT},{y}H{WIDTH - 20}" stroke="#ddd"/>',
            text(LEFT - 8, y + 4, accuracy, text_anchor="end")]
for epoch in sorted({point[0] for point in points}):
    svg.append(text(place(epoch, low).split(",")[0], HEIGHT - 22, epoch, text_anchor="middle"))
svg += [text((LEFT + WIDTH) / 2, HEIGHT - 5, "epoch", text_anchor="middle"),
        text(0, 0, "5-NN accuracy in %", text_anchor="middle",
             transform=f"translate(14 {(HEIGHT - BOTTOM) / 2}) rotate(-90)")]
for i, (color, (label, curve)) in enumerate(zip(COLORS, curves.items())):
    band = [place(epoch, top) for epoch, _, _, top in curve]
    band += [place(epoch, bottom) for epoch, bottom, _, _ in reversed(curve)]
    line = " ".join(place(epoch, mean) for epoch, _, mean, _ in curve)
    svg += [f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.15"/>',
            f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<path d="M{WIDTH - 250},{HEIGHT - 130 + 20 * i}h25" stroke="{color}" '
            'stroke-width="2"/>', text(WIDTH - 218, HEIGHT - 126 + 20 * i, label)]
Path(__file__).with_name("curves.svg").write_text("\n".join([*svg, "</svg>"]) + "\n")
