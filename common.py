"""What the four experiments share, in the order in which the data flow.

Flags, ranks, data, augmentation, networks, samplers, losses, devices, identity, files, the
energy-based model (EBM), runs: no section uses a later one. Stored images are uint8; outside a
network, images are floats in [0, 1].

    python common.py                        # trains the EBM alone (a script does so if needed)
"""
import argparse
import ast
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch.nn.utils import parametrizations, parametrize
from torchvision.datasets.folder import is_image_file, make_dataset
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.utils import make_grid, save_image

# --- Flags that all scripts share ------------------------------------------------------------
# Add a flag here, or in the one script that needs it.

DATASETS = ["cifar10", "cifar100", "folder", "synthetic"]


class UserError(Exception):
    """A user's mistake and its remedy. `launch` prints it as one line and exits with status 2."""


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) between low and high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def make_parser(doc, file, training=True):
    """A parser with the flags that all scripts share; the script passes its __doc__, __file__."""
    parser = argparse.ArgumentParser(
        prog=Path(file).name, description=doc.split("\n")[0], usage="%(prog)s [options]",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(script=Path(file).stem, file=file)
    add = parser.add_argument_group("data, networks and devices").add_argument
    add("--dataset", default="cifar10", choices=DATASETS,
        help="data set; folder reads --data-dir")
    add("--data-dir", type=os.path.expanduser, default="data",
        help="download directory; for --dataset folder that of train/<class>/ and test/<class>/")
    add("--subset", type=number(int, 0), default=0,
        help="number of training images, 0 = all; the linear probe and kNN use all labelled ones")
    add("--width", type=number(int, 8, 1024), default=64, help="base width (ResNet-18 has 64)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all random numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto = bf16 if the device is fast in it, else fp32; fp16 is for GPUs without bf16")
    add("--graph", action="store_true",
        help="replay the step as a CUDA graph; what a view draws outside torch is then frozen")
    add("--smoke", action="store_true",
        help="quick test on synthetic data, minutes on a CPU; other flags still count")
    add = parser.add_argument_group("energy-based model (EBM)").add_argument
    add("--ebm", type=os.path.expanduser, default=argparse.SUPPRESS,
        help="file of the EBM (.pt), trained if missing; default: runs/ebm-<its settings>.pt")
    add("--ebm-iters", type=number(int, 0, 10**9), default=4000,
        help="training iterations of the EBM; 0 = untrained, a control")
    add("--ebm-objective", choices=["gan", "ade", "cd"], default="gan",
        help="gan = logistic GAN with samples refined by Langevin steps; ade = adversarial "
             "dynamics embedding; cd = contrastive divergence with a replay buffer")
    add("--ebm-rotation", type=number(float, 0), default=0,
        help="weight of the discriminator's rotation-prediction loss (generator: a fifth of it)")
    if not training:
        return parser
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 0, 10**9), default=1000,
        help="passes over the training images; 0 = evaluate the untrained encoder")
    add("--batch-size", type=number(int, 2), default=256, help="images per step, on all devices")
    add("--lr", type=number(float, 0), default=3e-3, help="Adam's learning rate after warm-up")
    add("--schedule", choices=["step", "cosine"], default="step",
        help="step = times 0.2 at 95%% and 97.5%% of training; cosine = cosine decay to 0")
    add("--emb", type=number(int, 1, 2**16), default=64, help="output dimension of the projector")
    add("--run-dir", type=os.path.expanduser, default=argparse.SUPPRESS,
        help="output directory; default: runs/<script>-<flags that differ from their defaults>")
    add("--eval-every", type=number(int, 0), default=0,
        help="epochs between two kNN evaluations in the log; 0 = only at the end")
    return parser


SMOKE = dict(dataset="synthetic", subset=2000, width=12, epochs=7, batch_size=32,
             schedule="cosine", ebm_iters=20, coeff=2.0, tau=0.9)


# --- Ranks and console: one process among those of torchrun ----------------------------------

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


class Gather(torch.autograd.Function):
    """x (B, ...) of all ranks, concatenated in their order; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x):
    return Gather.apply(x) if world_size() > 1 else x


def show(line, passing=False):
    """Print a line on rank 0; on a terminal, the next line overwrites a passing one."""
    if rank() == 0 and sys.stdout.isatty():
        print("\r\033[K" + line, end="" if passing else "\n", flush=True)
    elif rank() == 0 and not passing:
        print(line, flush=True)


def launch(main):
    """Run a script's `main`; a UserError or a system error is printed as a line, status 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


# --- Data: uint8 images in memory ------------------------------------------------------------
# Add a data set in `load_images` and to DATASETS.

@cache
def load_images(dataset, data_dir, split):
    """The "train" or "test" split of a data set: uint8 images (N, 3, 32, 32), int64 labels (N,)."""
    if dataset == "synthetic":
        return draw_shapes(5000, seed=0) if split == "train" else draw_shapes(1000, seed=1)
    if dataset == "folder":
        return read_folder(Path(data_dir), split)
    source = getattr(torchvision.datasets, dataset.upper())
    try:
        data = source(data_dir, split == "train")
    except RuntimeError:                                             # it is not there
        try:
            os.makedirs(data_dir, exist_ok=True)
            with FileLock(Path(data_dir) / "download.lock"):         # several processes may ask
                data = source(data_dir, split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--dataset {dataset}: cannot download it to {data_dir} ({error}); "
                            "put it there, or use --dataset folder or synthetic") from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def read_folder(root, split):
    """Images (N, 3, 32, 32) and labels (N,) of root/split/<class>/**, without what is hidden."""
    root = root / split
    classes, train_classes = (
        sorted(x.name for x in place.glob("*") if x.is_dir() and not x.name.startswith("."))
        for place in (root, root.with_name("train")))
    if not classes or classes != train_classes:
        raise UserError(f"--data-dir {root.parent}: needs folders train/<class>/ and, of the same "
                        f"classes, test/<class>/; {split}/ has {len(classes)}")
    files = make_dataset(root, {name: label for label, name in enumerate(classes)},
                         is_valid_file=lambda path: is_image_file(path)
                         and "/." not in path[len(str(root)):])
    show(f"reading {len(files)} images of {len(classes)} classes in {root}")
    with ThreadPoolExecutor() as threads:
        images = torch.stack([*threads.map(read_image, [path for path, _ in files])])
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def read_image(path):
    """An image file -> uint8 (32, 32, 3): upright, on white if transparent, stretched."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except Exception as error:                                       # PIL raises many kinds
        raise UserError(f"{path}: not a readable image ({error}); fix or delete it") from error
    if image.mode[0] in "IF":                                        # `convert` would clip at 255
        raise UserError(f"{path}: has mode {image.mode}; save it with 8 bits a channel")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def has_test(args):
    return args.dataset != "folder" or (Path(args.data_dir) / "test").exists()


def draw_shapes(n, seed):
    """Synthetic data: noisy tilings of one of ten shapes, the label; all else varies at random.

    Returns uint8 (n, 3, 32, 32) and int64 (n,), the same for the same seed: float64 gives equal
    bytes on every CPU. Each image has all hues, so that colour does not identify it.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=g).double()

    u = torch.linspace(-1, 1, 32, dtype=torch.float64)[None]                       # (1, 32)
    toward, phase = uniform(0, 2 * math.pi, 1), uniform(0, 2 * math.pi, 1)
    hue = 4 * (toward.cos() * u + toward.sin() * u.T) + phase                      # (n, 1, 32, 32)
    hue = hue + 2 * math.pi * torch.tensor([0, 1 / 3, 2 / 3])[:, None, None]
    paper = uniform(0.45, 0.55, 1) + 0.1 * hue.cos()                               # (n, 3, 32, 32)
    tilt, size = uniform(-0.4, 0.4), 2.6 * uniform(0.2, 0.35)
    u, v = ((tilt.cos() * u - tilt.sin() * u.T) / size + uniform(0, 2),
            (tilt.sin() * u + tilt.cos() * u.T) / size + uniform(0, 2))            # in tiles
    ink = torch.where((u.floor() + v.floor()) % 2 == 0, 0.35, -0.35)               # light, dark
    u, v = 2.6 * (u % 1 - 0.5), 2.6 * (v % 1 - 0.5)                                # within a tile
    r, x, y = u.hypot(v), u.abs(), v.abs()
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    diagonal = torch.minimum((u - v).abs(), (u + v).abs())
    label = torch.randint(10, (n,), generator=g)
    shape = sum((label == k)[:, None, None] * inside for k, inside in enumerate([  # > 0 inside
        1 - r, 0.25 - (r - 0.7).abs(), 0.85 - high, 0.2 - (high - 0.65).abs(),
        torch.minimum(0.7 - v, v + 1 - 2 * x), torch.minimum(0.3 - low, 1 - high),
        torch.minimum(0.4 - diagonal, 0.9 - high), torch.minimum(0.4 - x, 1 - y),
        torch.minimum(1 - x, 0.4 - y), u * v]))                                    # (n, 32, 32)
    image = paper + (ink * (12 * shape).sigmoid())[:, None]
    image = image + 0.2 * torch.randn(image.shape, generator=g, dtype=torch.float64)
    return (image.clamp(0, 1) * 255).round().byte(), label


def training_images(args):
    """The images (N, 3, H, W), uint8, to train on; --subset keeps the same ones for any seed."""
    images, _ = load_images(args.dataset, args.data_dir, "train")
    if images.dtype != torch.uint8:
        raise UserError(f"--dataset {args.dataset}: images are {images.dtype}; they have to be "
                        "uint8, from 0 to 255")
    if args.subset > len(images):
        raise UserError(f"--subset {args.subset}: there are {len(images)} training images; 0: all")
    keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.subset]
    return images[keep] if args.subset else images


# --- Augmentation of a batch, with random parameters for each image --------------------------
# Any function from images to as many images in [0, 1] can replace `augment`.

@torch.no_grad()
def augment(x):
    """SimCLR's augmentation, with the strengths of the reference implementation.

    x: (B, 3, H, W), uint8 or float in [0, 1] -> float in [0, 1]. In this order: colour jitter
    (0.4, 0.4, 0.4, 0.1) with probability 0.8, gray with 0.1, a bicubic crop of 0.2 to 1 of the area
    with ratio 3/4 to 4/3, flip with 0.5. The distribution for each square image is torchvision's.
    """
    b, _, height, width = x.shape
    draws = torch.rand(33, b, device=x.device).split([1, 1, 1, 3, 1, 3, 1, 10, 10, 2])
    jittered, gray, flip, factor, shift, order, hue_place, area, ratio, place = draws   # (., B)
    with torch.autocast(x.device.type, enabled=False):
        x = x / 255 if x.dtype == torch.uint8 else x.float()
        jittered = jittered < 0.8
        x = color_jitter(x, (1 + jittered * (0.8 * factor - 0.4)).T,
                         jittered[0] * (0.2 * shift[0] - 0.1),
                         order.argsort(0).T, (4 * hue_place[0]).long())
        x = torch.where((gray[0] < 0.1)[:, None, None, None], rgb_to_grayscale(x), x)

        # Ten tries per image, as in torchvision's RandomResizedCrop; the whole image if none fits.
        whole = torch.stack([x.new_full((1, b), side) for side in (height, width)])
        root = (height * width * (0.2 + 0.8 * area)).sqrt()
        stretch = (math.log(4 / 3) * (ratio - 0.5)).exp()                # root of width / height
        sides = torch.cat([torch.stack([root / stretch, root * stretch]).round(), whole], 1)
        first = (sides <= whole).all(0, keepdim=True).int().argmax(1, keepdim=True)    # that fits
        sides = sides.gather(1, first.expand(2, 1, b))                   # (2, 1, B): height, width
        start = (place[:, None] * (whole - sides + 1)).floor()
        rows, columns = resampling(start[:, 0], sides[:, 0], whole[:, 0], max(height, width))
        rows, columns = rows[:, :height, :height], columns[:, :width, :width]
        columns = torch.where((flip[0] < 0.5)[:, None, None], columns.flip(1), columns)
        x = (x.flatten(1, 2) @ columns.mT).view(b, 3, height, width)
        return (rows[:, None] @ x).clamp_(0, 1)


def color_jitter(x, factors, shift, order, hue_place):
    """Brightness, contrast and saturation by `factors` (B, 3), in each image's `order` (B, 3); the
    hue is shifted by `shift` (B,) before operation number `hue_place` (B,) in 0..3.

    Each operation is x <- clip(A x + C mean(x)) on colours, with the mean over pixels. To batch
    them, all three run twice, before and after the hue, with factor 1 where they do not apply.
    """
    colours = torch.eye(3, device=x.device)
    to_gray = rgb_to_grayscale(colours[..., None, None]).view(1, 3).expand(3, 3)   # its weights
    after_hue = torch.arange(3, device=x.device) >= hue_place[:, None]             # (B, 3)
    factor = factors.gather(1, order)
    factor = torch.cat([torch.where(after_hue, 1, factor), torch.where(after_hue, factor, 1)], 1)
    factor, kind = factor[:, :, None, None], order.repeat(1, 2)[:, :, None, None]  # (B, 6, 1, 1)
    a = factor * colours + (1 - factor) * (kind == 2) * to_gray                    # (B, 6, 3, 3)
    c = (1 - factor) * (kind == 1) * to_gray
    for place in range(6):
        x = shift_hue(x, shift) if place == 3 else x
        pixels = x.flatten(2)                                                      # (B, 3, HW)
        mean = c[:, place] @ pixels.mean(2, keepdim=True)
        x = torch.baddbmm(mean, a[:, place], pixels).clamp_(0, 1).view_as(x)
    return x


def shift_hue(x, shift):
    """Shift the hue of x (B, 3, H, W) by `shift` (B,), in turns of the colour wheel, in HSV."""
    high, which = x.max(1, keepdim=True)                                           # (B, 1, H, W)
    chroma = high - x.amin(1, keepdim=True)
    following = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, which)      # g - b if r is highest, ...
    hue = following / chroma.clamp_min(1e-9) + 2 * which + 6 * shift[:, None, None, None]
    k = (hue + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6         # (B, 3, H, W)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def resampling(start, size, side, n):
    """Matrices (..., n, n) that resize the pixels [start, start + size) to `side` pixels with PIL's
    bicubic kernel; start, size, side: (...). Rows from `side` to n are not used."""
    pixel = torch.arange(n, device=start.device) + 0.5
    start, size, side = start[..., None], size[..., None], side[..., None]
    center = start + pixel * (size / side)                                         # (..., n)
    d = (center[..., None] - pixel).abs().clamp(max=2)                             # (..., n, n)
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    weight = weight * ((pixel > start) & (pixel < start + size))[..., None, :]
    return weight / weight.sum(-1, keepdim=True)


# --- Networks, which normalise their input in [0, 1] themselves ------------------------------
# A script uses an encoder's `dim`, and a discriminator's `dims` and `features`.

class Encoder(nn.Module):
    """ResNet-18 with the CIFAR stem (3x3, no max-pool): (B, 3, H, W) in [0, 1] -> (B, dim)."""

    def __init__(self, width=64):
        super().__init__()
        self.dim = 8 * width
        blocks = [BasicBlock(width, width), BasicBlock(width, width)]
        for w in (width, 2 * width, 4 * width):
            shortcut = nn.Sequential(nn.Conv2d(w, 2 * w, 1, 2, bias=False), nn.BatchNorm2d(2 * w))
            blocks += [BasicBlock(w, 2 * w, 2, shortcut), BasicBlock(2 * w, 2 * w)]
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = (x - 0.5) / 0.25
        return self.net(x.contiguous(memory_format=torch.channels_last))


def mlp(in_dim, hidden_dim, out_dim):
    """Projector or predictor: Linear, BatchNorm, ReLU, Linear."""
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
                         nn.Linear(hidden_dim, out_dim))


def pool(maps):
    """Mean and variance of each channel over its pixels: (B, C, H, W) -> (B, 2C), in fp32."""
    variance, mean = torch.var_mean(maps.float(), (2, 3), correction=0)
    return torch.cat([mean, variance], 1)


def conv(in_channels, out_channels):
    """3x3 convolution and LeakyReLU. PyTorch's own initialisation would leave f near 0."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, a=0.1)
    nn.init.zeros_(layer.bias)
    return layer, nn.LeakyReLU(0.1)


class Discriminator(nn.Module):
    """The EBM's network: (B, 3, H, W) in [0, 1] -> f (B,), the negative energy.

    `features(x, layers)` -> (B, dims[layers]): mean and variance of each channel of the last map,
    of which f is a linear function, or of every stage's map. `standardise_features` sets their
    scale. `rotation` is the head of the rotation loss. Layers as in ADE, arXiv:1904.12083.
    """

    def __init__(self, width=64):
        super().__init__()
        w, self.dims = width, {"last": 8 * width, "all": 20 * width}
        self.stages = nn.ModuleList([nn.Sequential(*conv(3, w), *conv(w, 2 * w)),
                                     nn.Sequential(*conv(2 * w, 2 * w), *conv(2 * w, 4 * w)),
                                     nn.Sequential(*conv(4 * w, 4 * w))])
        self.linear = nn.Linear(8 * w, 1)
        self.rotation = nn.Linear(8 * w, 4)
        self.register_buffer("feature_mean", torch.zeros(20 * w))
        self.register_buffer("feature_std", torch.ones(20 * w))
        self.to(memory_format=torch.channels_last)

    def maps(self, x):
        x = ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            x = stage(F.avg_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps              # (B, 2w, H, W), (B, 4w, H/2, W/2), (B, 4w, H/4, W/4)

    def forward(self, x):
        return self.linear(pool(self.maps(x)[-1])).squeeze(1)

    def features(self, x, layers="last"):
        maps, dim = self.maps(x), self.dims[layers]
        pooled = torch.cat([pool(m) for m in (maps if layers == "all" else maps[-1:])], 1)
        return (pooled - self.feature_mean[-dim:]) / self.feature_std[-dim:]       # (B, dim)


class Generator(nn.Module):
    """DCGAN with BatchNorm (arXiv:1511.06434): (B, z_dim) -> (B, 3, 32, 32) in [0, 1]."""

    def __init__(self, width=64, z_dim=128):
        super().__init__()
        self.z_dim = z_dim
        layers, channels = [], z_dim
        for out, stride, padding in [(4 * width, 1, 0), (2 * width, 2, 1), (width, 2, 1)]:
            layers += [nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False),
                       nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, z):
        return self.net(z[:, :, None, None])


class NoisyGenerator(Generator):
    """ADE's generator: start(z) -> x_0 = mu(z) + sigma(z) / 2 * N(0, 1), and log sigma(z).

    Both are (B, 3, 32, 32). mu in [0, 1] and sigma, up to 1e-3 in units of [-1, 1], are branches
    from one 4x4 map. `eps` is the step size of `adversarial_dynamics`, which is learned, too.
    """

    def __init__(self, width=64, z_dim=128):
        super().__init__(width, z_dim)
        self.sigma = Generator(width, z_dim).net[3:]
        self.eps = nn.Parameter(torch.full((3, 32, 32), 10.0))

    def start(self, z):
        map_4x4 = self.net[:3](z[:, :, None, None])
        mu, sigma = self.net[3:](map_4x4).float(), 1e-3 * self.sigma(map_4x4).float()
        return mu + sigma / 2 * torch.randn_like(mu), (sigma + 1e-6).log()


@contextmanager
def batch_statistics(module):
    """Within the context, BatchNorm in `module` does not update its running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


# --- Samplers: Langevin dynamics, and that of adversarial dynamics embedding (ADE) ------------
# f is any differentiable function from images (B, ...) to (B,).

def mix_with_noise(x, alpha):
    """Start of a chain: I_0 = alpha * x + (1 - alpha) * U(0, 1), for x in [0, 1] of any shape."""
    return alpha * x + (1 - alpha) * torch.rand_like(x)


def langevin(f, x, steps, step_size, noise_std, grad_clip=0.01):
    """Langevin dynamics, which ascends f: I <- I + step_size * grad f(I) + N(0, noise_std^2).

    x: (B, ...) in [0, 1] -> detached sample in [0, 1]; f: (B, ...) -> (B,), its weights unchanged.
    The gradient is clamped element-wise to +-grad_clip, the image to [0, 1]. noise_std is in units
    of the pixel range. Memory does not grow with `steps`. Source: IGEBM, arXiv:1903.08689.
    """
    x = x.detach()
    for _ in range(steps):
        with torch.enable_grad():
            gradient, = torch.autograd.grad(f(x.requires_grad_()).sum(), x)
        step = step_size * gradient.clamp(-grad_clip, grad_clip)
        x = (x.detach() + step + noise_std * torch.randn_like(x)).clamp(0, 1)
    return x


def adversarial_dynamics(f, x, p, eps, steps=30, grad_clip=0.01):
    """ADE's sampler, differentiable in x, p and eps (arXiv:1904.12083, as in its authors' code).

    With q = 2 x - 1, in [-1, 1], and g(q) = clip(grad_q f, +-grad_clip), taken as constant:

        p <- p / 2 + eps / 2 * g(q)                                      half a step, then
        q <- clip(q + p, +-1),  p <- p / 2 + eps * g(q)                  `steps` times,

    the last with eps / 2. f: (B, 3, H, W) in [0, 1] -> (B,); x in [0, 1] and p: (B, 3, H, W);
    eps: (3, H, W). Returns the final x, in [0, 1], and p. The graph holds no activation of f.
    """
    q = 2 * x - 1
    for step in range(steps + 1):
        q = (q + p).clamp(-1, 1) if step else q
        with torch.enable_grad():
            at = q.detach().requires_grad_()
            gradient, = torch.autograd.grad(f((at + 1) / 2).sum(), at)
        size = eps if 0 < step < steps else eps / 2
        p = p / 2 + size * gradient.clamp(-grad_clip, grad_clip)
    return (q + 1) / 2, p


def run_chain(f, x, steps, args):
    """`steps` steps of `langevin` with the flags' settings, from x (B, 3, H, W) in [0, 1]."""
    if f is None and min(steps, args.step_size, args.grad_clip) > 0:
        raise UserError("the Langevin view needs an EBM, but no flag asks for one; see "
                        "WITHOUT_EFFECT in common.py")
    f = f or (lambda x: x.flatten(1).sum(1))              # it does not matter
    return langevin(f, x, steps, args.step_size, args.noise_std * args.noise_unit, args.grad_clip)


def langevin_view(f, x, args):
    """Final samples, in [0, 1], of the chains that start at images x (B, 3, H, W), uint8."""
    return run_chain(f, mix_with_noise(x / 255, args.alpha), args.steps, args)


# --- Losses, learning rate, moving average ---------------------------------------------------
# Losses take embeddings (B, D) and are computed in fp32, whatever the networks computed in.

def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nt_xent(z1, z2, temperature=0.5):
    """SimCLR's loss (arXiv:2002.05709, eq. 1) of the 2B views z1, z2 of B images, (B, D) each.

    Each view has to find its image's other view among 2B - 1 candidates, by cosine similarity; they
    come from all ranks, with gradient. All-equal similarities give log(2B - 1).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(at_least_fp32(z1)), F.normalize(at_least_fp32(z2))
        keys = torch.cat([gather(z1), gather(z2)])                                 # (2N, D)
        similarity = torch.cat([z1, z2]) @ keys.T / temperature                    # (2B, 2N)
    n, index = len(keys) // 2, torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    itself, partner = torch.cat([index, index + n]), torch.cat([index + n, index])
    return F.cross_entropy(similarity.scatter(1, itself[:, None], -math.inf), partner)


def byol_loss(p, t):
    """BYOL's loss (arXiv:2006.07733, eq. 2): the mean of |p/|p| - t/|t||^2 = 2 - 2 cos(p, t).

    p, t: (B, D) -> scalar in [0, 4]; no gradient flows into the target t.
    """
    return 2 - 2 * F.cosine_similarity(at_least_fp32(p), at_least_fp32(t.detach())).mean()


def z_std(z):
    """Spread of the embeddings z (B, D) on the unit sphere: 1 if they fill it, 0 if collapsed."""
    return F.normalize(z.detach().float()).std(0).mean() * z.shape[1] ** 0.5


def lr_factor(schedule, total_steps):
    """The function step -> factor of the learning rate: linear warm-up over 500 steps, at most a
    tenth of `total_steps`, then the schedule as in the help of --schedule."""
    warmup = min(500, total_steps // 10)
    drops = [round(share * total_steps) for share in (0.95, 0.975)]

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "step":
            return 0.2 ** sum(step >= drop for drop in drops)
        return (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))) / 2
    return factor


def target_tau(tau, progress):
    """BYOL's EMA momentum: a cosine from tau at progress 0 to 1 at progress 1."""
    return 1 - (1 - tau) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def ema_update(target, online, tau):
    """target <- tau * target + (1 - tau) * online, for parameters; buffers are not averaged."""
    torch._foreach_lerp_([*target.parameters()], [*online.parameters()], 1 - tau)


# --- Devices: where and in what precision a step is computed ---------------------------------

def prepare_device(args):
    """Set up args.device; under torchrun join the other ranks, which wait a day for the EBM."""
    joins = "RANK" in os.environ and not dist.is_initialized()
    if joins and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        cause = str(error).split("\n")[0]
        raise UserError(f"--device {args.device}: cannot be used ({cause})") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: use cpu or cuda; on mps, BatchNorm of "
                        "channels_last images has wrong gradients (pytorch#175189)")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("highest")                # whatever the environment says
    if joins:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))


def resolve_precision(args):
    """--precision; auto is bf16 where it is native and faster than fp32, else fp32.

    That is so on GPUs with bf16, CPUs with AMX, and AMD's with AVX512 bf16 (not on Intel's).
    """
    if args.device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if args.precision == "auto" and not native:
            show("this GPU has no bf16, so auto is fp32; --precision fp16 may be much faster")
    else:
        info = Path("/proc/cpuinfo")
        amd = "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())
        native = torch.backends.cpu.get_cpu_capability() == "AVX512" and (
            torch.cpu._is_amx_tile_supported() or amd and torch.cpu._is_avx512_bf16_supported())
    auto = "bf16" if native else "fp32"
    return auto if args.precision == "auto" else args.precision


def autocast(args):
    """The context in which networks compute in args.precision."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(args.device).type, dtype, enabled=args.precision != "fp32")


def grad_scaler(args):
    """Scales the loss so that fp16 gradients do not underflow; does nothing in other precisions."""
    return torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")


def distribute(model):
    """The model, under DistributedDataParallel if there are several ranks."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        show("note: BatchNorm is not synchronised across CPU processes")
    return nn.parallel.DistributedDataParallel(model)


class Graphed:
    """A step, a function of a tensor x to {name: scalar tensor}, replayed as a CUDA graph.

    The first three calls are eager, on the stream that will capture; the fourth is captured. The
    shape of x, Python's control flow, and random numbers from outside torch are frozen then.
    """

    def __init__(self, step):
        self.step, self.calls = step, 0
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def __call__(self, x):
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            terms = self.step(x) if self.calls <= 3 else self.replay(x)
        torch.cuda.current_stream().wait_stream(self.stream)
        return terms

    def replay(self, x):
        if self.calls == 4:
            self.x = x.clone()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.terms = self.step(self.x)
            except Exception as error:                    # torch's, on top of the step's own
                cause = str(error.__context__ or error).split("\n")[0]
                raise UserError(f"--graph: the step cannot be captured ({cause}); repeat the "
                                "command without --graph, which resumes") from error
        self.x.copy_(x)
        self.graph.replay()
        return {name: term.detach().clone() for name, term in self.terms.items()}


def graphed(step, args):
    """The step as a CUDA graph with --graph, on one NVIDIA GPU; else the step itself."""
    if not args.graph:
        return step
    if not args.device.startswith("cuda") or torch.version.hip or world_size() > 1:
        show("--graph is ignored: it needs one process on one NVIDIA GPU")
        return step
    return Graphed(step)


# --- Identity: what makes a run what it is, and its name -------------------------------------
# A run is identified by the flags that have an effect, its data and its frozen network; other code
# is reported.

NOT_IDENTITY = {"run_dir", "data_dir", "ebm", "device", "eval_every", "graph", "smoke", "file",
                "defaults", "code", "common_code", "encoder_modules", "encoder_classes"}
EBM_FLAGS = {"ebm_iters", "ebm_objective", "ebm_rotation"}
DISC_FLAGS = {"layers", "disc_input", "teacher"}
STEP_FLAGS = {"step_size", "noise_std", "noise_unit", "grad_clip"}
CHAIN_FLAGS = {"steps", "alpha", "view", *STEP_FLAGS}
WITHOUT_EFFECT = [                                        # values of flags, and what they disable
    (dict(use="dataset"), {"coeff"}),
    (dict(use="auxiliary", coeff=0), EBM_FLAGS | DISC_FLAGS | CHAIN_FLAGS),
    (dict(view="augment"), EBM_FLAGS | CHAIN_FLAGS - {"view"}),
    (dict(steps=0), EBM_FLAGS | STEP_FLAGS),
    (dict(step_size=0), EBM_FLAGS | {"grad_clip"}),
    (dict(grad_clip=0), EBM_FLAGS | {"step_size"}),
    (dict(noise_std=0), {"noise_unit"}),
    (dict(noise_unit=0), {"noise_std"}),
    (dict(ebm_iters=0), {"ebm_rotation"}),
    (dict(ebm_iters=0, ebm_objective="gan"), {"ebm_objective"}),
    (dict(ebm_iters=0, ebm_objective="cd"), {"ebm_objective"})]


def without_effect(args):
    """Names of the flags that change nothing, given the values of the others.

    A flag of one's own that is named like one of another script is not among them.
    """
    flags, foreign = {"use": "auxiliary", **vars(args)}, set()
    if "use" not in vars(args):                           # not a Langevin script
        foreign |= CHAIN_FLAGS
    if not flags.keys() & {"disc_input", "version"}:      # older results have a version
        foreign |= DISC_FLAGS
    unused = EBM_FLAGS | {"layers"} if flags.get("teacher") and "teacher" not in foreign else set()
    for values, names in WITHOUT_EFFECT:                  # what has no effect disables nothing
        if values.items() <= flags.items() and not values.keys() & (foreign | unused):
            unused = unused | names
    if EBM_FLAGS <= unused:                               # nothing needs an EBM
        unused = unused | {flag for flag in flags if flag.startswith("ebm_")}
    return unused - foreign


def parse_flags(parser, argv=None):
    """Parse the flags, set up the device, and name the run and its EBM after their settings."""
    argv = sys.argv[1:] if argv is None else argv
    if "--smoke" in argv:
        parser.set_defaults(**{a.dest: SMOKE[a.dest] for a in parser._actions if a.dest in SMOKE})
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)                      # so that everybody gets the same figures
    args = parser.parse_args(argv)
    source_files(args.file)                               # reads them before they can be edited
    if getattr(args, "use", "") == "dataset" and args.view == "augment":
        parser.error("--view augment: with --use dataset there is no third view")
    if getattr(args, "teacher", None):
        args.teacher = os.path.expanduser(args.teacher)
    args.defaults = {a.dest: a.default for a in parser._actions if a.dest not in NOT_IDENTITY
                     and a.default is not argparse.SUPPRESS}
    changed = {flag: vars(args)[flag] for flag, default in args.defaults.items()
               if vars(args)[flag] != default}            # before auto is resolved
    prepare_device(args)
    args.precision = resolve_precision(args)
    ignored = changed.keys() & without_effect(args)
    if ignored:
        show(f"without effect, given the other flags: {', '.join(sorted(ignored))}")
    if "epochs" in args and "run_dir" not in args:
        parts = [f"-{flag}={value}" for flag, value in changed.items() if flag not in ignored]
        name = args.script + "-smoke" * args.smoke + "".join(parts)
        args.run_dir = f"runs/{name.replace('/', '_')}"
    if "ebm" not in args:
        parts = ["ebm", args.dataset, args.subset or "all", f"width={args.width}",
                 args.ebm_objective, args.ebm_iters, f"rotation={args.ebm_rotation:g}",
                 *(f"{flag.removeprefix('ebm_')}={value}" for flag, value in changed.items()
                   if flag.startswith("ebm_") and flag not in EBM_FLAGS),        # of one's own
                 f"seed={args.seed}", ebm_precision(args), torch.device(args.device).type]
        args.ebm = f"runs/{'-'.join(map(str, parts))}.pt"
    if Path(args.ebm).suffix != ".pt":
        raise UserError(f"--ebm {args.ebm}: name a file that ends in .pt")
    return args


def ebm_precision(args):
    """The EBM's own precision: its small gradients are not computed in fp16."""
    return "bf16" if args.precision == "bf16" else "fp32"


@cache
def read_source(file):
    """The bytes of a Python file, read once, as it may be edited while it runs."""
    return file.read_bytes()


@cache
def source_files(script):
    """Paths of a script, of common.py, and of the modules beside them that they import, in turn;
    not of linear_eval.py, as eval.json says itself by which code it was measured."""
    files = [Path(script).resolve(), Path(__file__).resolve()]
    roots = [file.parent for file in files]
    for file in files:                                    # grows meanwhile
        for node in ast.walk(ast.parse(read_source(file))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                package = getattr(node, "module", None) or ""
                for path in [Path(*f"{package}.{alias.name}".split(".")) for alias in node.names]:
                    files += [found for place in (path, *path.parents)
                              for root in (file.parent, *roots)
                              for found in (root / f"{place}.py", root / place / "__init__.py")
                              if found.is_file() and found not in files
                              and found.stem != "linear_eval"]
    return [*dict.fromkeys(files)]


def code_checksum(files):
    """Checksum of Python files, blind to comments, docstrings, layout and Python's version."""
    def plain(x):
        if isinstance(x, list):
            docstring = lambda x: isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
            return [plain(part) for part in x if not docstring(part)]
        if isinstance(x, ast.AST):
            return [type(x).__name__, *([name, plain(value)] for name, value in ast.iter_fields(x)
                                        if value is not None and value != [])]
        return repr(x)

    trees = sorted(json.dumps([file.name, plain(ast.parse(read_source(file)))]) for file in files)
    return f"{zlib.crc32(''.join(trees).encode()):08x}"


def checksum(*tensors):
    """CRC-32 of the bytes of tensors, or of all tensors of a module."""
    if isinstance(tensors[0], nn.Module):
        tensors = tensors[0].state_dict().values()
    crc = 0
    for x in tensors:
        x = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
        crc = zlib.crc32(x.numpy(), crc)
    return crc


def data_checksum(args):
    """Checksum of all images and labels of a data set, of both splits if it has them."""
    splits = ["train", "test"] if has_test(args) else ["train"]
    return checksum(*(x for split in splits
                      for x in load_images(args.dataset, args.data_dir, split)))


DESCRIPTION = {"images": "other training images", "data": "other images or labels",
               "ranks": "another number of processes",
               **dict.fromkeys(["f", "f1", "f2"], "another EBM or frozen network")}


def check_config(path, saved, wanted):
    """UserError if what is at `path`, of the config `saved`, was made with other settings.

    A flag that one of the two lacks counts as its default.
    """
    defaults = saved.get("defaults", {}) | wanted.get("defaults", {})
    before, now = defaults | saved, defaults | wanted
    for key in sorted((before.keys() & now.keys()) - NOT_IDENTITY):
        if before[key] != now[key]:
            flag = f"--{key.replace('_', '-')} {before[key]}, not {now[key]}"
            made = DESCRIPTION.get(key, flag)
            place = "--ebm" if Path(path).suffix in (".pt", ".ebm") else "--run-dir"
            raise UserError(f"{path}: made with {made}; name another {place}, or repeat its own "
                            "settings")


def check_code(path, made_by, code):
    """Whether the code that made what is at `path` is today's; if not, a line says so."""
    if made_by != code:
        show(f"{path}: made by other code ({made_by}, kept in source-*) than today's ({code}); for "
             "results of today's alone, train anew, with another --run-dir or --ebm")
    return made_by == code


# --- Files: what training leaves in its directory, and how it resumes ------------------------
# Of an EBM's training as well as a run's.

CHECKPOINT_SECONDS = 60                                   # at least, between two checkpoints


def save(path, content):
    """Write a .json, .jsonl, .png or .pt file whole or not at all: beside `path`, then renamed."""
    beside = path.with_suffix(".new")
    if path.suffix == ".pt":
        torch.save(content, beside)
    elif path.suffix == ".png":
        save_image(content, beside, format="png")
    elif path.suffix == ".jsonl":
        beside.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def load(path, *keys):
    """Read a .json or .pt file; UserError if it is damaged, or is no dict with these keys."""
    file = io.BytesIO(path.read_bytes())
    try:
        content = (json.load(file) if path.suffix == ".json" else
                   torch.load(file, map_location="cpu", weights_only=True))
        for key in keys:
            content[key]
    except Exception as error:                            # torch and json raise many kinds
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path}: damaged, or not written by this code ({cause}); name another, "
                        "or delete it if it is yours") from error
    return content


def load_weights(module, weights, path):
    """Load a state dict from the file `path`; UserError if it is of another network."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: its weights are of another network than this code's; the code "
                        "that made it is kept beside it, in source-*") from error


def seed_of(*numbers):
    """A seed that depends on each of the numbers, such as (seed, epoch, rank)."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def set_seed(*numbers):
    """Seed torch, numpy and random, as `seed_of` says."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(seed_of(*numbers))


def provenance():
    """What training was started with, for the first line of its log."""
    git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True, text=True,
                         cwd=Path(__file__).resolve().parent, capture_output=True)
    return {"argv": sys.argv, "commit": git.stdout.strip() or None,
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


MEASURED = ("split", "data", "evaluation")                # what an accuracy was measured on and by


def describe(result):
    """The accuracies (%) in an eval.json as a line."""
    untrained = {metric: f" (untrained {value:.2f})" for metric, value in
                 result["untrained"].items() if isinstance(value, float)}
    return f"{result.get('split', 'test')} accuracy: " + ", ".join(
        metric + (" -" if value is None else f" {value:.2f} %{untrained.get(metric, '')}")
        for metric, value in result.items() if metric not in MEASURED
        and (value is None or isinstance(value, float)))


def claim(directory, config, script):
    """Make `directory` the one of this config, and copy the script and what it imports into it.

    Returns what config.json then holds: the config, and checksums of that code and of common.py; of
    both codes, if other code began it. UserError if the directory has results of other settings.
    """
    path, result, files = directory / "config.json", directory / "eval.json", source_files(script)
    saved = load(path, "code") if path.exists() else {"code": "unknown"}
    code, codes = code_checksum(files), {"common_code": code_checksum(source_files(__file__))}
    codes["code"] = code
    if result.exists() or any(directory.glob("*.pt")):
        check_config(directory, saved, config)
        check_code(directory, saved["code"], code)
        if result.exists():
            return saved
        for key, now in codes.items():
            before = saved.get(key, "unknown")
            codes[key] = before if before.endswith(now) else f"{before}+{now}"
        config = {**saved, **config}                      # saved has the checksum f, too
    config |= codes
    root = os.path.commonpath([file.parent for file in files])
    for file in [*files, Path(__file__).resolve().with_name("linear_eval.py")]:
        copied = directory / f"source-{code}" / file.relative_to(root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(read_source(file))
    save(path, config)
    return config


class Progress:
    """The log and the checkpoint of a training, in a directory.

    `state`, {name: object with a state_dict}, is restored from the checkpoint. `total` counts the
    epochs, or an EBM's iterations. A checkpoint is written at the end, and when a round ends a
    minute or more after the last one. Work after it is repeated, with equal results.
    """

    def __init__(self, directory, counter, total, state):
        self.directory, self.counter, self.total, self.state = directory, counter, total, state
        self.done, self.log, path = 0, [], directory / "checkpoint.pt"
        self.resumed = path.exists()
        if self.resumed:
            saved = load(path, "done", "log", *state)
            for name, part in state.items():
                load_weights(part, saved[name], path)
            self.done, self.log = saved["done"], saved["log"]
        self.log.append(provenance())
        self.first, self.began, self.written = self.done, time.monotonic(), time.monotonic()

    def write(self, checkpoint=True):
        """Write log.jsonl and, if due, checkpoint.pt."""
        if rank() == 0:
            save(self.directory / "log.jsonl", self.log)
        if rank() == 0 and checkpoint:
            state = {name: part.state_dict() for name, part in self.state.items()}
            save(self.directory / "checkpoint.pt", {"done": self.done, "log": self.log, **state})
            self.written = time.monotonic()

    def end_round(self, done, row, text):
        """Log a row, show the text, and write a checkpoint if one is due."""
        self.done, now = done, time.monotonic()
        self.log.append({self.counter: done, **row})
        left = (now - self.began) / (done - self.first) * (self.total - done)
        show(f"{self.counter} {done}/{self.total}  {text}  {timedelta(seconds=round(left))} left")
        self.write(done == self.total or now > self.written + CHECKPOINT_SECONDS)


def means(steps, ranks=1):
    """{name: mean over steps and ranks} of the terms of each step, {name: scalar tensor}."""
    mean = torch.stack([torch.stack([*terms.values()]).float() for terms in steps]).mean(0)
    if ranks > 1:
        dist.all_reduce(mean)
    return dict(zip(steps[0], (mean / ranks).tolist()))               # waits for the device


# --- Energy-based model (EBM), trained on the same images ------------------------------------
# The discriminator d is the EBM's network: f = d(x) is the negative energy. An objective is a step
# function; add one here, in EBM_ADAM, in `make_ebm` and to the choices of --ebm-objective. A flag
# named --ebm-... is part of the EBM's identity.

EBM_LANGEVIN = dict(step_size=10, noise_std=0.005, grad_clip=0.01)        # IGEBM's
EBM_ADAM = {"gan": (1e-3, 2e-4, 0.9), "ade": (1e-4, 1e-4, 0.999), "cd": (1e-3, 0, 0.9)}
EBM_ROUND = 100                                     # iterations between two lines of the log
REPLAY_BUFFER = 10000                               # images in the replay buffer of cd


def ebm_networks(args):
    """{name: module or optimizer}, named like the parameters of the objective's step function.

    EBM_ADAM has the learning rates of the discriminator and the generator, and Adam's beta_2, which
    bounds a weight's step at lr / sqrt(1 - beta_2). `ade` uses its authors' 0.999, and spectral
    normalisation of the discriminator.
    """
    lr_d, lr_g, beta_2 = EBM_ADAM[args.ebm_objective]
    ade, on_gpu = args.ebm_objective == "ade", args.device.startswith("cuda")
    adam = partial(torch.optim.Adam, betas=(0.0, beta_2), fused=True, capturable=on_gpu)
    d = Discriminator(args.width)
    for layer in [*d.stages.modules(), d.linear] if ade else []:
        if hasattr(layer, "weight"):
            parametrizations.spectral_norm(layer)
    state = {"d": d.to(args.device), "optimizer_d": adam(d.parameters(), lr_d)}
    if args.ebm_objective == "cd":
        replay = nn.Module()
        replay.register_buffer("images", torch.rand(REPLAY_BUFFER, 3, 32, 32).half())
        return {**state, "replay": replay.to(args.device)}
    g = (NoisyGenerator if ade else Generator)(args.width).to(args.device)
    return {**state, "g": g, "optimizer_g": adam(g.parameters(), lr_g)}


@contextmanager
def spectral_weights(d):
    """Compute d's spectrally normalised weights once within the context, in fp32."""
    with parametrize.cached():
        with torch.autocast(d.linear.bias.device.type, enabled=False):
            for layer in d.modules():
                getattr(layer, "weight", None)        # reading it computes and caches it
        yield


def fix_spectral_norm(d):
    """Replace spectral normalisation, if d has it, by the weights that it yields; returns d."""
    for layer in d.eval().modules():                                # eval: no power iteration
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return d


def rotation_loss(d, x):
    """Rotation-prediction loss: a quarter of the batch x, in all four turns (arXiv:1811.11212)."""
    x = x[:max(1, len(x) // 4)]
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])                     # (B, 3, 32, 32)
    turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return F.cross_entropy(d.rotation(d.features(turned)).float(), turns)


def discriminator_step(x, x_s, loss_of, rotation_weight, d, optimizer_d, penalty_weight=5):
    """One step of the discriminator on images x and samples x_s (B, 3, 32, 32).

    It descends loss_of(f(x), f(x_s)) + penalty_weight (|grad f(x)|^2 + |grad f(x_s)|^2), the R1 and
    R2 penalties, + rotation_weight times the rotation loss. Returns {name: scalar} to log;
    `clamped`: the fraction of entries in grad f(x_s) that `langevin` clamps.
    """
    both = torch.cat([x, x_s]).requires_grad_()
    f = d(both).float()                                                            # (2B,)
    gradient, = torch.autograd.grad(f.sum(), both, retain_graph=True,
                                    create_graph=penalty_weight > 0)
    penalty = gradient.square().sum((1, 2, 3)).mean() * 2
    f_real, f_sample = f.chunk(2)
    loss, meters = loss_of(f_real, f_sample).mean() + penalty_weight * penalty, {}
    if rotation_weight:
        meters["rotation"] = rotation_loss(d, x)
        loss = loss + rotation_weight * meters["rotation"]
    optimizer_d.zero_grad()
    loss.backward()
    optimizer_d.step()

    meters |= {"f_real": f_real.mean(), "f_sample": f_sample.mean(),
               "gap": f_real.mean() - f_sample.mean(), "penalty": penalty,
               "auc": (f_real[:, None] > f_sample).float().mean(),
               "clamped": (gradient[len(x):].abs() >= EBM_LANGEVIN["grad_clip"]).float().mean(),
               "sample_mean": x_s.mean(), "sample_std": x_s.std(0).mean(),
               "data_std": x.std(0).mean()}
    return {name: value.detach() for name, value in meters.items()}


def generator_step(x_s, loss, rotation_weight, d, optimizer_g):
    """One step of the generator on loss - f(x_s) + 0.2 rotation_weight times the rotation loss."""
    d.requires_grad_(False)                 # else autocast reuses stale casts of d's weights
    with spectral_weights(d):
        loss = loss - d(x_s).float().mean()
        if rotation_weight:
            loss = loss + 0.2 * rotation_weight * rotation_loss(d, x_s)
    optimizer_g.zero_grad()
    loss.backward()
    optimizer_g.step()
    d.requires_grad_(True)


def gan_step(x, rotation_weight, d, optimizer_d, g, optimizer_g):
    """One step of a logistic GAN with Langevin-refined samples, on images x (B, 3, 32, 32).

    The samples x_s are g(z) and, for a quarter of the batch, mix_with_noise(x, 0.6), after five
    Langevin steps. The discriminator descends softplus(-f(x)) + softplus(f(x_s)) and the penalties
    of `discriminator_step`. The generator ascends f(x_s); its gradient skips the Langevin steps,
    which only add to g(z). Returns what `discriminator_step` does.
    """
    b = len(x)
    x_g = g(torch.randn(b - b // 4, g.z_dim, device=x.device)).float()
    x_0 = torch.cat([x_g, mix_with_noise(x[:b // 4], 0.6)])                        # (B, 3, 32, 32)
    x_s = langevin(d, x_0, steps=5, **EBM_LANGEVIN)
    meters = discriminator_step(x, x_s, lambda real, sample: F.softplus(-real) + F.softplus(sample),
                                rotation_weight, d, optimizer_d)
    x_s = x_g + (x_s - x_0).detach()[:len(x_g)]
    generator_step(x_s, 0, rotation_weight, d, optimizer_g)
    return meters


def ade_step(x, rotation_weight, d, optimizer_d, g, optimizer_g):
    """One step of adversarial dynamics embedding (arXiv:1904.12083) on images x (B, 3, 32, 32).

    `adversarial_dynamics` leads from the generator's x_0 and p_0 ~ N(0, (1e-4)^2) to x_s and p_T.
    The discriminator, spectrally normalised, descends f(x_s) - f(x). The generator and its eps
    descend -f(x_s) + 1e-5 |p_T|^2 + 1e-5 sum(-log sigma): energy, kinetic energy, entropy of x_0.
    """
    x_0, log_sigma = g.start(torch.randn(len(x), g.z_dim, device=x.device))        # (B, 3, 32, 32)
    with spectral_weights(d):
        x_s, p = adversarial_dynamics(d, x_0, 1e-4 * torch.randn_like(x_0), g.eps)
        meters = discriminator_step(x, x_s.detach(), lambda real, sample: sample - real,
                                    rotation_weight, d, optimizer_d, penalty_weight=0)
    kinetic, entropy = p.square().sum((1, 2, 3)).mean(), log_sigma.sum((1, 2, 3)).mean()
    generator_step(x_s, 1e-5 * (kinetic - entropy), rotation_weight, d, optimizer_g)
    return meters | {"kinetic": kinetic.detach(), "entropy": entropy.detach(),
                     "eps": g.eps.detach().mean()}


def cd_step(x, rotation_weight, d, optimizer_d, replay):
    """One step of contrastive divergence as in IGEBM (arXiv:1903.08689) on images x (B, 3, 32, 32).

    The samples x_s are images of the replay buffer after 15 more Langevin steps; 5 % start anew at
    U(0, 1). The discriminator descends f(x_s) - f(x) + f(x)^2 + f(x_s)^2 and the penalties of
    `discriminator_step`, which take the place of IGEBM's spectral normalisation.
    """
    index = torch.randperm(len(replay.images), device=x.device)[:len(x)]           # distinct
    x_0 = replay.images[index].float()                                             # (B, 3, 32, 32)
    fresh = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.05
    x_s = langevin(d, torch.where(fresh, torch.rand_like(x_0), x_0), steps=15, **EBM_LANGEVIN)
    replay.images[index] = x_s.half()
    return discriminator_step(
        x, x_s, lambda real, sample: sample - real + real.square() + sample.square(),
        rotation_weight, d, optimizer_d)


def standardise_features(d, images, args, view=augment):
    """Scale d's features to mean 0 and variance 1 over a view of images (N, 3, H, W), uint8."""
    torch.manual_seed(seed_of(args.seed, args.ebm_iters))            # always the same views
    with torch.no_grad(), autocast(args):
        features = torch.cat([d.features(view(x.to(args.device)), "all")
                              for x in images.split(500)])
    std, mean = torch.std_mean(features, 0, correction=0)
    d.feature_mean = d.feature_mean + d.feature_std * mean
    d.feature_std = (d.feature_std * std).clamp_min(1e-6)


@torch.no_grad()
def ebm_samples(images, d, g=None, replay=None, **optimizers):
    """(96, 3, 32, 32): training images, samples, and these after 15 Langevin steps."""
    x = images[:32] / 255
    x_0 = (g.eval()(torch.randn(len(x), g.z_dim, device=x.device)) if g
           else replay.images[:len(x)].float())
    return torch.cat([x, x_0, langevin(d, x_0, steps=15, **EBM_LANGEVIN)])


def load_ebm(path, device, wanted=None):
    """The discriminator of the EBM in the file `path`, whose config has to be `wanted`, frozen."""
    saved = load(Path(path), "config", "d")
    check_config(path, saved["config"], wanted or saved["config"])
    d = Discriminator(saved["config"]["width"])
    load_weights(d, saved["d"], path)
    return d.to(device).eval().requires_grad_(False)


def make_ebm(path, config, images, args):
    """Train an EBM, or resume its training in the directory X.ebm, and save it to `path`, X.pt."""
    directory, images = path.with_suffix(".ebm"), images.to(args.device)
    more = {flag: vars(args)[flag] for flag in ("seed", "precision", "data_dir", "device")}
    config = claim(directory, {**config, **more}, __file__)
    set_seed(args.seed)
    state = ebm_networks(args)
    step = {"gan": gan_step, "ade": ade_step, "cd": cd_step}[args.ebm_objective]
    step = partial(step, rotation_weight=args.ebm_rotation, **state)
    step = graphed(autocast(args)(step), args)            # autocast as a decorator

    progress = Progress(directory, "iteration", args.ebm_iters, state)
    for start in range(progress.done, args.ebm_iters, EBM_ROUND):
        set_seed(args.seed, start)
        end, terms = min(start + EBM_ROUND, args.ebm_iters), []
        for _ in range(start, end):
            x = images[torch.randint(len(images), (64,), device=images.device)] / 255
            terms.append(step(x))
        row = means(terms)
        finite = all(p.isfinite().all() for p in state["d"].parameters())
        if not (finite and abs(row["f_real"]) + abs(row["f_sample"]) + row["penalty"] < 1e4):
            raise UserError(f"--ebm {args.ebm}: its training diverged before iteration {end}, f(x) "
                            f"= {row['f_real']:.3g}; try another --seed with another --ebm")
        progress.end_round(end, row, "f(x) {f_real:.2f}  f(sample) {f_sample:.2f}  AUC {auc:.2f}  "
                           "clamped {clamped:.0%}  sample std {sample_std:.2f}".format_map(row))

    d = fix_spectral_norm(state["d"])
    standardise_features(d, images, args)
    save(directory / "samples.png", make_grid(ebm_samples(images, **state), nrow=16))
    weights = {name: state[name].state_dict() for name in ("d", "g") if name in state}
    save(path, {"config": config, **weights})
    (directory / "checkpoint.pt").unlink(missing_ok=True)


def train_ebm(images, args):
    """The frozen discriminator of the EBM in the file args.ebm, X.pt; rank 0 trains it if missing.

    images: uint8 (N, 3, 32, 32). UserError if the training diverges or X.pt has other settings.
    """
    path, args = Path(args.ebm), copy(args)
    directory, args.precision = path.with_suffix(".ebm"), ebm_precision(args)
    flags = ["dataset", "subset", "width",
             *(flag for flag in vars(args) if flag.startswith("ebm_"))]
    config = {flag: vars(args)[flag] for flag in flags} | {"images": checksum(images)}
    config["defaults"] = {flag: value for flag, value in vars(args).get("defaults", {}).items()
                          if flag in flags}               # of a flag that an older EBM lacks
    if rank() == 0 and not path.exists():
        show(f"{directory}: training the EBM, or waiting for the process that does")
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            if not path.exists():                         # another process may have made it
                make_ebm(path, config, images, args)
    barrier()
    check_code(directory, load(path, "config")["config"].get("code"),
               code_checksum(source_files(__file__)))
    return load_ebm(path, args.device, config)


# --- Run: what a script's main calls, in this order ------------------------------------------

class Teacher(nn.Module):
    """The frozen encoder of another run, with the interface of a discriminator."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dims = encoder, dict.fromkeys(["last", "all"], encoder.dim)
        self.register_buffer("feature_mean", torch.zeros(encoder.dim))
        self.register_buffer("feature_std", torch.ones(encoder.dim))

    def features(self, x, layers="last"):
        return (self.encoder(x).float() - self.feature_mean) / self.feature_std    # (B, dim)


def modules_checksum(network):
    """Checksum of the classes of a network's modules and their settings, such as strides."""
    settings = ("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups", "eps",
                "output_size", "negative_slope")
    names = [f"{type(m).__module__.split('.')[0]}.{type(m).__name__}"
             f"{[getattr(m, name, None) for name in settings]}" for m in network.modules()]
    return zlib.crc32(" ".join(names).replace("SyncBatchNorm", "BatchNorm2d").encode())


def load_encoder(directory):
    """The encoder of the run in a directory, on the CPU; its checkpoint; its config."""
    config = load(directory / "config.json", "script", "width", "epochs", "seed")
    saved, encoder = load(directory / "checkpoint.pt", "model", "done"), Encoder(config["width"])
    weights = {name.removeprefix("encoder."): value for name, value in saved["model"].items()
               if name.startswith("encoder.")}
    load_weights(encoder, weights, directory / "checkpoint.pt")
    if config.get("encoder_modules", modules_checksum(encoder)) != modules_checksum(encoder):
        raise UserError(f"{directory}: its encoder has other modules, or settings of them, than "
                        "common.py's Encoder; only the code that made it, in source-*, can use it")
    script = Path(__file__).with_name(f"{config['script']}.py")
    check_code(directory, config.get("code"),
               code_checksum(source_files(script)) if script.exists() else "unknown")
    return encoder, saved, config


def teacher_kind(args, data):
    """What --teacher is, at any path: the settings in which it differs from the student, unless
    both have their defaults; whether its data have another checksum than `data`; and its seed as a
    difference, where 0 means equal initial weights."""
    teacher = load(Path(args.teacher) / "config.json", "script", "epochs", "seed")
    usual = {**teacher.get("defaults", {}), "coeff": 0}
    unused = without_effect(args) | {"teacher"}
    effective = {flag: value for flag, value in vars(args).items() if flag not in unused}
    student, plain = {**usual, **effective, "coeff": 0}, vars(args).get("defaults", {})
    others = [f", {flag} {value}" for flag, value in teacher.items() if flag in usual
              and flag not in ("epochs", "seed") and value != student[flag]
              and (value, student[flag]) != (usual[flag], plain.get(flag))]
    if teacher.get("data", data) != data:
        others.append(", other data")
    difference = teacher["seed"] - args.seed
    return (f"{teacher['script']} of {teacher['epochs']} epochs{''.join(others)}"
            + (f", seed {difference:+d}" if difference else ""))


class Run:
    """A script's training on images (N, 3, H, W), uint8, and its results in eval.json.

    `evaluate` is that of linear_eval.py, which imports this file.
    """

    def __init__(self, args, images, evaluate):
        self.args, self.evaluate, self.path, self.frozen = args, evaluate, Path(args.run_dir), []
        ranks, size = world_size(), args.batch_size
        if size % ranks or not 2 * ranks <= size <= len(images):
            raise UserError(f"--batch-size {size}: not 2 or more for each of {ranks} processes, or "
                            f"over the {len(images)} training images")
        unused = without_effect(args) | {"file"}
        self.config = {flag: value for flag, value in vars(args).items() if flag not in unused}
        self.config |= {"images": checksum(images), "data": data_checksum(args), "ranks": ranks}
        if self.config.get("teacher"):
            self.config["teacher"] = teacher_kind(args, self.config["data"])
        self.config = json.loads(json.dumps(self.config, default=str))   # as config.json has it
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock", is_singleton=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"{self.path}: another process is using this run") from error
            self.config = claim(self.path, self.config, args.file)
        self.result, self.by_other_code = self.path / "eval.json", False
        if self.result.exists():
            made_by = load(self.path / "config.json").get("code")
            self.by_other_code = made_by != code_checksum(source_files(args.file))
        else:
            show(f"{self.path}: on {args.device} in {args.precision}")

    def freeze(self, network, f=None):
        """`network` in eval mode and without gradients, which has to stay the same.

        `f`, the checksum of its weights, is part of the run's identity.
        """
        key, f = f"f{len(self.frozen) or ''}", f or checksum(network)
        self.frozen.append(network.eval().requires_grad_(False))
        finished = rank() == 0 and self.result.exists()          # with this network, or without it
        check_config(self.path, ({key: None} if finished else {}) | self.config,
                     {**self.config, key: f})
        self.config[key] = f
        if rank() == 0 and not finished:
            save(self.path / "config.json", self.config)
        return network

    def get_discriminator(self, images):
        """The frozen discriminator of the EBM, trained first if missing, or the encoder of
        --teacher; None if no flag needs one, or if a finished run's cannot be compared."""
        args, teacher = copy(self.args), self.config.get("teacher")
        file = Path(args.teacher) / "checkpoint.pt" if teacher else Path(args.ebm)
        if self.result.exists() and (self.by_other_code or not file.exists()):
            return None
        if teacher:
            encoder, saved, made = load_encoder(Path(args.teacher))
            if saved["done"] < made["epochs"]:
                raise UserError(f"--teacher {args.teacher}: its training is not finished")
            discriminator, args.ebm_iters = Teacher(encoder).to(args.device).eval(), 0
        elif "ebm_iters" in without_effect(args):         # nothing needs an EBM
            return None
        else:
            discriminator = train_ebm(images, args)
            made = load(Path(args.ebm), "config")["config"]
        f = checksum(discriminator)                       # without its scale, which may round anew
        if self.result.exists():                          # has it the same network as then?
            return self.freeze(discriminator, f)
        self.config |= {"f_code": made.get("code"), "f_precision": made.get("precision")}
        sees_image = getattr(args, "disc_input", "") == "image"
        if sees_image or teacher:
            view = (lambda x: x / 255) if sees_image else augment
            standardise_features(discriminator, images, args, view)
        return self.freeze(discriminator, f)

    def is_finished(self):
        """Whether the run has its results, which are then shown, unless they are of other code."""
        if not self.result.exists():
            return False
        result = load(self.result, "untrained")
        show(f"{self.path} is finished; " + (
            f"for its accuracies: python linear_eval.py {self.path}" if self.by_other_code else
            describe(result)))
        evaluate = getattr(self.evaluate, "func", self.evaluate)     # of a partial
        if result.get("evaluation") != getattr(evaluate, "code", None):
            show("These accuracies are of another linear_eval.py. To measure anew: python "
                 f"linear_eval.py {self.path} --data-dir {self.args.data_dir}")
        return True

    def epochs(self, **state):
        """Yield the epochs that are left; state: a model with an `encoder`, optimizer, schedule.

        The encoder is evaluated before its first step, too. UserError if a loss or a weight is not
        finite, or if the frozen network changed.
        """
        args, self.model, self.noted = self.args, state["model"], False
        progress = Progress(self.path, "epoch", args.epochs, state)
        kept = [checksum(network) for network in self.frozen]        # the checkpoint has them, too
        self.config["encoder_modules"] = modules_checksum(self.model.encoder)
        if rank() == 0:
            save(self.path / "config.json", self.config)
        if not progress.resumed:
            show("evaluating the untrained encoder", passing=True)
            untrained = self.evaluate(self.model.encoder, args) if rank() == 0 else None
            progress.log.append({"epoch": 0, **(untrained or {})})
            progress.write()
        self.untrained = progress.log[1]                  # after the provenance

        def check_range(encoder, inputs):                 # of the first batch
            hook.remove()
            for x in filter(torch.is_tensor, inputs):
                low, high = x.aminmax()
                if low < -0.5 or high > 1.5:
                    raise UserError(f"the encoder is trained on values from {low:.1f} to {high:.1f}"
                                    ", but evaluated on images in [0, 1]; normalise in the encoder")

        hook = self.model.encoder.register_forward_pre_hook(check_range)
        for epoch in range(progress.done + 1, args.epochs + 1):
            set_seed(args.seed, epoch, rank())
            self.steps, began = [], time.monotonic()
            lr = state["optimizer"].param_groups[0]["lr"]
            yield epoch
            row = means(self.steps, world_size())
            seconds = time.monotonic() - began
            finite = all(p.isfinite().all() for p in self.model.parameters())
            if not (finite and math.isfinite(sum(row.values()))):
                raise UserError(f"--lr {args.lr}: the loss or a weight is not finite after epoch "
                                f"{epoch}, {row}; try a smaller one with another --run-dir")
            if [checksum(network) for network in self.frozen] != kept:
                raise UserError("the network that was to stay frozen has changed: is it updated, "
                                "or in training mode?")
            speed = len(self.steps) * args.batch_size / seconds
            row |= {"seconds": round(seconds, 3), "lr": lr, "images_per_s": round(speed, 1)}
            if rank() == 0 and args.eval_every and epoch % args.eval_every == 0:
                row |= self.evaluate(self.model.encoder, args, metrics=["knn5"]) or {}
            progress.end_round(epoch, row, f"loss {row['loss']:.4f}  z_std {row['z_std']:.2f}  "
                                           f"{speed:.0f} images/s")

    def batches(self, images, epoch):
        """Yield this rank's share, (batch size / ranks, 3, H, W), of each full batch of images."""
        shuffled = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
        order = torch.randperm(len(images), generator=shuffled).to(images.device)
        size, per_epoch = self.args.batch_size, len(images) // self.args.batch_size
        for step, batch in enumerate(order.split(size)[:per_epoch]):
            show(f"epoch {epoch}: step {step}/{per_epoch}", passing=True)
            yield images[batch.chunk(world_size())[rank()]]

    def log(self, **terms):
        """Keep a step's scalar tensors; the log has their means over an epoch."""
        if not self.noted:
            self.noted = True
            unused = [name for name, p in self.model.named_parameters()
                      if p.requires_grad and p.grad is None]
            if unused and world_size() > 1:
                raise UserError(f"without gradient, which several processes cannot train: {unused}")
            if unused:
                show(f"note: without gradient, so never trained: {', '.join(unused)}")
        self.steps.append({name: value.detach() for name, value in terms.items()})

    def save_chain(self, f, x):
        """Save the chains of images x (B, 3, H, W), uint8, as langevin.png and chain.json.

        The picture has the rows x, I_0, I_5, I_10, ..., I_steps. The numbers are, for each I, the
        mean PSNR to x (dB) and the mean of f.
        """
        args, x = self.args, x / 255
        if "alpha" in without_effect(args):               # there is no chain
            return
        marks = [*range(0, args.steps, 5), args.steps]
        torch.manual_seed(args.seed)
        with autocast(args):
            rows = [mix_with_noise(x, args.alpha)]
            for done, mark in zip(marks, marks[1:]):
                rows.append(run_chain(f, rows[-1], mark - done, args))
            f_of_x, *values = [f(image).float().mean().item() if f else None
                               for image in [x, *rows]]
        errors = [(image - x).square().mean((1, 2, 3)).clamp_min(1e-10) for image in rows]
        psnr = [-10 * error.log10().mean().item() for error in errors]
        if rank() == 0:
            save(self.path / "langevin.png", make_grid(torch.cat([x, *rows]), nrow=len(x)))
            save(self.path / "chain.json",
                 {"steps": marks, "psnr": psnr, "f": values, "f_of_x": f_of_x})
        show(f"Langevin dynamics, {args.steps} steps: PSNR {psnr[0]:.1f} -> {psnr[-1]:.1f} dB"
             + (f", f {values[0]:.2f} -> {values[-1]:.2f} (images {f_of_x:.2f})" if f else ""))

    def generate_images(self, f, images):
        """Final samples of the chains from images (N, 3, H, W), uint8; kept in generated.pt."""
        path = self.path / "generated.pt"
        if rank() == 0 and not path.exists():
            torch.manual_seed(self.args.seed)
            samples, parts = [], images.split(500)
            for x in parts:
                show(f"generating images: {len(samples)}/{len(parts)}", passing=True)
                with autocast(self.args):
                    image = langevin_view(f, x, self.args)
                samples.append((image * 255).round().byte().cpu())
            save(path, {"images": torch.cat(samples)})
        barrier()
        return load(path, "images")["images"].to(images.device)

    def finish(self, encoder):
        """Evaluate the trained encoder, and save its accuracies and the untrained one's."""
        show("evaluating the encoder", passing=True)
        result = self.evaluate(encoder, self.args) if rank() == 0 else None
        if encoder is not self.model.encoder:
            show("note: these accuracies are not of model.encoder, which --teacher, a new "
                 "measurement and the untrained accuracies use")
        if result:
            same = all(self.untrained.get(key) == result.get(key) for key in MEASURED)
            if not same:
                show("the untrained encoder was measured by another linear_eval.py; left out")
            result["untrained"] = {metric: self.untrained[metric] for metric in self.untrained
                                   if same and metric in result and metric not in MEASURED}
            save(self.result, result)
            show(describe(result))
        barrier()
        if rank() == 0:
            self.lock.release()


def main():
    args = parse_flags(make_parser("Train the EBM alone; scripts then load it.", __file__, False))
    if rank() == 0 and Path(args.ebm).exists():
        raise UserError(f"--ebm {args.ebm}: exists already; delete it or name another file")
    train_ebm(training_images(args), args)
    show(f"{args.ebm} is trained; evaluate it by python linear_eval.py --untrained {args.ebm}")


if __name__ == "__main__":
    launch(main)
