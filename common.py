"""What the four experiments share, in the order in which the data flows.

Flags, ranks, data, augmentation, networks, samplers, losses, optimisation, devices, files,
training, the energy-based model (EBM), runs: no section uses a later one. Outside a network images
are in [0, 1], or uint8 at rest.

    python common.py                        # train the EBM alone (a script does it if needed)
"""
import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache, partial, reduce
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.resnet import BasicBlock
from torchvision.utils import save_image

# --- Flags: those that all scripts share, and how a mistake is put ---------------------------
# A flag is added here, or in the one script that needs it.


class UserError(Exception):
    """A mistake with a remedy: `launch` prints its one line and exits with status 2."""


@contextmanager
def naming(what, problem, remedy, systems=False):
    """An error within becomes a UserError of one line: what has which problem, the cause, the
    remedy. Not where memory is the cause, or the system, unless its errors are meant: nothing is
    wrong with `what` then."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".split("\n")[0].split(". In PyTorch")[0]
        if (isinstance(error, (UserError, NameError)) or "memory" in cause.lower()
                or getattr(error, "errno", None) and not systems):
            raise
        raise UserError(f"{what}: {problem} ({cause.rstrip(': ')}); {remedy}") from error


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        hint = "use --dataset folder" if "'stl10'" in message else "see --help"
        raise UserError(f"{message}; {hint}")


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def make_parser(doc, training=True):
    """A parser with the flags that all scripts share; `doc` is the script's docstring."""
    parser = Parser(description=doc.split("\n")[0], usage="%(prog)s [--flag value ...]")
    add = parser.add_argument_group("images, networks and devices").add_argument
    add("--dataset", default="cifar10", help="where the images come from",
        choices=["cifar10", "cifar100", "folder", "synthetic"])
    add("--data-dir", type=os.path.expanduser, default="data",
        help="where to download to; for folder: DIR of DIR/{train,test}/<class>/*")
    add("--subset", type=number(int, 0), default=0,
        help="train on this many images; 0: all. The probe has the labels of all")
    add("--width", type=number(int, 8, 1024), default=64,
        help="channels of each network's narrowest stage, the others grow with it; at least 8")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="random seed of weights, batches, views and samples")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device: cpu, cuda, cuda:1, mps")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto",
        help="number format in the networks; auto: bf16 where the device is fast in it")
    add("--eager", action="store_true",
        help="launch each operation of a step by itself; else one GPU replays them as a CUDA graph")
    add("--smoke", action="store_true",
        help="preset of the flags not given: drawn shapes, small networks, minutes on a CPU")
    add = parser.add_argument_group("energy-based model (EBM)").add_argument
    add("--ebm", type=os.path.expanduser,
        help="its file, made if missing; None: in runs/, by its flags and --seed")
    add("--ebm-iters", type=number(int, 0, 10**9), default=4000,
        help="training iterations; 0 leaves it untrained, a control")
    add("--ebm-objective", choices=["gan", "ade", "cd"], default="gan",
        help="f's negatives: gan, a generator's after five Langevin steps; ade (adversarial "
             "dynamics embedding), after 30 with momentum; cd (contrastive divergence), replayed")
    add("--ebm-rotation", type=number(float, 0), default=0,
        help="weight of a rotation loss of the discriminator, 0.2 of it of the generator; 0: none")
    if not training:
        return parser
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**9), default=1000, help="passes over training images")
    add("--batch-size", type=number(int, 2), default=256, help="images per step, on all devices")
    add("--lr", type=number(float, 0), default=3e-3, help="Adam's learning rate after warm-up")
    add("--schedule", choices=["step", "cosine"], default="step",
        help="step: times 0.2 at 95%% and 97.5%% of the run; cosine: down to 0")
    add("--emb", type=number(int, 1, 2**16), default=64, help="dimension of the embedding z")
    add("--run-dir", type=os.path.expanduser, help="its directory; None: in runs/, by its flags")
    add("--eval-every", type=number(int, 0), default=0, help="epochs between logged kNN; 0: never")
    add("--compile", action="store_true",
        help="encoders, discriminator and augmentation by torch.compile: minutes to start, then "
             "faster steps, with other draws of the views")
    return parser


def add_langevin_flags(parser):
    """The flags of the Langevin scripts' third view."""
    add = parser.add_argument
    add("--steps", type=number(int, 0), default=15,
        help="Langevin steps; more go further from the image; 0: I_0 alone")
    add("--step-size", type=number(float, 0), default=10,
        help="factor on the gradient of f; larger climbs faster; 0: noise alone")
    add("--noise-std", type=number(float, 0), default=1.0,
        help="std of the noise of a step, in units of --noise-unit")
    add("--noise-unit", type=number(float, 0), default=0.005,
        help="what --noise-std 1 is, as a share of the pixel range")
    add("--grad-clip", type=number(float, 0), default=0.01,
        help="bound on each pixel's gradient; larger lets f move further")
    add("--alpha", type=number(float, 0, 1), default=0.6,
        help="share of the image in I_0, the rest is noise; 1: the image itself")
    add("--use", choices=["auxiliary", "dataset"], default="auxiliary",
        help="auxiliary: new images each step, as a third view; dataset: one for each training "
             "image, made once and added to them, without a view: an epoch has twice the steps")
    add("--view", choices=["langevin", "augment"], default="langevin",
        help="augment: one more ordinary view instead, a control without an EBM")


SMOKE = dict(dataset="synthetic", subset=2000, width=12, epochs=7, batch_size=32,
             schedule="cosine", ebm_iters=20, coeff=2.0, tau=0.9)


# --- Ranks and the terminal: what a script's process is among others -------------------------
# What others ask of ranks and of the terminal; `launch` runs a script's main.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def of_all_ranks(item):
    """[the item of each rank], for which each waits."""
    items = [item] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def barrier():
    """Wait for the other ranks."""
    of_all_ranks(None)


class Gather(torch.autograd.Function):
    """All ranks' x (B, ...), concatenated in their order; backward sums over the ranks."""

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
    """Print a line on rank 0; on a terminal the next line takes the place of a passing one."""
    try:
        if rank() == 0 and sys.stdout.isatty():
            print("\r\033[K" + line, end="" if passing else "\n", flush=True)
        elif rank() == 0 and not passing:
            print(line, flush=True)
    except OSError as error:                              # its reader has gone, or a disk is full
        sys.stdout = open(os.devnull, "w")
        show_error(f"stdout: {error.strerror}; going on without it")


def show_error(line):
    """Print a line on stderr, if there is still one."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def launch(main):
    """Run a script's `main`; a mistake or a signal becomes one line and an exit status."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # it was closed
        if hasattr(getattr(sys, name), "reconfigure"):                   # a notebook's has it not
            getattr(sys, name).reconfigure(errors="backslashreplace")    # print any name and sign
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if any(w in repr(error) for w in ("MemoryError", "out of memory", "allocate memory")):
            error = "out of memory; use a smaller --batch-size or --width, or another --device"
        elif isinstance(error, RuntimeError) and "by peer" in str(error):
            error = "another rank has ended; its own line says why"
        elif isinstance(error, RuntimeError):
            raise
        show_error(f"error: {error}")
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()                  # left to the exit, it can abort
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        number, = stopped.args or [signal.SIGINT]
        signal.signal(number, signal.SIG_DFL)
        show_error("\nstopped: the same command goes on from the last checkpoint, if any "
                   "(one a minute)")
        os.kill(os.getpid(), number)                      # dies of it, as then bash ends a loop


# --- Data: uint8 images in memory ------------------------------------------------------------
# A data set is added in `load_images` and as a choice of --dataset.


@lru_cache
def load_images(dataset, data_dir, split):
    """Load the "train" or "test" split of a data set.

    Returns uint8 images (N, 3, 32, 32), int64 labels (N,). UserError where they cannot be had.
    """
    if dataset == "synthetic":
        return draw_shapes(5000, seed=0) if split == "train" else draw_shapes(1000, seed=1)
    if dataset == "folder":
        return read_folder(Path(data_dir), split)
    with naming(f"--dataset {dataset}", f"cannot download it to {data_dir}",
                "put it there and name --data-dir, or use --dataset folder or synthetic", True):
        source = getattr(torchvision.datasets, dataset.upper())
        try:
            data = source(data_dir, split == "train")
        except RuntimeError:                                         # it is not there
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(data_dir) / f"{dataset}.lock"):       # several ranks or runs may ask
                data = source(data_dir, split == "train", download=True)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def read_folder(root, split):
    """Images (N, 3, 32, 32) and labels (N,) of root/split/<class>/**, classes in order of name.

    A printed line says what is left out: files of no class or not named like an image.
    """
    if not (root / "train").is_dir():
        raise UserError(f"--data-dir {root}: has no train/<class>/* (--dataset folder needs it)")
    classes = dict.fromkeys(name for x, name in listing(root / "train") if x.is_dir())
    labels = {name: label for label, name in enumerate(classes)}
    images, others = find_images(root / split)
    if odd := (labels.keys() or {"<class>"}) ^ {name for _, name in images}:
        raise UserError(f"{root / split / min(odd)}: a class needs images in train/ (and test/)")
    if others:
        show(f"{root / split}: {len(others)} left out, no images of a class, or read already: "
             f"{others[0]}, ...")
    files = sorted((labels[name], os.path.split(path), path) for path, name in images)
    show(f"reading {len(files)} images of {root / split}", passing=True)
    with ThreadPoolExecutor() as threads:
        images = [threads.submit(read_image, path) for _, _, path in files]
    if wrong := [x.exception() for x in images if isinstance(x.exception(), UserError)]:
        raise UserError(f"{len(wrong)} of {len(images)} images failed: {wrong[0]}")
    return (torch.stack([x.result() for x in images]).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([label for label, _, _ in files]))


def listing(folder):
    """[(path, name)] in a folder, sorted, but for what is hidden or a system's own; of the two
    forms of an accent, a name has one."""
    systems = ("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found")
    return sorted((x, normalize("NFC", x.name)) for x in folder.iterdir()
                  if not x.name.startswith((".", *systems)))


def find_images(root):
    """[(path, class)] of the images root/<class>/**, and the paths of whatever else is there.

    A file or folder is met once, whatever links lead to it; UserError where they give it two
    classes. What cannot be listed is the system's OSError.
    """
    known, images, others = Image.registered_extensions(), [], []
    above = [x for x in (root, *root.resolve().parents) if os.path.exists(x)]
    met = {x.stat()[1:3]: (x, None) for x in above}       # by inode and device
    queue = listing(root)
    for path, name in queue:                              # which grows meanwhile
        place = path.stat()[1:3]
        is_image = path.is_file() and path.suffix.lower() in known and path.parent != root
        if not (is_image or path.is_dir()):
            others.append(path)
            continue
        first, owner = met.setdefault(place, (path, name))
        if owner != name:
            raise UserError(f"{path}: is {first} too, of another class; leave one out")
        if first is not path:
            others.append(path)
        elif is_image:
            images.append((path, name))
        else:
            queue += [(x, name) for x, _ in listing(path)]
    return images, others


def has_test(args):
    return args.dataset != "folder" or os.path.lexists(Path(args.data_dir) / "test")


def read_image(path):
    """An image file -> uint8 (32, 32, 3), upright, on white if transparent, 16 bits scaled to 8."""
    content = BytesIO(Path(path).read_bytes())
    with naming(path, "not a readable image", "mend or remove it"):    # PIL raises of many kinds
        image = Image.open(content)
        with suppress(Exception):                         # metadata that cannot be read, or kept
            image.getexif()                               # else a TIFF's load would raise
        image.load()
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                             # I;16, I;16B, I, F: not 8 bits
        image = eight_bits(image, path)
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC)))


def eight_bits(image, path):
    """A gray image of more than 8 bits, scaled by the range of its format, with its alpha."""
    tags = getattr(image, "tag_v2", {258: (16,), 262: 1})              # a TIFF's bits; black is 0
    gray, bits = np.asarray(image), tags[258][0]
    if (image.format not in {"PNG", "PPM", "JPEG2000", "TIFF"} or image.mode == "F" or bits > 16
            or gray.min() < 0):
        raise UserError(f"{path}: {image.format} of mode {image.mode} has no range of its own; "
                        "save it with 8 or 16 bits")
    alpha = 255 * (gray != image.info.get("transparency"))
    gray = gray * (255 / (2 ** bits - 1))
    gray = gray if tags.get(262) else 255 - gray
    return Image.fromarray(np.stack([gray.round(), alpha], 2).astype(np.uint8))


def draw_shapes(n, seed):
    """Noisy wallpapers of ten shapes; place, size, tilt, hues and brightness are nuisances.

    Returns uint8 (n, 3, 32, 32) and int64 (n,), the same ones whenever the seed is the same. Hues
    run over the whole wheel in every image, as otherwise they alone would tell images apart. In
    float64 every CPU draws the same bytes.
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
    """The images (N, 3, 32, 32), uint8, to train on; --subset keeps the same ones for any seed."""
    images, _ = load_images(args.dataset, args.data_dir, "train")
    if args.subset > len(images):
        raise UserError(f"--subset {args.subset}: there are {len(images)} training images; 0: all")
    keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:args.subset]
    return images[keep] if args.subset else images


# --- Augmentation: batched, every image with parameters of its own ---------------------------
# Any function from images to as many in [0, 1] can take the place of `augment`.


@torch.no_grad()
def augment(x):
    """SimCLR's augmentation with the base code's strengths; every image draws its own parameters.

    x: (B, 3, H, W), uint8 or float in [0, 1] -> float in [0, 1]. In this order: colour jitter
    (0.4, 0.4, 0.4, 0.1) with probability 0.8, gray with 0.1, a bicubic crop of 0.2 to 1 of the area
    with ratio 3/4 to 4/3, flip with 0.5. The distribution is torchvision's, image by image.
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
        x = torch.where((gray[0] < 0.1)[:, None, None, None], luminance(x), x)

        # Ten tries per image, as in torchvision's RandomResizedCrop; the whole image if none fits.
        whole = torch.stack([x.new_full((1, b), side) for side in (height, width)])
        root = (height * width * (0.2 + 0.8 * area)).sqrt()
        stretch = (math.log(4 / 3) * (ratio - 0.5)).exp()                # root of width / height
        sides = torch.cat([torch.stack([root / stretch, root * stretch]).round(), whole], 1)
        first = (sides <= whole).all(0, keepdim=True).int().argmax(1, keepdim=True)
        sides = sides.gather(1, first.expand(2, 1, b))                   # (2, 1, B): height, width
        start = (place[:, None] * (whole - sides + 1)).floor()
        rows, columns = resampling(start[:, 0], sides[:, 0], whole[:, 0], max(height, width))
        rows, columns = rows[:, :height, :height], columns[:, :width, :width]
        columns = torch.where((flip[0] < 0.5)[:, None, None], columns.flip(1), columns)
        x = (x.flatten(1, 2) @ columns.mT).view(b, 3, height, width)
        return (rows[:, None] @ x).clamp_(0, 1)


def color_jitter(x, factors, shift, order, hue_place):
    """Brightness, contrast and saturation (factors, (B, 3)) in each image's `order` (B, 3), the hue
    (shift in turns, (B,)) before the one at `hue_place` (B,) in 0..3.

    Each of the three is x <- clip(A x + C mean(x)) in colours, the mean being over pixels, and at
    factor 1 nothing. So all images pass three before the hue and three after it.
    """
    colours = torch.eye(3, device=x.device)
    to_gray = luminance(colours[..., None, None]).view(1, 3).expand(3, 3)
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


def luminance(x):
    """Gray values of x (B, 3, H, W) -> (B, 1, H, W), ITU-R 601 weights."""
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def shift_hue(x, shift):
    """Turn the hue of x (B, 3, H, W) by `shift` (B,) turns, in HSV."""
    high, which = x.max(1, keepdim=True)                                           # (B, 1, H, W)
    chroma = high - x.amin(1, keepdim=True)
    following = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, which)      # of r g - b, of g b - r, ...
    hue = following / chroma.clamp_min(1e-9) + 2 * which + 6 * shift[:, None, None, None]
    k = (hue + torch.arange(5, 0, -2, device=x.device)[:, None, None]) % 6         # (B, 3, H, W)
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def resampling(start, size, side, n):
    """Matrices (..., n, n) that stretch pixels [start, start + size) to `side` ones, by PIL's
    bicubic kernel; start, size, side: (...), n at least the side, beyond which nothing is said."""
    pixel = torch.arange(n, device=start.device) + 0.5
    start, size, side = start[..., None], size[..., None], side[..., None]
    center = start + pixel * (size / side)                                         # (..., n)
    d = (center[..., None] - pixel).abs().clamp(max=2)                             # (..., n, n)
    weight = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    weight = weight * ((pixel > start) & (pixel < start + size))[..., None, :]
    return weight / weight.sum(-1, keepdim=True)


# --- Networks: those that take images, in [0, 1], normalise them themselves ------------------
# A script needs an encoder's `dim`, a discriminator's `dims` and `features`; the EBM its layers.


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
    """Mean and variance over the pixels of each channel: (B, C, H, W) -> (B, 2C), in fp32."""
    variance, mean = torch.var_mean(maps.float(), (2, 3), correction=0)
    return torch.cat([mean, variance], 1)


def conv(in_channels, out_channels):
    """3x3 convolution, LeakyReLU. He initialisation: PyTorch's own leaves f near 0 for good."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, a=0.1)
    nn.init.zeros_(layer.bias)
    return layer, nn.LeakyReLU(0.1)


class Discriminator(nn.Module):
    """f, the negative energy: (B, 3, H, W) in [0, 1] -> (B,). Shaped like ADE's, arXiv:1904.12083.

    `features(x, layers)` -> (B, dims[layers]): mean and variance over the pixels of each channel of
    the last stage's map, in which f is linear, or of every stage's; standardised, once
    `standardise_features` has seen augmented images. `rotation` is the rotation loss's head, on raw
    features.
    """

    def __init__(self, width=64):
        super().__init__()
        w = width
        self.dims = {"last": 8 * w, "all": 20 * w}
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
    """ADE's: `start(z)` -> x_0 = mu(z) + sigma(z) N(0, 1) and log sigma(z), (B, 3, 32, 32) each.

    mu, the generator's image, in [0, 1], and sigma, up to 1e-3 in units of [-1, 1], are branches
    from one 4x4 map. `eps` is the step size of `adversarial_dynamics`, learned with them.
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
    """Let BatchNorm in `module` use the batch's statistics and leave its running ones alone."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


# --- Samplers: Langevin dynamics, and adversarial dynamics embedding's -----------------------
# They know of f only that it is differentiable: (B, ...) -> (B,).


def mix_with_noise(x, alpha):
    """Where a chain starts: I_0 = alpha * x + (1 - alpha) * U(0, 1), same shape as x in [0, 1]."""
    return alpha * x + (1 - alpha) * torch.rand_like(x)


def langevin(f, x, steps, step_size, noise_std, grad_clip=0.01):
    """Langevin dynamics that climbs f: I <- I + step_size * grad f(I) + N(0, noise_std^2).

    f: (B, ...) -> (B,), its weights untouched; x: (B, ...) in [0, 1] -> detached sample in [0, 1].
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

    On q = 2 x - 1, in [-1, 1], with g(q) = clip(grad_q f, +-grad_clip), held constant:

        p <- p / 2 + eps / 2 * g(q)                                      half a step, then
        q <- clip(q + p, +-1),  p <- p / 2 + eps * g(q)                  `steps` times,

    of whose last p takes eps / 2. f: (B, 3, H, W) in [0, 1] -> (B,); x in [0, 1], p (B, 3, H, W);
    eps (3, H, W). Returns the last x, in [0, 1], and p. The graph holds no activation of f.
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


def chain_flags(args):
    """What `chain_end` takes of the flags, the noise's std in units of the pixel range."""
    return {"alpha": args.alpha, "steps": args.steps, "step_size": args.step_size,
            "noise_std": args.noise_std * args.noise_unit, "grad_clip": args.grad_clip}


def chain_end(f, x, alpha, steps, step_size, noise_std, grad_clip):
    """I_steps of the chains that start from images x (B, 3, H, W), uint8 -> in [0, 1]."""
    return langevin(f, mix_with_noise(x / 255, alpha), steps, step_size, noise_std, grad_clip)


def watch_chain(f, x, alpha, steps, **flags):
    """A picture and the numbers of the chains from images x (B, 3, H, W), uint8.

    The picture (rows * B, 3, H, W) has rows x, I_0, I_5, I_10, ..., I_steps; the numbers are, of
    each I, the mean PSNR to x (dB) and f.
    """
    x, marks = x / 255, sorted({0, *range(5, steps, 5), steps})
    rows = [mix_with_noise(x, alpha)]
    for done, mark in zip(marks, marks[1:]):
        rows.append(langevin(f, rows[-1], mark - done, **flags))
    errors = [(image - x).square().mean((1, 2, 3)).clamp_min(1e-10) for image in rows]
    f_of_x, *values = [f(image).float().mean().item() for image in [x, *rows]]
    return torch.cat([x, *rows]), {
        "steps": marks, "psnr": [-10 * error.log10().mean().item() for error in errors],
        "f": values, "f_of_x": f_of_x}


# --- Losses: in fp32 whatever the networks computed in ---------------------------------------
# Of embeddings (B, D) -> a scalar; `nt_xent` alone sees those of other ranks too.


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


# --- Optimisation: the schedules, and BYOL's moving average ----------------------------------
# Functions of the step and of parameters; the loops are in the scripts.


def lr_factor(schedule, steps):
    """step -> factor of the learning rate, for a run of `steps` steps.

    Linear warm-up over 500 steps, at most a tenth of the run. Then "step": times 0.2 after 95 % and
    97.5 % of the run; or "cosine": down to 0 at the end.
    """
    warmup = min(500, steps // 10)
    drops = [round(share * steps) for share in (0.95, 0.975)]

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
def ema_update(target, online, tau):
    """target <- tau * target + (1 - tau) * online; parameters only, each has buffers of its own."""
    torch._foreach_lerp_([*target.parameters()], [*online.parameters()], 1 - tau)


# --- Devices: which one computes, in what format, and how a step reaches it ------------------
# No method and no loss is changed by any of it.


def prepare_device(args):
    """Check the device; join torchrun's ranks, if any, which wait up to a day for rank 0's EBM."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    started = any(map(os.environ.get, names)) and not dist.is_initialized()
    if started and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with naming(f"--device {args.device}", "cannot be used", "name another"):
        there = torch.zeros(1, device=args.device)
        there.cpu()
    if there.is_cuda:
        torch.cuda.set_device(there.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("highest")           # whatever the environment says
    with naming("this rank", "cannot join the others",
                f"start with torchrun, or unset its variables, {', '.join(names)}"):
        if started:
            number, ranks, _ = (int(os.environ[name]) for name in names[:3])
            if not 0 <= number < ranks:
                raise ValueError(f"RANK {number} of WORLD_SIZE {ranks}")
            dist.init_process_group("nccl" if there.is_cuda else "gloo", timeout=timedelta(days=1))
    avx2 = args.device.startswith("cpu") and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if getattr(args, "compile", False) and (avx2 or world_size() > 1):
        raise UserError("--compile: leave it out; with " + (
            "AVX2 alone gradients of f were seen as NaN" if avx2
            else "several ranks it was never tried"))


def in_bf16(args):
    """Whether the networks compute in bf16: --precision, auto being where the device is fast in it.

    A CPU is so with AMX, or with AVX512's bf16 on AMD's; on Intel's that is slower than fp32.
    """
    kind = torch.device(args.device).type
    if args.precision != "auto":
        return args.precision == "bf16"
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    amd = "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())
    return torch.cpu._is_amx_tile_supported() or (amd and torch.cpu._is_avx512_bf16_supported())


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=in_bf16(args))


def compile_model(model, args):
    """The model, with --compile its augmentation, encoders and f by torch.compile; no weight
    changes its name."""
    if args.compile:
        model.augment = torch.compile(model.augment, dynamic=False)
    for part in model.children() if args.compile else []:
        if isinstance(part, (Encoder, Discriminator)):
            part.compile()
            if isinstance(part, Discriminator):
                part.features = torch.compile(part.features)
    return model


def captured(step, args):
    """`step`, a function of a tensor x to {name: scalar tensor}; on one GPU a CUDA graph of it.

    Three calls run as written, on the stream that will capture, as autograd keeps to a stream. The
    fourth is captured; it and later ones are replayed. x keeps its shape. What Python decides stays
    as it was then, random numbers go on. UserError where `step` waits for the GPU.
    """
    if (torch.device(args.device).type != "cuda" or world_size() > 1
            or getattr(args, "compile", False) or getattr(args, "eager", False)):
        return step
    stream, graph, first, static = torch.cuda.Stream(), torch.cuda.CUDAGraph(), [step] * 3, {}

    def call(x):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if first:
                terms = first.pop()(x)
            else:
                if "terms" not in static:
                    static["x"] = x.clone()
                    with naming("a step", "cannot be captured as a CUDA graph", "use --eager"):
                        try:
                            with torch.cuda.graph(graph, stream=stream):
                                static["terms"] = step(static["x"])
                        except Exception as error:        # of the capture's end, after the step's
                            raise error.__context__ or error
                static["x"].copy_(x)
                graph.replay()
                terms = {name: term.detach().clone() for name, term in static["terms"].items()}
        torch.cuda.current_stream().wait_stream(stream)
        return terms
    return call


def distribute(model):
    """The model, under DistributedDataParallel where there are several ranks."""
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        show("CPU ranks: each normalises by the statistics of its own share of the batch")
    return nn.parallel.DistributedDataParallel(model)


# --- Files: whole or not at all, ours or refused; and what a run is known by -----------------
# The one place that writes and reads; what a file holds is its caller's affair.


def write_whole(path, fill):
    """Let `fill` write a file beside `path`, then rename it: what is at `path` is always whole."""
    beside = path.with_suffix(".new")
    try:
        fill(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:              # torch's is a RuntimeError
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"{path}: cannot be written ({error}); what was there still is") from None


def save(path, **content):
    """Write these entries, a config among them, as PyTorch does; `reading` reads them."""
    write_whole(path, partial(torch.save, content))


def write_json(path, row):
    write_whole(path, lambda file: file.write_text(json.dumps(row, indent=1) + "\n"))


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def checksum(*tensors):
    """CRC-32 of the bytes of tensors, or of a module's; it stands for their content in a config."""
    if isinstance(tensors[0], nn.Module):
        tensors = tensors[0].state_dict().values()
    return reduce(lambda crc, x: zlib.crc32(x.detach().cpu().contiguous().numpy(), crc), tensors, 0)


VERSION = 2                                               # without one, ade was what gan is now
NOT_IDENTITY = {"run_dir", "data_dir", "ebm", "device", "eval_every", "eager", "computed_in"}
NOT_FLAGS = {"images": "other images", "f": "another EBM or teacher", "version": "other code",
             "done": "another checkpoint"}


def same_config(path, saved, wanted):
    """UserError where what is at `path` was made with other flags, images or EBM than wanted."""
    if saved.get("computed_in") and wanted.get("computed_in"):         # older code did not note it
        saved, wanted = ({**row, "precision": row["computed_in"]} for row in (saved, wanted))
    for flag, value in wanted.items():
        if flag not in NOT_IDENTITY and saved.get(flag) != value:
            other = f"--{flag.replace('_', '-')} {saved.get(flag)}, not {value}"
            raise UserError(f"{path}: made with {NOT_FLAGS.get(flag, other)}; name another "
                            "--run-dir, --ebm or --data-dir, or use the same flags"
                            + " and --run-dir" * (flag == "precision"))


@contextmanager
def reading(path, wanted={}):
    """Yield the dict in the file `path`, JSON or PyTorch's. UserError where it is of another config
    than `wanted`; or that fails, or what is done with it: it is not a whole file of ours."""
    with naming(path, "not a whole file of ours",
                "name another, or remove it if it is one of ours, damaged or of older code"):
        if Path(path).suffix == ".json":
            content = json.loads(Path(path).read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        if Path(path).name != "eval.json":
            (config := content.get("config", content))["version"]    # code that had none is refused
            same_config(path, config, wanted)
        yield content


def same_on_all_ranks(**config):
    """UserError on each rank where the config of one is not the first's."""
    for number, other in enumerate(configs := of_all_ranks(config)):
        same_config(f"rank {number}, unlike rank 0", other, configs[0])


def name_files(parser, args):
    """Name the run's directory and its EBM's file by the flags that make them what they are."""
    differing = [f"{flag}={value}" for flag, value in vars(args).items()
                 if flag not in NOT_IDENTITY and value != parser.get_default(flag)]
    if "run_dir" in args and not args.run_dir:
        args.run_dir = "runs/" + "-".join([args.script, *differing]).replace("/", "_")
        if len(os.fsencode(Path(args.run_dir).name)) > 255:
            raise UserError(f"--run-dir: too many flags to name it by: {args.run_dir}; name one")
    parts = ["ebm", args.dataset, args.subset or "", f"width={args.width}", args.ebm_objective,
             f"rotation={args.ebm_rotation}" if args.ebm_rotation else "",
             f"seed={args.seed}" if args.seed else "", args.ebm_iters]
    args.ebm = args.ebm or "runs/" + "-".join(str(part) for part in parts if part != "") + ".pt"
    if Path(args.ebm).suffix != ".pt":
        raise UserError(f"--ebm {args.ebm}: name a file that ends in .pt")
    at, its = map(os.path.realpath, (getattr(args, "run_dir", args.ebm), args.ebm[:-2] + "ebm"))
    if at == its or at.endswith(".ebm"):
        raise UserError(f"--run-dir {args.run_dir}: is an EBM's (--ebm {args.ebm}); name another")


def parse_flags(parser, argv=None):
    """Parse, with the preset of --smoke; name where things are kept; join the other ranks."""
    if "--smoke" in (sys.argv if argv is None else argv):
        parser.set_defaults(**{a.dest: SMOKE[a.dest] for a in parser._actions if a.dest in SMOKE})
    parser.set_defaults(script=Path(parser.prog).stem, version=VERSION)
    args = parser.parse_args(argv)
    if getattr(args, "use", "") == "dataset" and args.view == "augment":
        raise UserError("--view augment: there is no third view with --use dataset")
    name_files(parser, args)
    prepare_device(args)
    return args


# --- Training: rounds of it in a directory, which resume -------------------------------------
# An EBM's as well as a script's; a round is an epoch, or some iterations.


def seed_of(*numbers):
    """A seed that depends on each of the numbers, such as (seed, epoch, rank)."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])


def this_commit():
    """The commit of this code, with "+changes" if it was changed; None outside its repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, check=True,
                              env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
                              capture_output=True, text=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        commit, _ = git("rev-parse", "HEAD", "HEAD:./common.py").split()   # it has this code
        return commit + "+changes" * bool(git("status", "--porcelain", "-uall", ":(glob)*.py"))


def start_log(path, counter, done, device):
    """Add a line on this start to a log; drop what came after `done`, at 0 all that is there."""
    if path.exists():
        with naming(path, "a line is not ours", "mend or remove it"):
            lines = [x for x in path.read_text().splitlines(True) if x.endswith("\n")]
            for line in lines[:1]:
                json.loads(line)["argv"]                  # the first is on the origin
            kept = "".join(x for x in lines if json.loads(x).get(counter, 0) <= done > 0)
        write_whole(path, lambda file: file.write_text(kept))
    append(path, {"argv": sys.argv, "commit": this_commit(),
                  "python": sys.version.split()[0], "torch": torch.__version__,
                  "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
                  "gpu": torch.cuda.get_device_name(device) if "cuda" in device else None,
                  "cpu": torch.backends.cpu.get_cpu_capability()})


CHECKPOINT_SECONDS = 60                                   # at least, between two checkpoints


class Training:
    """Rounds of training, logged and kept in a directory; one process at a time.

    A round is an epoch, or some iterations of an EBM. The state is written after the last, and
    after others if a minute has passed since the last time. A resumed run does again what came
    after it, and ends with the same weights.
    """

    def __init__(self, path, config):
        self.path, self.config, self.ranks = Path(path), config, 1
        self.lock = FileLock(self.path / ".lock")
        self.check_config()

    def check_config(self):
        """UserError where the directory holds what was made with another config."""
        def there(*names):
            return any((self.path / name).exists() for name in names)

        self.saved = self.config
        if there("config.json"):
            with reading(self.path / "config.json") as self.saved:
                if there("checkpoint.pt", "generated.pt", "chain.json", "eval.json"):
                    same_config(self.path, self.saved, self.config)
        elif there("chain.json", "eval.json"):                      # the others hold a config too
            raise UserError(f"{self.path}: has results but no config.json; name another --run-dir")

    def lock_directory(self, wait=False):
        """Make the directory and keep others out of it, until `lock` is released or the process
        ends. Where another process is at it, raises UserError, or waits."""
        if rank() == 0 and not self.lock.is_locked:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock.acquire(timeout=0)
            except Timeout:
                if not wait:
                    raise UserError(f"{self.path}: another process is at this run; wait for it or "
                                    f"name another --run-dir; if none is, remove {self.path}/.lock"
                                    ) from None
                show(f"{self.path}: waiting for the process that makes it; if none, remove .lock")
                self.lock.acquire()
            except (OSError, NotImplementedError) as error:         # the latter: it has no locks
                raise UserError(f"{self.path}: {error.args[-1]}; name another place") from None
        self.check_config()

    def restore(self, state):
        """Load the checkpoint, if there is one, into `state`; returns how much was done, or 0."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return 0
        with reading(path, self.config) as saved:
            if saved["ranks"] != self.ranks:
                raise UserError(f"{path}: made on {saved['ranks']} ranks; start as many")
            for name, part in state.items():
                part.load_state_dict(saved[name])
            self.config["computed_in"] = saved["config"].get("computed_in")   # maybe unknown
            return saved["done"]

    def rounds(self, counter, total, size, state):
        """Yield the rounds that are left, as (start, end) in epochs or iterations.

        counter: "epoch" or "iteration"; total: how many; size: of a round; state: {name: what has
        a state_dict}. Who takes a round seeds it, logs its steps, and at its end keeps its row.
        """
        self.lock_directory()
        self.counter, self.total, self.state = counter, total, state
        self.done = self.first = self.restore(state)
        if self.ranks > 1:
            same_on_all_ranks(**self.config, done=self.done)
        if rank() == 0:
            write_json(self.path / "config.json", self.config)
            start_log(self.path / "log.jsonl", counter, self.first, self.config["device"])
        self.began = self.written = time.monotonic()
        while self.done < total:
            start, self.done, self.rows = self.done, min(self.done + size, total), []
            self.round_began = time.monotonic()
            yield start, self.done

    def log(self, **terms):
        """Note a step's scalars; the round's row has their means."""
        self.rows.append({name: value.detach() for name, value in terms.items()})

    def seconds(self):
        """Since the round began."""
        return round(time.monotonic() - self.round_began, 3)

    def means(self):
        """The row of the round: how much is done, means over its steps and all ranks, seconds."""
        means = torch.stack([torch.stack([*row.values()]).float() for row in self.rows]).mean(0)
        if self.ranks > 1:
            dist.all_reduce(means)
        row = dict(zip(self.rows[0], (means / self.ranks).tolist()))       # waits for the device
        return {self.counter: self.done, **row, "seconds": self.seconds()}

    def keep(self, row, text):
        """End the round: log its row, write a checkpoint where one is due, and show the text."""
        now = time.monotonic()
        if rank() == 0:
            append(self.path / "log.jsonl", row)
            if self.done == self.total or now > self.written + CHECKPOINT_SECONDS:
                save(self.path / "checkpoint.pt", config=self.config, ranks=self.ranks,
                     done=self.done, **{name: x.state_dict() for name, x in self.state.items()})
                self.written = now
        left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
        show(f"{self.counter} {self.done}/{self.total}  {text}  "
             f"{timedelta(seconds=round(left))} left")


# --- Energy-based model: f, and where its negatives come from, on the same images ------------
# Its network is f where it is an energy, `discriminator` where it is an encoder, d in these steps.
# An objective is a step function, named in EBM_ADAM, `ebm_rounds` and --ebm-objective's choices.

EBM_LANGEVIN = dict(step_size=10, noise_std=0.005, grad_clip=0.01)        # IGEBM's
EBM_ADAM = {"gan": (1e-3, 2e-4, 0.9), "ade": (1e-4, 1e-4, 0.999), "cd": (1e-3, 0, 0.9)}
EBM_ROUND = 100                                     # iterations between two lines of the log
EBM_CHAINS = 10000                                  # of cd, whose ends it keeps to go on from


def ebm_networks(args):
    """{name: module or optimizer}, the names being the parameters of the objective's step.

    EBM_ADAM: the learning rates of D and G, and Adam's second beta, which bounds a step of a weight
    at lr / sqrt(1 - beta_2). `ade` has its authors' 0.999, and spectral norm on f.
    """
    (lr_d, lr_g, beta), ade = EBM_ADAM[args.ebm_objective], args.ebm_objective == "ade"
    adam = partial(torch.optim.Adam, betas=(0.0, beta), fused=True, capturable=True)
    warnings.filterwarnings("ignore", "This instance was constructed with capturable")
    d = Discriminator(args.width)
    for layer in [*d.stages.modules(), d.linear] if ade else []:
        if hasattr(layer, "weight"):
            parametrizations.spectral_norm(layer)
    state = {"d": d.to(args.device), "optimizer_d": adam(d.parameters(), lr_d)}
    if args.ebm_objective == "cd":
        replay = nn.Module()
        replay.register_buffer("images", torch.rand(EBM_CHAINS, 3, 32, 32).half())
        return {**state, "replay": replay.to(args.device)}
    g = (NoisyGenerator if ade else Generator)(args.width).to(args.device)
    return {**state, "g": g, "optimizer_g": adam(g.parameters(), lr_g)}


@contextmanager
def spectral_weights(d):
    """Within, d's weights are those that spectral norm makes of them now, once and in fp32."""
    with parametrize.cached():
        with torch.autocast(d.linear.bias.device.type, enabled=False):
            for layer in d.modules():
                getattr(layer, "weight", None)                      # one power iteration
        yield


def fix_spectral_norm(d):
    """d, which keeps for good the weights that spectral norm makes of its own, if it has it."""
    for layer in d.eval().modules():                                # eval: no power iteration
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    return d


def rotation_loss(d, x):
    """Cross entropy of the quarter turn, a quarter of x turned in all four (arXiv:1811.11212)."""
    x = x[:max(1, len(x) // 4)]
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])                     # (B, 3, 32, 32)
    turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return F.cross_entropy(d.rotation(d.features(turned)).float(), turns)


def discriminator_step(x, x_s, loss_of, rotation_weight, d, optimizer_d, penalty_weight=5):
    """One step of D on images x and samples x_s (B, 3, 32, 32); returns the meters.

    D descends loss_of(f(x), f(x_s)) + penalty_weight (|grad f(x)|^2 + |grad f(x_s)|^2) +
    rotation_weight times the rotation loss. The meter `clamped` is the share of grad f(x_s) that
    `langevin` would clamp.
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
    """One step of G, which descends loss - f(x_s) + 0.2 rotation_weight times the rotation's."""
    d.requires_grad_(False)                 # or autocast would take D's weights of before its step
    with spectral_weights(d):
        loss = loss - d(x_s).float().mean()
        if rotation_weight:
            loss = loss + 0.2 * rotation_weight * rotation_loss(d, x_s)
    optimizer_g.zero_grad()
    loss.backward()
    optimizer_g.step()
    d.requires_grad_(True)


def gan_step(x, rotation_weight, d, optimizer_d, g, optimizer_g):
    """One step of a logistic GAN on images x (B, 3, 32, 32), its samples refined by the sampler.

    x_s: G(z) and, for a quarter of the batch, mix_with_noise(x, 0.6), after five Langevin steps.
    D descends softplus(-f(x)) + softplus(f(x_s)) + the terms of `discriminator_step`, gradient
    penalties among them. G climbs f(x_s), its gradient passing straight through the steps, which
    are additive. Returns the meters.
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

    x_s, p_T: the ends of `adversarial_dynamics` from G's x_0 and p_0 ~ N(0, (1e-4)^2).
    D descends f(x_s) - f(x), under spectral norm. G and its eps descend
    -f(x_s) + 1e-5 |p_T|^2 + 1e-5 sum(-log sigma): energy, kinetic energy, entropy of x_0.
    Returns the meters.
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

    x_s: where chains of `replay` are after 15 more Langevin steps, 5 % of them begun at U(0, 1).
    D descends f(x_s) - f(x) + f(x)^2 + f(x_s)^2 + the terms of `discriminator_step`, whose penalty
    takes the place of IGEBM's spectral norm. Returns the meters.
    """
    index = torch.randperm(len(replay.images), device=x.device)[:len(x)]           # distinct
    x_0 = replay.images[index].float()                                             # (B, 3, 32, 32)
    fresh = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.05
    x_s = langevin(d, torch.where(fresh, torch.rand_like(x_0), x_0), steps=15, **EBM_LANGEVIN)
    replay.images[index] = x_s.half()
    return discriminator_step(
        x, x_s, lambda real, sample: sample - real + real.square() + sample.square(),
        rotation_weight, d, optimizer_d)


def ebm_rounds(training, images, args):
    """Train from where the checkpoint is to the end; returns its state, {"d": f, ...}.

    UserError where the means of a round, or the weights after it, are not of an energy.
    """
    torch.manual_seed(seed_of(args.seed))
    state = ebm_networks(args)
    step = {"gan": gan_step, "ade": ade_step, "cd": cd_step}[args.ebm_objective]
    step = partial(step, rotation_weight=args.ebm_rotation, **state)
    step = captured(autocast(args)(step), args)

    for start, end in training.rounds("iteration", args.ebm_iters, EBM_ROUND, state):
        torch.manual_seed(seed_of(args.seed, start))
        for _ in range(start, end):
            x = images[torch.randint(len(images), (64,), device=images.device)] / 255
            training.log(**step(x))
        row = training.means()
        finite = all(p.isfinite().all() for p in state["d"].parameters())
        if not (finite and abs(row["f_real"]) + abs(row["f_sample"]) + row["penalty"] < 1e4):
            raise UserError(f"--ebm {args.ebm}: f exploded before iteration {end}, f(real) "
                            f"{row['f_real']:.3g}, penalty {row['penalty']:.3g}; {training.path} "
                            "has its log; try another --seed in another --ebm")
        training.keep(row, "f(real) {f_real:.2f}  f(sample) {f_sample:.2f}  AUC {auc:.2f}  clamped "
                           "{clamped:.0%}  sample std {sample_std:.2f}".format_map(row))
    fix_spectral_norm(state["d"])
    return state


def standardise_features(d, images, args):
    """Let each feature of d have mean 0 and variance 1 over images (N, 3, H, W), uint8, which are
    always augmented alike."""
    torch.manual_seed(seed_of(args.seed, args.ebm_iters))
    with torch.no_grad(), autocast(args):
        features = torch.cat([d.features(augment(x.to(args.device)), "all")
                              for x in images.split(500)])
    std, mean = torch.std_mean(features, 0, correction=0)
    d.feature_mean = d.feature_mean + d.feature_std * mean
    d.feature_std = (d.feature_std * std).clamp_min(1e-6)


def finish_ebm(path, training, images, args, d, g=None, replay=None, **optimizers):
    """Write f, its features standardised, and a picture of images and of samples, before and after
    15 Langevin steps."""
    standardise_features(d, images, args)
    x = images[:32].to(args.device) / 255                                          # (32, 3, 32, 32)
    with torch.no_grad():
        x_0 = (g.eval()(torch.randn(len(x), g.z_dim, device=x.device)) if g
               else replay.images[:len(x)].float())
    x_s = langevin(d, x_0, steps=15, **EBM_LANGEVIN)
    save_image(torch.cat([x, x_0, x_s]), training.path / "samples.png", nrow=16)
    save(path, config=training.config, d=d.state_dict(), **({"g": g.state_dict()} if g else {}))
    (training.path / "checkpoint.pt").unlink(missing_ok=True)


def ebm_config(images, args, *more):
    """What an EBM was trained on, and how: flags, `more` too, and a checksum of the images."""
    flags = ["dataset", "subset", "width", "ebm_objective", "ebm_rotation", "ebm_iters", *more]
    return {**{flag: getattr(args, flag) for flag in flags},
            "version": VERSION, "images": checksum(images)}


def load_ebm(path, device, wanted={}):
    """The discriminator f in the file `path`, of the config `wanted`, on `device`, frozen."""
    with reading(path, wanted) as saved:
        d = Discriminator(saved["config"]["width"])
        d.load_state_dict(saved["d"])
    return d.to(device).requires_grad_(False)


def train_ebm(images, args):
    """The frozen f of the EBM in the file args.ebm, trained first if there is none.

    images: uint8 (N, 3, 32, 32); args: the flags. Writes f and the generator to args.ebm, X.pt, its
    log, checkpoint and a picture of samples to the directory X.ebm. Resumes. Raises UserError where
    f explodes, or was made of other images or with other flags.
    """
    path = Path(args.ebm)
    if not path.exists():
        config = {**ebm_config(images, args, "seed", "precision", "data_dir", "device"),
                  "computed_in": "bf16" if in_bf16(args) else "fp32"}
        training = Training(path.with_suffix(".ebm"), config)
        training.lock_directory(wait=True)
        try:
            if not path.exists():                         # else another process has just made it
                state = ebm_rounds(training, images.to(args.device), args)
                finish_ebm(path, training, images, args, **state)
        finally:
            training.lock.release()
    return load_ebm(path, args.device, ebm_config(images, args))


# --- Run: a script's training and its results ------------------------------------------------
# What the scripts' main calls, in that order.


def data_checksum(args):
    """Of the images and labels that the test split's accuracies are of."""
    return checksum(*(x for split in ("train", "test")
                      for x in load_images(args.dataset, args.data_dir, split)))


def describe(result):
    """Two lines of the accuracies (%) in an eval.json."""
    return "\n".join(
        f"{name:9} encoder: linear {row['linear']:.2f}  5-NN {row['knn5']:.2f}  cosine kNN "
        f"{row['knn_cosine']:.2f}  ({result.get('split', 'test')} accuracy, %)"
        for name, row in [("trained", result), ("untrained", result["untrained"])])


class Run(Training):
    """A script's training on images (N, 3, H, W), uint8, and its results in eval.json.

    It is known by its flags and by checksums of the images and of the EBM, not by a path.
    `evaluate` is that of linear_eval.py.
    """

    def __init__(self, args, images, evaluate):
        super().__init__(args.run_dir, {**vars(args), "images": checksum(images),
                                        "computed_in": "bf16" if in_bf16(args) else "fp32"})
        same_on_all_ranks(**self.config)
        self.args, self.evaluate, self.ranks = args, evaluate, world_size()
        if (self.path / "eval.json").exists():
            with reading(self.path / "eval.json") as result:
                accuracies = describe(result)
            if "f" in self.saved.keys() - self.config.keys() and Path(args.ebm).exists():
                same_config(self.path, self.saved, {"f": checksum(load_ebm(args.ebm, "cpu"))})
            known = "data" in result and has_test(args)
            if (data_checksum(args) != result["data"] if known
                    else args.data_dir != self.saved["data_dir"]):
                raise UserError(f"{self.path}: finished; eval.json may be of other data. For this: "
                                f"python linear_eval.py {self.path} --data-dir {args.data_dir}")
            show(f"{self.path} is finished\n{accuracies}")
            sys.exit()
        if args.batch_size % world_size() or args.batch_size < 2 * world_size():
            raise UserError(f"--batch-size {args.batch_size}: {world_size()} ranks cannot share it")
        if rank() == 0 and has_test(args):
            load_images(args.dataset, args.data_dir, "test")             # its mistakes show now
        show(f"{self.path}: on {args.device} in {self.config['computed_in']}")

    def total_steps(self, images):
        """Optimiser steps of the whole run: each epoch drops what does not fill a batch."""
        if len(images) < self.args.batch_size:
            raise UserError(f"--batch-size {self.args.batch_size}: more than the {len(images)} "
                            "training images; use a smaller one")
        return self.args.epochs * (len(images) // self.args.batch_size)

    def get_ebm(self, images):
        """The frozen f of the run's EBM, which rank 0 trains first if there is none."""
        if not Path(self.args.ebm).exists():
            self.lock_directory()                                   # as soon as it can take long
        if rank() == 0:
            train_ebm(images, self.args)
        barrier()
        f = load_ebm(self.args.ebm, self.args.device)
        self.config["f"] = checksum(f)
        self.check_config()
        return f

    def speed(self):
        """Images a second, on all ranks, since the epoch began."""
        return round(len(self.rows) * self.args.batch_size / max(self.seconds(), 1e-9), 1)

    def stop_if_not_finite(self, row, model):
        """Raise UserError where the epoch's means or the weights after it are not finite."""
        if math.isfinite(sum(row.values())) and all(p.isfinite().all() for p in model.parameters()):
            return
        rows = [{name: value.item() for name, value in row.items()} for row in self.rows]
        wrong = [i for i, terms in enumerate(rows) if not math.isfinite(sum(terms.values()))]
        step = wrong[0] if wrong else len(rows) - 1
        raise UserError(f"--lr {self.args.lr}: not finite at step {step + 1} of epoch "
                        f"{self.done}, {rows[step]}; try a smaller one in another --run-dir")

    def epochs(self, **state):
        """Yield the epochs that are left; state: a model with an `encoder`, optimizer, schedule."""
        args = self.args
        for _, epoch in self.rounds("epoch", args.epochs, 1, state):
            torch.manual_seed(seed_of(args.seed, epoch, rank()))
            lr = state["optimizer"].param_groups[0]["lr"]
            yield epoch
            row = {**self.means(), "lr": lr, "images_per_s": self.speed()}
            self.stop_if_not_finite(row, state["model"])
            if rank() == 0 and args.eval_every and epoch % args.eval_every == 0:
                result = self.evaluate(state["model"].encoder, args, metrics=["knn5"])
                row |= {"knn5": result["knn5"]} if result else {}
            self.keep(row, f"loss {row['loss']:.4f}  z_std {row['z_std']:.2f}  "
                           f"{row['images_per_s']:.0f} images/s")

    def batches(self, images, epoch):
        """This rank's share of each batch of the epoch: (batch size / ranks, 3, H, W) uint8.

        An epoch drops the images that do not fill a batch.
        """
        size, shuffled = self.args.batch_size, torch.Generator()
        shuffled.manual_seed(seed_of(self.args.seed, epoch))
        order = torch.randperm(len(images), generator=shuffled).to(images.device)
        per_epoch, shown = len(images) // size, time.monotonic()
        for i, batch in enumerate(order.split(size)[:per_epoch], 1):
            yield images[batch.chunk(world_size())[rank()]]
            if sys.stdout.isatty() and time.monotonic() > shown + 1:
                shown = time.monotonic()
                show(f"epoch {epoch}: step {i}/{per_epoch}  loss {self.rows[-1]['loss']:.4f}  "
                     f"{self.speed():.0f} images/s", passing=True)

    def save_chain(self, f, x):
        """Keep the chains of images x (B, 3, H, W), uint8, as langevin.png and chain.json."""
        self.lock_directory()
        if rank() > 0 or (self.path / "chain.json").exists():
            return
        write_json(self.path / "config.json", self.config)
        torch.manual_seed(self.args.seed)
        with autocast(self.args):
            picture, numbers = watch_chain(f, x, **chain_flags(self.args))
        write_whole(self.path / "langevin.png",
                    partial(save_image, picture, nrow=len(x), format="png"))
        write_json(self.path / "chain.json", numbers)
        values, psnr = numbers["f"], numbers["psnr"]
        show(f"Langevin from I_0 to I_{self.args.steps}: f {values[0]:.2f} to {values[-1]:.2f} "
             f"(of x {numbers['f_of_x']:.2f}), PSNR to x {psnr[0]:.1f} to {psnr[-1]:.1f} dB")

    def chain_ends(self, f, images):
        """The end of a chain from each of images (N, 3, H, W), uint8; made once, generated.pt."""
        path = self.path / "generated.pt"
        if rank() == 0 and not path.exists():
            torch.manual_seed(self.args.seed)
            made, parts = [], images.split(500)
            for i, x in enumerate(parts, 1):
                with autocast(self.args):
                    image = chain_end(f, x, **chain_flags(self.args))
                made.append((image * 255).round().byte().cpu())
                show(f"generating images: {i}/{len(parts)}", passing=i < len(parts))
            save(path, config=self.config, images=torch.cat(made))
        barrier()
        with reading(path, self.config) as saved:
            return saved["images"].to(images.device)

    def finish(self, encoder):
        """Show the encoder's accuracies beside an untrained one's, and keep them in eval.json."""
        show("evaluating the encoder, and an untrained one", passing=True)
        if rank() == 0 and (result := self.evaluate(encoder, self.args, untrained=True)):
            show(describe(result))
            write_json(self.path / "eval.json", result)
        barrier()


def main():
    args = parse_flags(make_parser("Train the EBM alone; scripts then load it.", training=False))
    if Path(args.ebm).exists():
        raise UserError(f"--ebm {args.ebm}: exists already; remove it or name another file")
    images = training_images(args)
    same_on_all_ranks(**ebm_config(images, args))
    if rank() == 0:
        train_ebm(images, args)
    barrier()
    show(f"{args.ebm}: made; python linear_eval.py --untrained {args.ebm} says what it is worth")


if __name__ == "__main__":
    launch(main)
