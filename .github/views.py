"""The README's picture: python .github/views.py EBM.pt DIR, for an EBM and an image folder."""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import augment, langevin, load_ebm, load_images, mix_with_noise

torch.manual_seed(0)
f = load_ebm(sys.argv[1], "cpu")
images, labels = load_images("folder", sys.argv[2], "test")
x = torch.stack([images[labels == label][1] for label in labels.unique()]) / 255
start = mix_with_noise(x, 0.6)
end = langevin(f, start, steps=15, step_size=10, noise_std=0.005)
view_1 = augment(x)
with torch.no_grad():
    maps = f.maps(view_1)[-1].square().mean(1, keepdim=True)                   # (N, 1, 8, 8)
low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
maps = F.interpolate((maps - low) / (high - low), size=32).expand_as(x)
rows = {"image x": x, "view 1": view_1, "view 2": augment(x), "I_0, the chain's start": start,
        "I_15, its end": end, "view 3 of idea 1": augment(end), "D's map, idea 2": maps}
grid = F.interpolate(make_grid(torch.cat([*rows.values()]), nrow=len(x))[None], scale_factor=2)[0]
grid = TF.to_pil_image(grid.clamp(0, 1))

picture = Image.new("RGB", (grid.width + 170, grid.height), "white")
picture.paste(grid, (170, 0))
font = ImageFont.load_default(15)
for i, label in enumerate(rows):
    ImageDraw.Draw(picture).text((160, 68 * i + 36), label, "black", font, "rm")
picture.save(Path(__file__).with_name("views.png"))
