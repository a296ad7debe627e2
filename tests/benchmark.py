"""Print tables of speeds, and what they are to be compared with: python tests/benchmark.py

The steps are the scripts' own, at their batch sizes (SimCLR 512, BYOL 256) and at 128. Rows of a
group take turns, so that a slow spell of the machine affects all of them. The first round is a
warm-up; a row shows the median of the others. On a CPU, third views are measured at 128 alone.

- `eager` launches each kernel from Python; `CUDA graph` (--graph) replays forward and backward. On
  a GPU, fp32 convolutions and the fp32 matrix product are computed in TF32.
- `GPU ms` is the time between two CUDA events around a step that is launched while the GPU is
  paused. It is the GPU's own time if the launch queue holds the whole step, as it does under CUDA
  graph; else it is an upper bound. A step whose `ms` is much larger than that is launch-bound.
- `operations` are those that a GPU would launch for a step, counted on the CPU without views.
- `share` is a step's FLOP per second, with direct convolutions, over a large matrix product's.
- `GiB` is the peak of the tensors' memory in a step, without the images.
- `PIL` and `v2` are torchvision's augmentations: of PIL images, in as many workers as there are
  threads; or of a batch on the device, with one random draw for the whole batch.

To compare with: a plain ResNet-18 reaches 25 % of an A100's half-precision peak (32.3 PFLOP in
7 min at 312 TFLOP/s; README of KellerJordan/cifar10-airbench). dkobak/simclr-cifar10 (README at
44b2500) takes 11.9 s per epoch on an A100: ResNet-18, batch size 512, fp32, PIL in 16 workers.
"""
import argparse
import gc
import os
import re
import sys
import time
from itertools import count
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_pil_image, to_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import byol_disc
import byol_langevin
import simclr_disc
import simclr_langevin
from common import (Discriminator, augment, autocast, draw_shapes, grad_scaler, graphed, launch,
                    lr_factor, number, prepare_device, provenance, resolve_precision, target_tau)

METHODS = {"SimCLR": (simclr_disc, "--coeff", "0"), "BYOL": (byol_disc, "--coeff", "0"),
           "SimCLR, Langevin view": (simclr_langevin,), "BYOL, Langevin view": (byol_langevin,),
           "SimCLR, discriminator view": (simclr_disc,), "BYOL, discriminator view": (byol_disc,)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRANSFORM = v2.Compose([
    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.1),
    v2.RandomResizedCrop(32, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
    v2.RandomHorizontalFlip()])


def through_pil(images):
    return torch.stack([to_tensor(TRANSFORM(to_pil_image(x))) for x in images])


def training_step(images, mode, script, *flags):
    """A function that computes a training step as the script's main does, and the script's args."""
    flags += ("--graph",) if mode == "CUDA graph" else ()
    with patch.object(sys, "argv", [script.__name__, *map(str, flags)]):
        args = script.parse()
    f = Discriminator(args.width).to(args.device).eval().requires_grad_(False)
    model = (script.BYOL if hasattr(script, "BYOL") else script.SimCLR)(args, f).to(args.device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad),
                                 lr=args.lr, weight_decay=1e-6, fused=True)
    total_steps = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(args.schedule, total_steps))
    scaler = grad_scaler(args)
    index = torch.randperm(len(images), device=images.device)[:args.batch_size]

    def forward_backward(x):
        optimizer.zero_grad()
        with autocast(args):
            loss, terms = model(x)
        scaler.scale(loss).backward()
        return {"loss": loss, **terms}
    forward_backward = graphed(forward_backward, args)

    def step():
        forward_backward(images[index])
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if hasattr(model, "update_target"):
            model.update_target(target_tau(args.tau, schedule.last_epoch / total_steps))
    return step, args


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU would launch (no views, no empty tensors), and the FLOP."""
    count = flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += not (function.is_view or re.search("empty|unsafe_view", function.name()))
        if formula := flop_registry.get(function.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


def clock(given):
    """The time in seconds, once the device has finished its work."""
    if given.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(functions, given, calls=10):
    """For each function, its seconds per call in each round, in which they take turns."""
    times = [[] for _ in functions]
    for _ in range(given.rounds + 1):
        for function, values in zip(functions, times):
            began = clock(given)
            for _ in range(calls):
                function()
            values.append((clock(given) - began) / calls)
    return [values[1:] for values in times]


def gpu_ms(step):
    """The ms between two CUDA events around a step that is launched while the GPU is paused."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2 * 10 ** 8)                    # cycles: a tenth of a second
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def row(*cells):
    cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("|", " | ".join(cells), "|", flush=True)


def rates(images, given):
    """Print what the device reaches; return {precision: FLOP per second} of a matrix product."""
    n, workers, reached = 8192 if given.cuda else 2048, torch.get_num_threads(), {}
    for precision in given.precisions:
        a = torch.randn(n, n, device=given.device, dtype=DTYPES[precision])
        torch.set_float32_matmul_precision("high" if given.cuda else "highest")            # TF32
        reached[precision] = 2 * n ** 3 / median(*seconds([lambda: a @ a], given))
        torch.set_float32_matmul_precision("highest")
        row(f"product of {n} x {n}, {precision}", f"{reached[precision] / 1e12:.3g} TFLOP/s")
    loader = DataLoader(images.cpu(), 512, drop_last=True, collate_fn=through_pil,
                        num_workers=workers, prefetch_factor=1, persistent_workers=True)
    batches = (views for _ in count() for views in loader)
    for name, views, calls in [("augment", lambda: augment(images[:512]), 10),
                               ("v2", lambda: TRANSFORM(images[:512] / 255), 10),
                               ("PIL", lambda: next(batches).to(given.device), workers)]:
        rate = 512 / median(*seconds([views], given, calls))
        row(f"views of 512 images: {name}", f"{rate:.0f} images/s")
    return reached


def counts(images, given):
    """Print the number of operations of a step; return {method: FLOP per image}."""
    work = {}
    for method, flags in METHODS.items():
        launched = []
        for precision in given.precisions:
            step, _ = training_step(images[:2].cpu(), "eager", *flags, "--width", given.width,
                                    "--device", "cpu", "--batch-size", 2, "--precision", precision)
            step()                                        # Adam makes its state
            with Operations() as operations:
                step()
            launched.append(f"{operations.count} in {precision}")
            work[method] = operations.flop / 2
        launched.append(f"{work[method] / 1e9:.3g} GFLOP per image")
        row(f"operations of {method}", ", ".join(launched))
    return work


def build(images, given, method, mode, precision, batch):
    """The step of a row, after its warm-up, its batch size, and its peak memory in GiB."""
    before = torch.cuda.memory_allocated() if given.cuda else 0
    size = ["--batch-size", batch] if batch else []
    step, args = training_step(images, mode, *METHODS[method], *size, "--width", given.width,
                               "--device", given.device, "--precision", precision)
    if not given.cuda:
        return step, args.batch_size, ""
    for call in range(6):                                 # the fourth captures the graph
        if call == 3:                                     # cuDNN has tried its algorithms
            torch.cuda.reset_peak_memory_stats()
        step()
    return step, args.batch_size, (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def compare(group, images, given, work, reached):
    """Print the rows of a group, [(method, mode, precision, batch)], which take turns."""
    gc.collect()                                          # frees earlier rows' memory
    built = [build(images, given, *variant) for variant in group]
    times = seconds([step for step, *_ in built], given, 10 if given.cuda else 1)
    for (method, mode, precision, _), (step, size, memory), t in zip(group, built, times):
        rate = size / median(t)
        row(f"{method}, {mode}, {precision}", size, rate,
            f"{size / max(t):.1f} to {size / min(t):.1f}", 1000 * median(t),
            gpu_ms(step) if given.cuda else "", f"{work[method] * rate / reached[precision]:.1%}",
            50000 / rate, 5e7 / 3600 / rate, memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--rounds", type=number(int, 1), default=3, help="timed rounds")
    add("--batch", type=number(int, 2, 25000), help="batch size of all rows")
    add("--width", type=number(int, 8, 1024), default=64, help="base channel width of all networks")
    given = parser.parse_args()
    given.cuda, given.precision = given.device == "cuda", "auto"
    prepare_device(given)
    auto = resolve_precision(given)
    given.precisions = ["fp16" if given.cuda and auto == "fp32" else "bf16", "fp32"]
    print(provenance() | {"load average": os.getloadavg()[0]})
    print("\n| | measured |\n|---|---|", flush=True)
    images = draw_shapes(5000, seed=0)[0].repeat(10, 1, 1, 1).to(given.device)
    reached, work = rates(images, given), counts(images, given)
    print("\n| step | batch | images/s | slowest to fastest | ms | GPU ms | share | s for 50,000 "
          f"| h for 1000 epochs | GiB |\n{'|---' * 10}|", flush=True)
    sizes = [given.batch] if given.batch else [None, 128]               # None: the script's own
    one_size = sizes[0] if given.cuda else sizes[-1]
    modes = ["eager", "CUDA graph"] if given.cuda and not torch.version.hip else ["eager"]
    simclr, byol, *third_views = METHODS
    groups = [[(name, mode, precision, size) for precision in given.precisions for size in sizes
               for mode in modes] for name in (simclr, byol)]
    groups += [[(name, mode, auto, one_size) for name in third_views for mode in modes]]
    for group in groups:
        compare(group, images, given, work, reached)


if __name__ == "__main__":
    launch(main)
