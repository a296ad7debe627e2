"""One table of speeds, each beside what it is to be compared with: python tests/benchmark.py

Full-width networks, batches of 128 images, five minutes on two CPU cores. Every row is the median
of its rounds; the rounds take turns, so that a slow spell of the machine meets all rows alike.
The naive implementation is what one would write first: torchvision's transforms on PIL images in
two DataLoader workers, fp32, channels first. Rates are of the operations that a direct
convolution takes; a library may need fewer, and so pass 100 % of the matrix product. On a GPU the
table has the same rows, timed until the device is done, its memory in place of the host's, and
TF32 in fp32 convolutions, for the naive implementation too. A turn is 30 steps there, as the naive
implementation's workers have two batches ready when its turn comes.
"""
import argparse
import resource
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).parents[1]))
import byol_disc
import simclr_disc
from common import (Discriminator, augment, autocast, byol_loss, draw_shapes, ema_update, langevin,
                    mlp, nt_xent, set_up)
from linear_eval import linear_accuracy

BATCH, TAU = 128, 0.99
PIL = v2.Compose([
    v2.ToPILImage(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
    v2.RandomGrayscale(0.1),
    v2.RandomResizedCrop(32, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
    v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize([0.5] * 3, [0.25] * 3)])


class Views(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return PIL(self.images[i]), PIL(self.images[i])


class Plain(nn.Module):
    """SimCLR or BYOL as in the deck's base code, on torchvision's ResNet-18."""

    def __init__(self, byol):
        super().__init__()
        encoder = torchvision.models.resnet18()
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        encoder.maxpool, encoder.fc = nn.Identity(), nn.Identity()
        self.online = nn.Sequential(encoder, mlp(512, 1024, 64))
        self.target = deepcopy(self.online).requires_grad_(False) if byol else None
        self.last = mlp(64, 1024, 64) if byol else nn.BatchNorm1d(64)

    def forward(self, v1, v2):
        z1, z2 = self.last(self.online(v1)), self.last(self.online(v2))
        if self.target is None:
            return nt_xent(z1, z2)
        with torch.no_grad():
            t1, t2 = self.target(v1), self.target(v2)
        return byol_loss(z1, t2) + byol_loss(z2, t1)


def naive_step(images, byol, device):
    """A function that makes a training step of the naive implementation."""
    model = Plain(byol).to(device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
    loader = DataLoader(Views(images), BATCH, shuffle=True, drop_last=True, num_workers=2,
                        prefetch_factor=1, persistent_workers=True)

    def batches():
        while True:
            yield from loader
    batches = batches()

    def step():
        v1, v2 = next(batches)
        loss = model(v1.to(device), v2.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if byol:
            ema_update(model.target, model.online, TAU)
    return step


def our_step(images, byol, args):
    """A function that makes a training step as the scripts do, and the method's module."""
    method = (byol_disc.BYOL if byol else simclr_disc.SimCLR)(args, None).to(args.device)
    optimizer = torch.optim.Adam((p for p in method.parameters() if p.requires_grad), 3e-3,
                                 weight_decay=1e-6, fused=True)

    def step():
        with autocast(args):
            loss, _ = method(images[torch.randperm(len(images), device=args.device)[:BATCH]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if byol:
            method.update_target(TAU)
    return step, method


def encoder_passes(images, method, byol, args):
    """A function that takes two views of a batch through the encoders alone, there and back."""
    views = [augment(images[:BATCH]), augment(images[:BATCH])]

    def passes():
        with autocast(args):
            features = torch.cat([method.encoder(view) for view in views])
            if byol:
                with torch.no_grad():
                    for view in views:
                        method.target_encoder(view)
        method.zero_grad()
        features.backward(torch.ones_like(features))
    return passes


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(functions, rounds, device, calls=1):
    """{name: median seconds of a call} of functions {name: callable}, which take turns of so many
    calls; one round unseen."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = clock(device)
            for _ in range(calls):
                function()
            times[name].append((clock(device) - began) / calls)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def matrix_rate(dtype, device):
    """Operations a second in the fastest of three sizes of square matrix product."""
    rates = []
    for n in (1024, 2048, 4096):
        a = torch.randn(n, n, device=device, dtype=dtype)
        rates.append(2 * n ** 3 / seconds({"product": lambda: a @ a}, 5, device)["product"])
    return max(rates)


def peak_memory(device):
    """GiB, the largest so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def row(what, value, versus=""):
    print(f"| {what} | {value} | {versus} |", flush=True)


def training(images, args, rounds, largest):
    for byol, name in [(False, "SimCLR"), (True, "BYOL")]:
        functions = {"naive": naive_step(images, byol, args.device)}
        for precision in ("fp32", "bf16"):
            flags = argparse.Namespace(**{**vars(args), "precision": precision})
            functions[precision], method = our_step(images.to(args.device), byol, flags)
            functions[f"{precision} encoder"] = encoder_passes(images.to(args.device), method,
                                                               byol, flags)
        turn = 30 if args.device.startswith("cuda") else 1
        time_of = seconds(functions, rounds, args.device, turn)
        with FlopCounterMode(display=False) as counter:
            functions["fp32 encoder"]()
        row(f"{name}, naive", f"{BATCH / time_of['naive']:.1f} images/s")
        for precision in ("fp32", "bf16"):
            step, passes = time_of[precision], time_of[f"{precision} encoder"]
            rate = counter.get_total_flops() / passes
            row(f"{name}, {precision}", f"{BATCH / step:.1f} images/s",
                f"{time_of['naive'] / step:.2f} x naive; {passes / step:.0%} of its encoder passes")
            row(f"its encoder passes, {precision}", f"{BATCH / passes:.1f} images/s",
                f"{rate / largest[precision]:.0%} of the largest matrix product")
    row("peak memory so far", f"{peak_memory(args.device):.2f} GiB")


def augmentation(images, device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batch = images[:512].to(device)
    time_of = seconds({"ours": lambda: augment(batch),
                       "PIL": lambda: [PIL(x) for x in images[:512]]}, 5, device)
    torch.set_num_threads(threads)
    where = "one core" if device == "cpu" else f"{device}, torchvision's on one core"
    row(f"augmentation, {where}", f"{512 / time_of['ours']:.0f} images/s",
        f"{time_of['PIL'] / time_of['ours']:.2f} x torchvision's on PIL images")


def sampler(args):
    f = Discriminator(args.width).to(args.device).requires_grad_(False)
    x = torch.rand(BATCH, 3, 32, 32, device=args.device)
    for precision in ("fp32", "bf16"):
        flags = argparse.Namespace(**{**vars(args), "precision": precision})

        def forward():
            with torch.no_grad(), autocast(flags):
                f(x)

        def chain(steps):
            with autocast(flags):
                langevin(f, x, steps, step_size=10, noise_std=0.005)

        time_of = seconds({"forward": forward, "chain": lambda: chain(5)}, 5, args.device)
        row(f"Langevin step, {precision}", f"{time_of['chain'] / 5 * 1000:.0f} ms",
            f"{time_of['chain'] / 5 / time_of['forward']:.2f} x a forward of f")
    before = peak_memory(args.device)
    chain(60)
    row("peak memory, 60 steps after 5", f"{peak_memory(args.device):.2f} GiB",
        f"{peak_memory(args.device) - before:+.2f} GiB")


def input_gradient(args):
    """Cosine of the input gradient of f in bf16 with that in fp32."""
    f, gradients = Discriminator(args.width).to(args.device), []
    x = torch.rand(BATCH, 3, 32, 32, device=args.device).requires_grad_()
    for precision in ("fp32", "bf16"):
        with autocast(argparse.Namespace(**{**vars(args), "precision": precision})):
            energy = f(x).float().sum()
        gradients.append(torch.autograd.grad(energy, x)[0].flatten(1))
    row("input gradient of f, bf16 with fp32", "cosine",
        f"{torch.cosine_similarity(*gradients).mean():.4f}")


def probe(device):
    x, y = torch.randn(50000, 512, device=device), torch.randint(10, (50000,), device=device)
    began = clock(device)
    linear_accuracy(x, y, x[:1000], y[:1000], epochs=50)
    row("linear probe, 500 epochs of 50,000 x 512",
        f"{10 * (clock(device) - began):.0f} s", "10 times the time of 50 epochs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="of training steps")
    given = parser.parse_args()
    args = argparse.Namespace(device=given.device, width=64, emb=64, coeff=0, layers="last",
                              temperature=0.5, precision="fp32")
    set_up(args)
    images, _ = draw_shapes(5000, seed=0)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads\n\n"
          "| | measured | compared |\n|---|---|---|", flush=True)
    torch.set_float32_matmul_precision("high")            # on a GPU, TF32 as in its convolutions
    largest = {"fp32": matrix_rate(torch.float32, args.device),
               "bf16": matrix_rate(torch.bfloat16, args.device)}
    for name, rate in largest.items():
        row(f"largest matrix product, {name}", f"{rate / 1e9:.0f} Gop/s")
    torch.set_float32_matmul_precision("highest")
    augmentation(images, args.device)
    sampler(args)
    input_gradient(args)
    probe(args.device)
    training(images, args, given.rounds, largest)


if __name__ == "__main__":
    main()
