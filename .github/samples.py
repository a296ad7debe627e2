"""samples.png: python .github/samples.py LABEL=FOLDER ..., each the .ebm folder of an EBM.

Of its samples.png: training images once, then each EBM's samples after 15 Langevin steps.
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE, COLUMNS = 34, 16                                    # as save_image lays them out

rows = {}
for argument in sys.argv[1:]:
    label, folder = argument.split("=", 1)
    with Image.open(Path(folder) / "samples.png") as grid:
        parts = [grid.crop((0, TILE * row, TILE * COLUMNS + 2, TILE * row + TILE))
                 for row in (0, 4)]                       # two rows each of x, x_0 and x_s
    rows |= {"images": parts[0]} if not rows else {}
    rows[label] = parts[1]
if not rows:
    sys.exit("name LABEL=FOLDER of EBMs")
picture = Image.new("RGB", (70 + TILE * COLUMNS + 2, TILE * len(rows) + 2), "white")
font = ImageFont.load_default(13)
for i, (label, part) in enumerate(rows.items()):
    picture.paste(part, (70, TILE * i))
    ImageDraw.Draw(picture).text((62, TILE * i + 17), label, "black", font, "rm")
picture.save(Path(__file__).with_name("samples.png"))
