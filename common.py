"""What the four experiments share, in the order in which the data flows.

Flags, data, augmentation, networks, the Langevin sampler, losses, the energy-based model (EBM),
runs, evaluation, several devices. Outside a network images are in [0, 1], or uint8 at rest.

    python common.py --ebm-iters 4000       # train the EBM alone; the scripts do it when they need to
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

# --- Flags: the common ones, and how a mistake reaches the user ------------------------------


class UserError(Exception):
    """A mistake with a remedy: `launch` prints its one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) in [low, high]."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def make_parser(doc):
    """A parser with the flags that all scripts share; `doc` is the script's docstring."""
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="where the images come from",
        choices=["cifar10", "cifar100", "stl10", "folder", "synthetic"])
    add("--data-dir", default="data",
        help="where to download to; for folder: DIR of DIR/{train,test}/<class>/*")
    add("--subset", type=number(int, 0), default=0, help="training images to use; 0: all")
    add("--width", type=number(int, 1), default=64, help="channels of every network's first layer")
    add("--epochs", type=number(int, 1), default=1000, help="passes over the training images")
    add("--batch-size", type=number(int, 2), default=256, help="images a step, over all devices")
    add("--lr", type=number(float, 0), default=3e-3, help="Adam's learning rate after warm-up")
    add("--schedule", choices=["step", "cosine"], default="step",
        help="step: times 0.2 at 95%% and 97.5%% of the epochs; cosine: down to 0")
    add("--emb", type=number(int, 1), default=64, help="dimension of the embedding z")
    add("--seed", type=number(int, 0), default=0, help="of weights, batches, views and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="of the networks; auto: bf16 where the device computes in it natively")
    add("--run-dir", help="directory of the run (default: runs/<script>-<flags that differ>)")
    add("--eval-every", type=number(int, 0), default=0, help="epochs between logged kNN; 0: never")
    add("--ebm", help="file of the EBM, made if missing (default: runs/ebm-<what made it>.pt)")
    add("--ebm-iters", type=number(int, 0), default=20000,
        help="training iterations of the EBM; 0 leaves it untrained, a control")
    add("--ebm-objective", choices=["ade"], default="ade",
        help="where f's negatives come from; ade: a generator, refined by Langevin steps")
    add("--smoke", action="store_true", help="preset of the other flags: two minutes on a CPU")
    return parser


SMOKE = dict(dataset="synthetic", subset=4000, width=12, epochs=12, batch_size=100,
             schedule="cosine", ebm_iters=100)
NEUTRAL = {"run_dir", "device", "eval_every"}           # flags that leave the result as it is


def parse_flags(parser, argv=None):
    """Parse, with the preset of --smoke, and fill in where the run and its EBM are kept."""
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)

    def differing(flags):
        values = [(flag, getattr(args, flag)) for flag in flags]
        return [f"{flag}={Path(value).stem if flag in ('data_dir', 'ebm') else value}"
                for flag, value in values if value != parser.get_default(flag)]

    run_name = [Path(parser.prog).stem, *differing(f for f in vars(args) if f not in NEUTRAL)]
    ebm_name = ["ebm", args.dataset, *differing(["data_dir", "subset", "width"]),
                args.ebm_objective, f"{args.ebm_iters}.pt"]
    args.run_dir = args.run_dir or "runs/" + "-".join(run_name)
    args.ebm = args.ebm or "runs/" + "-".join(ebm_name)
    return args


def launch(main):
    """Run a script's `main`; a mistake or a signal becomes one line and an exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


# --- Data: uint8 images in memory ------------------------------------------------------------


@lru_cache
def load_images(dataset, data_dir, split):
    """Load the "train" or "test" split of a data set.

    Returns uint8 images (N, 3, 32, 32) and int64 labels (N,), -1 where there is none (STL-10's
    unlabelled part). Raises UserError where the data cannot be had or read.
    """
    if dataset == "synthetic":
        return draw_shapes(10000, seed=0) if split == "train" else draw_shapes(2000, seed=1)
    if dataset == "folder":
        return read_folder(Path(data_dir), split)
    try:
        if dataset == "stl10":
            parts = {"train": "train+unlabeled", "test": "test"}
            data = torchvision.datasets.STL10(data_dir, parts[split], download=True)
            images = torch.cat([TF.resize(torch.from_numpy(part), [32, 32], antialias=True)
                                for part in np.array_split(data.data, 100)])
            return images, torch.as_tensor(data.labels, dtype=torch.int64)
        source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
        data = source[dataset](data_dir, split == "train", download=True)
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--dataset {dataset}: cannot download it to {data_dir} ({error}); put it "
                        "there and name --data-dir, or use --dataset folder or synthetic") from None


def read_folder(root, split):
    """Images (N, 3, 32, 32) and labels (N,) of root/split/<class>/*, classes in order of name."""
    if not (root / "train").is_dir():
        raise UserError(f"--data-dir {root}: has no train/<class>/* (--dataset folder needs it)")
    if not (root / split).is_dir():
        raise UserError(f"--data-dir {root}: has no {split}/<class>/* to evaluate on")
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(classes)
             for path in sorted((root / split / name).glob("*")) if not path.name.startswith(".")]
    if not files:
        raise UserError(f"--data-dir {root}: no image in {root / split}/<class>/")

    def read(path):
        try:
            image = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from None
        return torch.from_numpy(np.array(image))

    with ThreadPoolExecutor() as pool:
        images = torch.stack(list(pool.map(read, [path for path, _ in files])))
    return images.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def draw_shapes(n, seed):
    """Ten classes of shapes; place, size, tilt, colours and background are nuisances.

    Returns uint8 (n, 3, 32, 32) and int64 (n,), the same ones whenever the seed is the same.
    """
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(10, (n,), generator=g)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=g)

    v, u = torch.meshgrid(*2 * [torch.linspace(-1, 1, 64)], indexing="ij")        # (64, 64)
    background = uniform(0, 1, 3) + uniform(-.4, .4, 3) * u + uniform(-.4, .4, 3) * v
    tilt, radius = uniform(-.25, .25), uniform(.4, .75)
    u, v = u - uniform(-.3, .3), v - uniform(-.3, .3)                              # (n, 64, 64)
    u, v = ((tilt.cos() * u - tilt.sin() * v) / radius, (tilt.sin() * u + tilt.cos() * v) / radius)
    disc, square = u.hypot(v), torch.maximum(u.abs(), v.abs())
    plus = (torch.minimum(u.abs(), v.abs()) < .28) & (square < 1)
    cross = ((u - v).abs().minimum((u + v).abs()) < .38) & (square < .9)
    stripes_u, stripes_v = (u * 7).sin() > 0, (v * 7).sin() > 0
    drawings = [disc < 1, (disc < 1) & (disc > .6), square < .85, (square < .9) & (square > .5),
                (v < .7) & (v > 1.9 * u.abs() - 1), plus, cross, stripes_u & (square < .9),
                stripes_v & (square < .9), (stripes_u ^ stripes_v) & (square < .9)]
    shape = torch.stack(drawings, 1)[torch.arange(n), label]                       # (n, 64, 64)
    colour = (background.mean((2, 3), keepdim=True) + uniform(.25, .6, 3)) % 1     # apart from it
    image = F.avg_pool2d(torch.where(shape[:, None], colour, background), 2)
    image = image + .04 * torch.randn(image.shape, generator=g)
    return (image.clamp(0, 1) * 255).round().byte(), label


def load_split(args, split):
    """`load_images` for the flags; --subset keeps the same random training images whatever the seed."""
    images, labels = load_images(args.dataset, args.data_dir, split)
    if split == "train" and args.subset:
        if args.subset > len(images):
            raise UserError(f"--subset {args.subset}: there are {len(images)} training images")
        keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.subset]
        images, labels = images[keep], labels[keep]
    return images, labels


# --- Augmentation: batched, every image with parameters of its own --------------------------


@torch.no_grad()
def augment(x):
    """SimCLR's augmentation with the base code's strengths; every image draws its own parameters.

    x: (B, 3, H, W), uint8 or float in [0, 1] -> float in [0, 1]. In this order: colour jitter
    (0.4, 0.4, 0.4, 0.1) with probability 0.8, gray with 0.1, a bicubic crop of 0.2 to 1 of the area
    with ratio 3/4 to 4/3, flip with 0.5. The distribution is torchvision's, image by image.
    """
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    b, _, height, width = x.shape

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, device=x.device)

    jittered = torch.rand(b, device=x.device) < 0.8
    factors = torch.where(jittered[:, None], uniform(0.6, 1.4, b, 3), 1)
    shift = torch.where(jittered, uniform(-0.1, 0.1, b), 0)
    order, hue_place = torch.rand(b, 3, device=x.device).argsort(1), uniform(0, 4, b).long()
    x = color_jitter(x, factors, shift, order, hue_place)
    gray = torch.rand(b, device=x.device) < 0.1
    x = torch.where(gray[:, None, None, None], luminance(x), x)

    # Ten tries per image, as in torchvision's RandomResizedCrop; the whole image if none fits.
    area = height * width * uniform(0.2, 1, b, 10)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), b, 10).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)                                     # (B, 1)
    none = ~fits.any(1)
    w = w.gather(1, first)[:, 0].masked_fill(none, width)
    h = h.gather(1, first)[:, 0].masked_fill(none, height)
    left = (uniform(0, 1, b) * (width - w + 1)).floor()
    top = (uniform(0, 1, b) * (height - h + 1)).floor()
    rows, columns = resampling(top, h, height), resampling(left, w, width)
    flip = torch.rand(b, device=x.device) < 0.5
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    with torch.autocast(x.device.type, enabled=False):
        return (rows[:, None] @ x @ columns[:, None].mT).clamp(0, 1)


def color_jitter(x, factors, shift, order, hue_place):
    """Brightness, contrast and saturation (factors, (B, 3)) in each image's `order` (B, 3), the hue
    (shift in turns, (B,)) before the one at `hue_place` (B,) in 0..3."""
    for after_hue in (False, True):
        for place in range(3):
            kind = order[:, place]
            factor = factors.gather(1, kind[:, None])[:, 0]
            factor = torch.where((place >= hue_place) == after_hue, factor, 1)[:, None, None, None]
            kind, gray = kind[:, None, None, None], luminance(x)
            toward = torch.where(kind == 1, gray.mean((2, 3), keepdim=True), gray * (kind == 2))
            x = torch.lerp(toward, x, factor).clamp(0, 1)
        if not after_hue:
            x = shift_hue(x, shift)
    return x


def luminance(x):
    """Gray values of x (B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights."""
    return (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shift_hue(x, shift):
    """Turn the hue of x (B, 3, H, W) by `shift` (B,) turns, in HSV."""
    (r, g, b), high, low = x.unbind(1), x.amax(1), x.amin(1)
    chroma = high - low
    hue = torch.where(high == r, g - b, torch.where(high == g, b - r, r - g)) / chroma.clamp_min(1e-9)
    hue = hue + torch.where(high == r, 0, torch.where(high == g, 2, 4)) + 6 * shift[:, None, None]
    k = (hue[:, None] + x.new_tensor([5, 3, 1])[:, None, None]) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def resampling(start, size, n):
    """Matrices (B, n, n) that stretch pixels [start, start + size) to n, with PIL's bicubic kernel."""
    pixel = torch.arange(n, device=start.device) + 0.5
    center = start[:, None] + pixel * size[:, None] / n                            # (B, n)
    d = (center[:, :, None] - pixel).abs()                                         # (B, n, n)
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    inside = (pixel > start[:, None]) & (pixel < (start + size)[:, None])          # (B, n)
    weight = weight * (d < 2) * inside[:, None]
    return weight / weight.sum(2, keepdim=True)


# --- Networks: each takes images in [0, 1] and normalises them itself ------------------------


class Encoder(nn.Module):
    """ResNet-18 with the CIFAR stem (3x3, no max-pool): (B, 3, H, W) in [0, 1] -> (B, dim)."""

    def __init__(self, width=64):
        super().__init__()
        self.dim = 8 * width
        blocks, channels = [], width
        for out, stride in [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)]:
            shortcut = None if out == channels else nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            blocks += [BasicBlock(channels, out, stride, shortcut), BasicBlock(out, out)]
            channels = out
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


class Discriminator(nn.Module):
    """The energy f, high on data (ADE's shape, arXiv:1904.12083): (B, 3, H, W) in [0, 1] -> (B,).

    `features(x, layers)` -> (B, dims[layers]): the last stage's map, or every stage's, pooled.
    """

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.dims = {"last": 4 * w, "all": 10 * w}
        self.stages = nn.ModuleList([
            nn.Sequential(conv(3, w), nn.LeakyReLU(0.1), conv(w, 2 * w), nn.LeakyReLU(0.1)),
            nn.Sequential(conv(2 * w, 2 * w), nn.LeakyReLU(0.1), conv(2 * w, 4 * w), nn.LeakyReLU(0.1)),
            nn.Sequential(conv(4 * w, 4 * w), nn.LeakyReLU(0.1))])
        self.linear = nn.Linear(4 * w, 1)
        self.to(memory_format=torch.channels_last)

    def maps(self, x):
        x = ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        maps = []
        for stage in self.stages:
            x = stage(F.avg_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps              # (B, 2w, H, W), (B, 4w, H/2, W/2), (B, 4w, H/4, W/4)

    def forward(self, x):
        return self.linear(self.maps(x)[-1].mean((2, 3))).squeeze(1)

    def features(self, x, layers="last"):
        maps = self.maps(x)
        return torch.cat([m.mean((2, 3)) for m in (maps if layers == "all" else maps[-1:])], 1)


def conv(in_channels, out_channels):
    """3x3 convolution, He initialisation: PyTorch's own starts f near zero, and it stays there."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, a=0.1)
    nn.init.zeros_(layer.bias)
    return layer


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


# --- Langevin sampler ------------------------------------------------------------------------


def mix_with_noise(x, alpha):
    """Where a chain starts: I_0 = alpha * x + (1 - alpha) * U(0, 1), same shape as x in [0, 1]."""
    return alpha * x + (1 - alpha) * torch.rand_like(x)


def langevin(f, x, steps, step_size, noise_std, grad_clip=0.01):
    """Langevin dynamics that climbs f: I <- I + step_size * grad f(I) + N(0, noise_std^2).

    f: (B, ...) -> (B,), its weights untouched; x: (B, ...) in [0, 1] -> a detached sample in [0, 1].
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


# --- Losses: in fp32 whatever the networks computed in ---------------------------------------


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nt_xent(z1, z2, temperature=0.5):
    """SimCLR's loss (arXiv:2002.05709, eq. 1) over the 2B views z1, z2 of B images, (B, D) each.

    Every view is to find its partner among the 2B - 1 others, by cosine similarity. With several
    ranks, the others come from all of them, with gradient, and B is the sum. All-equal
    similarities give log(2B - 1).
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

    p, t: (B, D) -> scalar in [0, 4]; no gradient into the target t.
    """
    return 2 - 2 * F.cosine_similarity(at_least_fp32(p), at_least_fp32(t.detach())).mean()


def z_std(z):
    """Spread of the embeddings z (B, D) on the unit sphere: 1 if they fill it, 0 if collapsed."""
    return F.normalize(z.detach().float()).std(0).mean() * z.shape[1] ** 0.5


# --- Optimisation ----------------------------------------------------------------------------


def lr_factor(schedule, steps, epochs):
    """step -> factor of the learning rate, for a run of `steps` steps in `epochs` epochs.

    Linear warm-up over 500 steps, at most a tenth of the run. Then "step": times 0.2 after 95 % and
    97.5 % of the epochs; or "cosine": down to 0 at the end.
    """
    warmup = min(500, steps // 10)
    drops = [round(share * epochs) * steps // epochs for share in (0.95, 0.975)]

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "step":
            return 0.2 ** sum(step >= drop for drop in drops)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    return factor


def target_tau(tau, progress):
    """BYOL's moving-average rate: cosine from tau at progress 0 to 1 at progress 1."""
    return 1 - (1 - tau) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def move_average(target, online, tau):
    """target <- tau * target + (1 - tau) * online, parameters only (buffers are each network's own)."""
    for t, o in zip(target.parameters(), online.parameters()):
        t.lerp_(o, 1 - tau)


# --- Energy-based model: discriminator and generator, trained on the same images -------------

SAMPLER = dict(step_size=10, noise_std=0.005, grad_clip=0.01)        # IGEBM's, in pixel range 1
EBM_LR = 1e-3, 2e-4                                 # of discriminator and generator
BLOCK = 100                                         # iterations between log lines and checkpoints


def ebm_step(x, d, g, optimizer_d, optimizer_g):
    """One step of adversarial dynamics embedding on images x (B, 3, 32, 32); returns its meters.

    x_s: G(z) and, for a quarter of the batch, I_0 = mix_with_noise(x), refined by five Langevin steps.
    D descends softplus(-f(x)) + softplus(f(x_s)) + 5 (|grad f(x)|^2 + |grad f(x_s)|^2). G climbs
    f(x_s), its gradient passing straight through the steps, which are additive.
    """
    b = len(x)
    x_g = g(torch.randn(b - b // 4, g.z_dim, device=x.device)).float()
    x_0 = torch.cat([x_g, mix_with_noise(x[:b // 4], 0.6)])                        # (B, 3, 32, 32)
    x_s = langevin(d, x_0, steps=5, **SAMPLER)

    both = torch.cat([x, x_s]).requires_grad_()
    f = d(both).float()                                                            # (2B,)
    gradient, = torch.autograd.grad(f.sum(), both, create_graph=True)
    penalty = gradient.square().sum((1, 2, 3)).mean() * 2
    f_real, f_sample = f.chunk(2)
    loss = (F.softplus(-f_real) + F.softplus(f_sample)).mean() + 5 * penalty
    optimizer_d.zero_grad()
    loss.backward()
    optimizer_d.step()

    d.requires_grad_(False)
    loss = -d(x_g + (x_s - x_0).detach()[:len(x_g)]).float().mean()
    optimizer_g.zero_grad()
    loss.backward()
    optimizer_g.step()
    d.requires_grad_(True)

    return {"f_real": f_real.mean(), "f_sample": f_sample.mean(),
            "gap": f_real.mean() - f_sample.mean(), "penalty": penalty,
            "auc": (f_real[:, None] > f_sample).float().mean(),
            "clamped": (gradient[b:].abs() >= SAMPLER["grad_clip"]).float().mean(),
            "sample_mean": x_s.mean(), "sample_std": x_s.std(0).mean(), "data_std": x.std(0).mean()}


def train_ebm(images, args):
    """Train the EBM on images, uint8 (N, 3, 32, 32), with the flags args; returns the frozen f.

    Writes f and the generator to args.ebm, a log and a picture of samples beside it, and prints
    what a linear probe reads from f's features. Resumes. Raises UserError where f explodes; the
    last good checkpoint stays.
    """
    path, config = Path(args.ebm), ebm_config(images, args)
    partial, log = path.with_suffix(".partial"), path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed_of(args.seed))
    d, g = Discriminator(args.width).to(args.device), Generator(args.width).to(args.device)
    state = {"d": d, "g": g, "optimizer_d": torch.optim.Adam(d.parameters(), EBM_LR[0], betas=(0.0, 0.999)),
             "optimizer_g": torch.optim.Adam(g.parameters(), EBM_LR[1], betas=(0.0, 0.999))}
    first = restore(partial, config, state)
    trim_log(log, first // BLOCK)
    images, began = images.to(args.device), time.time()
    for start in range(first, args.ebm_iters, BLOCK):
        torch.manual_seed(seed_of(args.seed, start))
        end, rows = min(start + BLOCK, args.ebm_iters), []
        for _ in range(start, end):
            x = images[torch.randint(len(images), (64,), device=images.device)] / 255
            with autocast(args):
                rows.append(ebm_step(x, **state))
        row = mean_of(rows)
        if not abs(row["f_real"]) + abs(row["f_sample"]) + row["penalty"] < 1e4:
            raise UserError(f"--ebm: f exploded before iteration {end}: f(real) {row['f_real']:.3g}, "
                            f"f(sample) {row['f_sample']:.3g}, penalty {row['penalty']:.3g}; "
                            f"{partial} holds iteration {start}")
        append(log, {"iteration": end, **row})
        save(partial, config, end, state)
        left = (time.time() - began) / (end - first) * (args.ebm_iters - end)
        show(f"EBM {end}/{args.ebm_iters}  f(real) {row['f_real']:.2f}  f(sample) "
             f"{row['f_sample']:.2f}  AUC {row['auc']:.2f}  clamped {row['clamped']:.0%}  "
             f"sample std {row['sample_std']:.2f}  {duration(left)} left", end % (5 * BLOCK) == 0)
    with torch.no_grad():
        x_g = g.eval()(torch.randn(32, g.z_dim, device=images.device))
    x_s = langevin(d, x_g, steps=5, **SAMPLER)
    save_image(torch.cat([images[:32] / 255, x_g, x_s]), path.with_suffix(".png"), nrow=16)
    for name, network in [("trained", d), ("untrained", Discriminator(args.width).to(args.device))]:
        for layers in ["last", "all"]:
            result = evaluate(network, args, lambda x: network.features(x, layers))
            if result:
                show(f"linear probe of the {name} discriminator's features, {layers:4} "
                     f"{result['linear']:.2f} %")
    save(path, config, args.ebm_iters, {"d": d, "g": g})
    partial.unlink(missing_ok=True)
    return d.requires_grad_(False)


def ebm_config(images, args):
    """What an EBM was trained on and how; `images` is a checksum, so that the path does not matter."""
    flags = ["dataset", "subset", "width", "ebm_objective", "ebm_iters"]
    return {**{flag: getattr(args, flag) for flag in flags}, "images": zlib.crc32(images.cpu().numpy())}


def get_ebm(images, args):
    """The frozen f of the EBM in the file args.ebm; rank 0 trains it first if there is none."""
    if rank() == 0 and not Path(args.ebm).exists():
        train_ebm(images, args)
    barrier()
    same_config(args.ebm, load(args.ebm)["config"], ebm_config(images, args))
    return load_ebm(args.ebm, args.device)


def load_ebm(path, device):
    """The discriminator f in the file `path`, on `device`, its weights frozen."""
    saved = load(path)
    d = Discriminator(saved["config"]["width"])
    d.load_state_dict(saved["d"])
    return d.to(device).requires_grad_(False)



# --- Runs: a directory with config.json, log.jsonl, checkpoint.pt and eval.json --------------


class Run:
    """One training run in its directory: resumes, seeds, logs, checkpoints, evaluates."""

    def __init__(self, args):
        self.args, self.path, self.step = args, Path(args.run_dir), 0
        self.config = {flag: v for flag, v in vars(args).items() if flag not in NEUTRAL}
        if (self.path / "config.json").exists():
            same_config(self.path, json.loads((self.path / "config.json").read_text()), self.config)
        if (self.path / "eval.json").exists():
            print(f"{self.path} is finished: {(self.path / 'eval.json').read_text()}")
            sys.exit()
        set_up(args)
        show(f"{self.path}: on {args.device} in {'bf16' if in_bf16(args) else 'fp32'}")

    def epochs(self, **state):
        """Yield the epochs that are left, each with a random state of its own, and keep each one.

        state: what has a state_dict; a model with an `encoder`, an optimizer and a schedule.
        """
        args, log, checkpoint = self.args, self.path / "log.jsonl", self.path / "checkpoint.pt"
        first = restore(checkpoint, self.config, state)
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            save_json(self.path / "config.json", self.config)
            trim_log(log, first)
        started = time.time()
        for self.epoch in range(first + 1, args.epochs + 1):
            torch.manual_seed(seed_of(args.seed, self.epoch, rank()))
            self.rows, self.began = [], time.time()
            yield self.epoch
            row, lr = mean_of(self.rows), state["optimizer"].param_groups[0]["lr"]
            if not all(math.isfinite(value) for value in row.values()):
                raise UserError(f"--lr {args.lr}: not finite in epoch {self.epoch}: {row}, lr now "
                                f"{lr:.2g}; {self.path} holds the epoch before: try a smaller --lr")
            row = {"epoch": self.epoch, **row, "lr": lr, "images_per_s": self.images_per_s()}
            if rank() == 0:
                if args.eval_every and self.epoch % args.eval_every == 0:
                    row["knn5"] = evaluate(state["model"].encoder, args, linear=False)["knn5"]
                append(log, row)
                save(checkpoint, self.config, self.epoch, state)
            left = (time.time() - started) / (self.epoch - first) * (args.epochs - self.epoch)
            show(f"epoch {self.epoch}/{args.epochs}  loss {row['loss']:.4f}  z_std {row['z_std']:.2f}  "
                 f"{row['images_per_s']:.0f} images/s  {duration(left)} left")

    def batches(self, images):
        """This rank's share of the epoch's shuffled batches: (batch size / ranks, 3, H, W) uint8."""
        size, shuffled = self.args.batch_size, torch.Generator()
        shuffled.manual_seed(seed_of(self.args.seed, self.epoch))
        order = torch.randperm(len(images), generator=shuffled).to(images.device)
        per_epoch = len(images) // size
        for i, batch in enumerate(order.split(size)[:per_epoch], 1):
            self.step = (self.epoch - 1) * per_epoch + i                  # steps, this one included
            yield images[batch.chunk(world_size())[rank()]]
            if sys.stdout.isatty() and rank() == 0:
                show(f"epoch {self.epoch}: step {i}/{per_epoch}  loss {self.rows[-1]['loss']:.4f}  "
                     f"{self.images_per_s():.0f} images/s", last=False)

    def log(self, **terms):
        """Note a step's loss and terms, scalars; the epoch's line has their means."""
        self.rows.append({name: value.detach() for name, value in terms.items()})

    def images_per_s(self):
        return round(len(self.rows) * self.args.batch_size / (time.time() - self.began), 1)

    def evaluate(self, encoder):
        """Linear and kNN accuracy beside those of the untrained encoder: shown, and in eval.json."""
        if rank() == 0:
            result = evaluate(encoder, self.args)
            torch.manual_seed(self.args.seed)
            untrained = evaluate(Encoder(self.args.width).to(self.args.device), self.args)
            if result:
                save_json(self.path / "eval.json", {**result, "split": "test", "untrained": untrained})
                for name, row in [("trained", result), ("untrained", untrained)]:
                    show(f"{name:9} encoder: linear {row['linear']:.2f}  5-NN {row['knn5']:.2f}  "
                         f"cosine kNN {row['knn_cosine']:.2f}  (test accuracy, %)")
        barrier()


def seed_of(*numbers):
    """One seed of several numbers, such as (seed, epoch, rank), that no other numbers share."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def mean_of(rows):
    """Means of [{name: scalar tensor}], over the ranks too, as {name: float}."""
    means = torch.stack([torch.stack([*row.values()]).float() for row in rows]).mean(0)
    if world_size() > 1:
        dist.all_reduce(means)
    return dict(zip(rows[0], (means / world_size()).tolist()))


def save(path, config, done, state):
    """Write a checkpoint beside `path`, then rename it, so that there is always a whole one."""
    saved = {"config": config, "done": done, **{k: v.state_dict() for k, v in state.items()}}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(saved, beside)
    os.replace(beside, path)


def load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not a whole checkpoint of ours ({reason}); remove it") from None


def restore(path, config, state):
    """Load a checkpoint into `state` where there is one; returns how much was done, or 0."""
    if not path.exists():
        return 0
    saved = load(path)
    same_config(path, saved["config"], config)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["done"]


def same_config(path, saved, wanted):
    for flag, value in wanted.items():
        if saved.get(flag) != value:
            raise UserError(f"{path}: made with --{flag.replace('_', '-')} {saved.get(flag)}, not "
                            f"{value}; use the same flags, or another --run-dir or --ebm")


def trim_log(path, done):
    """Begin a log with a line on its origin, or keep its first `done` lines: the rest comes again."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    if lines:
        path.write_text("".join([lines[0], *lines[1:done + 1]]))
    else:
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
                             capture_output=True, text=True)
        append(path, {"argv": sys.argv, "python": sys.version.split()[0], "torch": torch.__version__,
                      "torchvision": torchvision.__version__, "commit": git.stdout.strip() or None})


def save_json(path, row):
    path.write_text(json.dumps(row, indent=1) + "\n")


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def show(line, last=True):
    """Print a line on rank 0; one that is not the last of its kind is replaced by the next."""
    if rank() == 0:
        if sys.stdout.isatty():
            print("\r\033[K" + line, end="\n" if last else "", flush=True)
        elif last:
            print(line, flush=True)


def duration(seconds):
    return str(timedelta(seconds=round(seconds)))


# --- Evaluation: frozen features, once, in evaluation mode -----------------------------------


@torch.no_grad()
def extract_features(encoder, images, encode=None):
    """Features (N, C) in fp32, on the encoder's device, of images (N, 3, H, W).

    The encoder is in evaluation mode meanwhile. `encode` is called in its place, if given.
    """
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    features = [(encode or encoder)(batch.to(device) / (255 if batch.dtype == torch.uint8 else 1)).float()
                for batch in images.split(500)]
    encoder.train(was_training)
    return torch.cat(features)


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature=None):
    """Accuracy (%) of k nearest neighbours, features (N, C), labels (N,).

    By Euclidean distance and majority (the base code's); with a temperature by cosine similarity s,
    votes weighted exp(s / temperature) (arXiv:1805.01978).
    """
    k, classes, correct = min(k, len(train_x)), int(train_y.max()) + 1, 0
    if temperature:
        train_x, test_x = F.normalize(train_x), F.normalize(test_x)
    for x, y in zip(test_x.split(500), test_y.split(500)):
        near = x @ train_x.T if temperature else -torch.cdist(x, train_x)
        near, index = near.topk(k)                                                 # (500, k)
        weight = (near / temperature).exp() if temperature else torch.ones_like(near)
        votes = weight.new_zeros(len(x), classes).scatter_add(1, train_y[index], weight)
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(test_x)


def linear_accuracy(train_x, train_y, test_x, test_y, epochs=500):
    """Accuracy (%) of a linear classifier, the base code's: Adam, batches of 1000, last epoch."""
    classifier = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=5e-6, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-6 / 1e-2) ** (1 / epochs))
    shuffled = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(train_x), generator=shuffled).to(train_x.device).split(1000):
            loss = F.cross_entropy(classifier(train_x[index]), train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return 100 * (classifier(test_x).argmax(1) == test_y).float().mean().item()


def evaluate(encoder, args, encode=None, linear=True):
    """{"linear", "knn5", "knn_cosine"} accuracies (%) of frozen features on the test images.

    None, with a printed line, where there are no test images.
    """
    train = load_split(args, "train")
    try:
        test = load_split(args, "test")
    except UserError as error:
        show(f"not evaluated: {error}")
        return None
    data = []
    for images, labels in (train, test):
        images, labels = images[labels >= 0], labels[labels >= 0]
        with autocast(args):
            data += [extract_features(encoder, images, encode), labels.to(args.device)]
    result = {"linear": linear_accuracy(*data)} if linear else {}
    return {**result, "knn5": knn_accuracy(*data, k=5),
            "knn_cosine": knn_accuracy(*data, k=200, temperature=0.1)}


# --- Devices: one or several, and what they compute in ---------------------------------------


def set_up(args):
    """Join the ranks that torchrun started, if it did, and check the device."""
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))    # rank 0 may train an EBM first
        if backend == "nccl":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.batch_size % world_size():
        raise UserError(f"--batch-size {args.batch_size}: not divisible by {world_size()} ranks")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(x):
    """Every rank's x (B, ...), concatenated in their order; the gradient finds its way back."""
    return torch.cat(dist.nn.functional.all_gather(x)) if world_size() > 1 else x


def distribute(method):
    """The method's module, under DistributedDataParallel where there are several ranks."""
    if world_size() == 1:
        return method
    if next(method.parameters()).is_cuda:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return nn.parallel.DistributedDataParallel(method)


def in_bf16(args):
    """Whether the networks compute in bf16: --precision, auto being where it is native."""
    if args.precision != "auto":
        return args.precision == "bf16"
    if args.device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=in_bf16(args))


def main():
    args = parse_flags(make_parser(__doc__))
    set_up(args)
    if Path(args.ebm).exists():
        raise UserError(f"--ebm {args.ebm}: exists already; remove it or name another file")
    train_ebm(load_split(args, "train")[0], args)


if __name__ == "__main__":
    launch(main)
