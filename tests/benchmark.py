"""Tables of speeds, each beside what it is to be compared with: python tests/benchmark.py

Steps are the scripts' own, at their batches (SimCLR 512, BYOL 256) and at 128. Rows that belong
together take turns, so that a slow spell of the machine meets all alike; the first round is unseen,
of the others a row has the median. Two CPU cores should take eight minutes, with the ideas and
torchvision's views at 128 alone. On a GPU `compiled` comes last and takes longest.

- `eager` launches each operation; `captured`, the scripts' default on a GPU, replays forward and
  backward as a CUDA graph; `compiled` is --compile, which is not captured. On a GPU convolutions in
  fp32 are in TF32, and so is the product beside them.
- GPU's ms: between two CUDA events around a step that was launched during a pause of the GPU. Its
  queue holds all that `captured` launches: that is the GPU's own time. Of others it is a bound.
- Share: a step's operations a second, as direct convolutions take them, of those of a large matrix
  product. A library may need fewer, and so pass 100 %.
- GiB: of tensors, at the peak of a step, over what was there before; the images take 0.15 more.
- Operations of a step are what a GPU would be given, counted on the CPU. Views are none.
- `PIL` and `v2` are `eager` with torchvision's views: of PIL images, in as many workers as threads;
  or of a batch on the device, with one draw for all of it, which is another distribution.

To compare with: a plain ResNet-18 has 25 % of an A100's half-precision peak (32.3 PFLOP in 7 min of
312 TFLOP/s; README of KellerJordan/cifar10-airbench). SimCLR of dkobak/simclr-cifar10 (README at
44b2500) has 11.9 s an epoch on an A100: ResNet-18, batches of 512, fp32, PIL in 16 workers, SGD.
"""
import argparse
import gc
import os
import platform
import re
import resource
import subprocess
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import byol_disc
import byol_langevin
import simclr_disc
import simclr_langevin
from common import (Discriminator, augment, autocast, captured, compile_model, draw_shapes,
                    in_bf16, launch, lr_factor, number, prepare_device, target_tau)
from linear_eval import linear_accuracy

METHODS = {"SimCLR": (simclr_disc, "--coeff", "0"), "SimCLR, idea 1": (simclr_langevin,),
           "SimCLR, idea 2": (simclr_disc,), "BYOL": (byol_disc, "--coeff", "0"),
           "BYOL, idea 1": (byol_langevin,), "BYOL, idea 2": (byol_disc,)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TRANSFORMS = [
    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.1),
    v2.RandomResizedCrop(32, (0.2, 1), interpolation=InterpolationMode.BICUBIC),
    v2.RandomHorizontalFlip()]
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)
PIL = v2.Compose([v2.ToPILImage(), *TRANSFORMS, v2.PILToTensor(), TO_FLOAT])
V2 = v2.Compose([TO_FLOAT, *TRANSFORMS])


def through_pil(images):
    return torch.stack([PIL(x) for x in images])


def pil_views(images, n):
    """A function in place of `augment`: of any argument to n views of images, made ahead."""
    loader = DataLoader(images.cpu(), n, shuffle=True, drop_last=True, collate_fn=through_pil,
                        num_workers=torch.get_num_threads(), prefetch_factor=1,
                        persistent_workers=True)
    batches = (views for _ in count() for views in loader)
    return lambda x: next(batches).to(x.device)


def training_step(images, script, *flags, views=None):
    """A function that makes a training step as the script's main does, and the script's flags;
    `views`, of the flags, returns another augmentation."""
    with patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, flags)]):
        args = script.parse()
    f = Discriminator(args.width).to(args.device).requires_grad_(False)
    model = (script.BYOL if hasattr(script, "BYOL") else script.SimCLR)(args, f).to(args.device)
    model.augment = views(args) if views else model.augment
    ddp = compile_model(model, args)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad),
                                 lr=args.lr, weight_decay=1e-6, fused=True)
    total_steps = args.epochs * (len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(args.schedule, total_steps))
    index = torch.randperm(len(images), device=images.device)[:args.batch_size]

    def forward_backward(x):
        optimizer.zero_grad()
        with autocast(args):
            loss, terms = ddp(x)
        loss.backward()
        return {"loss": loss, **terms}
    forward_backward = captured(forward_backward, args)

    def step():
        forward_backward(images[index])
        optimizer.step()
        schedule.step()
        if hasattr(model, "update_target"):
            model.update_target(target_tau(args.tau, schedule.last_epoch / total_steps))
    return step, args


class Operations(TorchDispatchMode):
    """Counts what a GPU would be given to compute (no views, no empty tensors), and FLOP."""
    count = flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += not (function.is_view or re.search("empty|unsafe_view", function.name()))
        if formula := flop_registry.get(function.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


def clock(given):
    """Seconds, once the device has done all that it was given."""
    if given.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(functions, given, calls):
    """{name: seconds of a call, one of each round} of functions {name: callable}, which take turns
    of so many calls; one round unseen."""
    times = {name: [] for name in functions}
    for _ in range(given.rounds + 1):
        for name, function in functions.items():
            began = clock(given)
            for _ in range(calls):
                function()
            times[name].append((clock(given) - began) / calls)
    return {name: values[1:] for name, values in times.items()}


def alone(function, given, calls=10):
    """Median seconds of a call."""
    return median(seconds({"": function}, given, calls)[""])


def gpu_ms(step):
    """ms between two CUDA events around a step that is launched during a pause of the GPU."""
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


def peak_memory(step, before):
    """GiB of tensors at the peak of a step, over `before` in bytes; the fourth call captures."""
    for call in range(6):
        if call == 3:                                     # cuDNN has tried its algorithms
            torch.cuda.reset_peak_memory_stats()
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def row(*cells):
    cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("|", " | ".join(cells), "|", flush=True)


def rates(images, given):
    """Rows of what the device reaches; {precision: operations a second} of a product."""
    n, reached = (8192 if given.cuda else 2048), {}
    for precision, dtype in DTYPES.items():
        a = torch.randn(n, n, device=given.device, dtype=dtype)
        torch.set_float32_matmul_precision("high" if given.cuda else "highest")            # TF32
        reached[precision] = 2 * n ** 3 / alone(lambda: a @ a, given)
        torch.set_float32_matmul_precision("highest")
        row(f"product of {n} x {n}, {precision}", f"{reached[precision] / 1e12:.3g} TFLOP/s")
    x, y = torch.ones(2, 2 ** (28 if given.cuda else 26), device=given.device)
    copied = 8 * len(x) / alone(lambda: y.copy_(x), given)
    row(f"copy of {len(x) // 2 ** 18} MiB, read and written", f"{copied / 1e9:.3g} GB/s")
    for name, views, calls in [("augment", augment, 10), ("v2, one draw a batch", V2, 10),
                               ("PIL", pil_views(images, 512), torch.get_num_threads())]:
        rate = 512 / alone(lambda: views(images[:512]), given, calls)
        row(f"views of 512 images: {name}", f"{rate:.0f} images/s",
            f"{rate * 3072 * 5 / copied:.2%} of a copy, uint8 to float")
    return reached


def counts(images, given):
    """Rows of the operations of a step; {method: floating-point operations an image}."""
    work = {}
    for name, flags in METHODS.items():
        launched = []
        for precision in DTYPES:
            step, _ = training_step(images[:2].cpu(), *flags, "--width", given.width, "--device",
                                    "cpu", "--batch-size", 2, "--precision", precision)
            step()                                        # Adam makes its state
            with Operations() as operations:
                step()
            launched.append(f"{operations.count} in {precision}")
            work[name] = operations.flop / 2
        row(f"operations of {name}", ", ".join(launched), f"{work[name] / 1e9:.3g} GFLOP an image")
    return work


def probe(given):
    x = torch.randn(50000, 512, device=given.device)
    y, began = torch.arange(50000, device=given.device) % 10, clock(given)
    linear_accuracy(x, y, x[:1000], y[:1000], epochs=20)
    row("linear probe, 25 times 20 epochs of 50,000 x 512", f"{25 * (clock(given) - began):.0f} s")


def sizes(given, method, mode, precision):
    """The batches of a row, as flags: --batch, or the script's own and 128, or one of these."""
    plain = "idea" not in method and mode in ("eager", "captured")
    small = ("--batch-size", given.batch or 128)
    return [small] if given.batch else [(), small] if plain else [() if given.cuda else small]


def variant_step(images, given, batch, method, mode, precision):
    """A step of a row, the script's flags, and its memory."""
    before = torch.cuda.memory_allocated() if given.cuda else 0
    script, *flags = METHODS[method]
    flags += [*batch, *{"captured": [], "compiled": ["--compile"]}.get(mode, ["--eager"])]
    views = {"v2": lambda args: V2, "PIL": lambda args: pil_views(images, 2 * args.batch_size)}
    step, args = training_step(images, script, *flags, "--width", given.width, "--device",
                               given.device, "--precision", precision, views=views.get(mode))
    return step, args, peak_memory(step, before) if given.cuda else ""


def steps(variants, images, given, work, reached):
    """Rows of variants, [(method, mode, precision)], which take turns."""
    torch.compiler.reset()
    gc.collect()                                          # earlier rows' memory and workers
    built = {(variant, batch): variant_step(images, given, batch, *variant)
             for variant in variants for batch in sizes(given, *variant)}
    calls = torch.get_num_threads() if "PIL" in variants[0] else 10 if given.cuda else 1
    times = seconds({key: step for key, (step, *_) in built.items()}, given, calls)
    speed = {key: [built[key][1].batch_size / t for t in times[key]] for key in built}
    for variant in variants:
        first, *small = [key for key in built if key[0] == variant]
        (method, mode, _), (step, args, memory) = variant, built[first]
        rate, precision = median(speed[first]), "bf16" if in_bf16(args) else "fp32"
        row(f"{method}, {mode}, {precision}", args.batch_size, rate,
            f"{min(speed[first]):.1f} to {max(speed[first]):.1f}", 1000 * median(times[first]),
            gpu_ms(step) if given.cuda and mode not in ("PIL", "v2") else "",
            f"{work[method] * rate / reached[precision]:.1%}", 50000 / rate, 5e7 / 3600 / rate,
            memory, *[median(speed[key]) for key in small])


def head(given):
    """Set the device up; return what computes, and how busy it was before, where that is known."""
    load, card, info = os.getloadavg()[0], "", Path("/proc/cpuinfo")
    smi = subprocess.run("nvidia-smi --query-gpu=driver_version,utilization.gpu,memory.used "
                         "--format=csv,noheader", shell=True, capture_output=True, text=True)
    prepare_device(given)
    if given.cuda:
        seen = f" (driver, use, memory: {smi.stdout.strip()})" if smi.returncode == 0 else ""
        card = f"{torch.cuda.get_device_name()}{seen}, "
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return (f"{card}torch {torch.__version__}, {cpu[1] if cpu else platform.processor()}, "
            f"{torch.get_num_threads()} threads, load average {load:.2f} at the start")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--rounds", type=number(int, 1), help="that are timed; by default 5 on a GPU, 3 on a CPU")
    add("--batch", type=number(int, 2, 25000), help="in place of a script's own and of 128")
    add("--width", type=number(int, 8, 1024), default=64, help="of all networks")
    given = parser.parse_args()
    given.cuda = given.device == "cuda"
    given.rounds = given.rounds or (5 if given.cuda else 3)
    print(head(given) + "\n\n| | measured | compared |\n|---|---|---|", flush=True)
    images = draw_shapes(5000, seed=0)[0].repeat(10, 1, 1, 1).to(given.device)
    reached, work = rates(images, given), counts(images, given)
    probe(given)
    print("\n| step | batch | images/s | slowest to fastest | ms | GPU's ms | share | s for 50,000 "
          f"| h for 1000 epochs | GiB | images/s at 128 |\n{'|---' * 11}|", flush=True)
    both, modes = ("SimCLR", "BYOL"), ["eager", "captured"] if given.cuda else ["eager"]
    groups = [[(name, mode, form) for form in DTYPES for mode in modes] for name in both]
    groups += [[(f"{name}, idea {i}", modes[-1], "auto") for name in both for i in (1, 2)]]
    groups += [[(name, mode, "auto")] for mode in ("v2", "PIL") for name in both]
    groups += [[(name, "compiled", form)] for name in both for form in DTYPES if given.cuda]
    for group in groups:
        steps(group, images, given, work, reached)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"\nThe process took up to {peak:.1f} GiB of the host's memory.")


if __name__ == "__main__":
    launch(main)
