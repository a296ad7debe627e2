"""The README's picture: python .github/views.py EBM.pt DIR, for an EBM and an image folder."""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import augment, langevin, load_ebm, load_images, mix_with_noise

torch.manual_seed(0)
f = load_ebm(sys.argv[1], "cpu")
images, labels = load_images("folder", sys.argv[2], "test")
x = torch.stack([images[labels == label][1] for label in labels.unique()]) / 255
start = mix_with_noise(x, 0.6)
end = langevin(f, start, steps=15, step_size=10, noise_std=0.005)
with torch.no_grad():
    maps = f.maps(augment(x))[-1].square().mean(1, keepdim=True)                   # (N, 1, 8, 8)
low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
maps = F.interpolate((maps - low) / (high - low), size=32).expand_as(x)
rows = torch.cat([x, augment(x), augment(x), start, end, augment(end), maps])
grid = make_grid(rows, nrow=len(x))
save_image(F.interpolate(grid[None], scale_factor=2), Path(__file__).with_name("views.png"))
