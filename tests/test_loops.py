"""The four programs against a plain PyTorch loop written here: the same weights, bit for bit.

Two epochs of six steps, at the last of which the learning rate drops. The method's own `forward`
is tested in test_methods.py.
"""
import inspect
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import byol_disc
import byol_langevin
import common
import linear_eval
import simclr_disc
import simclr_langevin
from common import Encoder, langevin, load_ebm, seed_of
from linear_eval import extract_features

CHAIN = dict(steps=6, step_size=7.0, noise_std=2 * 0.004, grad_clip=1e-4)
FLAGS = ("--dataset synthetic --subset 51 --width 8 --emb 8 --batch-size 8 --epochs 2 --seed 3 "
         "--lr 0.01 --precision fp32 --ebm ebm.pt --ebm-iters 0 --run-dir run").split()
SCALE = 2.0 ** 18                                       # overflows in the first steps
LANGEVIN = ("--alpha 0.7 --steps 6 --step-size 7 --noise-std 2 --noise-unit 0.004 "
            "--grad-clip 0.0001").split()


@pytest.fixture
def program(tmp_path, monkeypatch, small):
    """Set the command line, in a directory of its own; returns the flags and the 51 images."""
    monkeypatch.setitem(linear_eval.METRICS, "linear", fingerprint)
    monkeypatch.chdir(tmp_path)

    def prepare(script, flags):
        langevin_flags = LANGEVIN if script in (simclr_langevin, byol_langevin) else []
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *FLAGS, *langevin_flags,
                                          *flags.split()])
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        return script.parse(), common.draw_shapes(5000, 0)[0][order[:51]]
    return prepare


def fingerprint(train_x, train_y, test_x, test_y):
    """Instead of the probe: it tells any two encoders apart."""
    w = torch.arange(train_x.shape[1]).double().cos()
    train, test = (train_x.double() @ w).abs(), (test_x.double() @ w).abs()
    return (train * train_y).mean().item() + test.mean().item()


def linear(encoder):
    """Its accuracy in eval.json."""
    (x, y), (test_x, test_y) = common.draw_shapes(5000, 0), common.draw_shapes(1000, 1)
    features = extract_features(encoder, x), y, extract_features(encoder, test_x), test_y
    return pytest.approx(fingerprint(*features), rel=1e-4)


def lr_at(step, args):
    """After a warm-up of one step."""
    if args.schedule == "cosine":
        return args.lr * ((1 + math.cos(math.pi * max(0, step - 1) / 11)) / 2)
    return args.lr * (0.2 if step == 11 else 1)


def autocast(args):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def train(script, args, images, f):
    """The run written plainly: (method, the means of each epoch).

    In fp16 the loss is scaled; where a gradient overflows, the scale is halved and the step left
    out.
    """
    scale = SCALE if args.precision == "fp16" else 1
    torch.manual_seed(args.seed)
    method = (script.BYOL if hasattr(script, "BYOL") else script.SimCLR)(args, f)
    online = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(online, weight_decay=1e-6, fused=True)
    steps, means = len(images) // args.batch_size, []
    for epoch in (1, 2):
        torch.manual_seed(seed_of(args.seed, epoch, 0))
        shuffled = torch.Generator().manual_seed(seed_of(args.seed, epoch))
        order, rows = torch.randperm(len(images), generator=shuffled), []
        for i in range(steps):
            done = (epoch - 1) * steps + i
            optimizer.param_groups[0]["lr"] = lr_at(done, args)
            with autocast(args):
                loss, terms = method(images[order[i * args.batch_size:(i + 1) * args.batch_size]])
            for p in online:
                p.grad = None
            (scale * loss).backward()
            if all(p.grad.isfinite().all() for p in online):
                for p in online:
                    p.grad /= scale
                optimizer.step()
            else:
                scale /= 2
            if hasattr(script, "BYOL"):
                progress = (done + 1) / (2 * steps)
                tau = 1 - (1 - args.tau) * (math.cos(math.pi * progress) + 1) / 2
                for name, target in method.named_parameters():
                    if name.startswith("target_"):
                        online_p = method.get_parameter(name.removeprefix("target_"))
                        target.data.lerp_(online_p.data, 1 - tau)
            rows.append({"loss": loss.item(), **{k: v.item() for k, v in terms.items()}})
        means.append({name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})
    return method, means


def same(saved, method):
    """Whether a checkpoint has the method's weights, of all networks that learn or follow."""
    learned = {name: value for name, value in method.state_dict().items()
               if name.split(".")[0] not in ("f", "discriminator")}
    assert learned.keys() <= saved["model"].keys()
    return all(torch.equal(value, saved["model"][name]) for name, value in learned.items())


@pytest.mark.parametrize("script, flags", [
    (simclr_disc, "--coeff 0.5 --temperature 0.3 --eval-every 1"),
    (byol_disc, "--coeff 0.5 --layers all --tau 0.9 --schedule cosine --precision bf16"),
    (simclr_langevin, "--coeff 0.5 --view augment --schedule cosine --precision bf16"),
    (byol_langevin, "--coeff 0.5 --tau 0.9 --steps 2")],
    ids=["simclr_disc", "byol_disc", "simclr_langevin", "byol_langevin"])
def test_a_run_is_a_plain_loop(script, flags, program):
    args, images = program(script, flags)
    script.main()
    needs_ebm = args.coeff > 0 and "--view" not in flags
    assert needs_ebm == Path("ebm.pt").exists()
    f = load_ebm("ebm.pt", "cpu") if needs_ebm else None
    method, means = train(script, args, images, f)

    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert same(saved, method) and saved["done"] == 2

    _, start, *rows = map(json.loads, open("run/log.jsonl"))
    for i, (row, expected) in enumerate(zip(rows, means)):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert row["lr"] == pytest.approx(lr_at(6 * i, args)) and row["epoch"] == i + 1
    result = json.loads(open("run/eval.json").read())
    assert [row.get("knn5", 0) > 0 for row in rows] == 2 * [args.eval_every == 1]
    assert rows[1].get("knn5", result["knn5"]) == result["knn5"]
    assert start["epoch"] == 0 and start["knn5"] == result["untrained"]["knn5"]
    torch.manual_seed(args.seed)
    for values, encoder in [(result, method.encoder), (result["untrained"], Encoder(8))]:
        with autocast(args):
            assert values["linear"] == linear(encoder)
    assert result["linear"] != pytest.approx(result["untrained"]["linear"], rel=1e-3)


def tiny_encoder(width):
    """One without convolutions, whose backward pass in fp16 takes seconds on a CPU."""
    encoder = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(),
                                  torch.nn.Linear(192, 8 * width), torch.nn.BatchNorm1d(8 * width))
    encoder.dim = 8 * width
    return encoder


def test_a_run_in_fp16_scales_its_loss_and_resumes_exactly(program, monkeypatch):
    monkeypatch.setattr(byol_disc, "Encoder", tiny_encoder)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=SCALE))
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1)
    args, images = program(byol_disc, "--coeff 0.5 --precision fp16")
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "batches", lambda run, x, epoch, batches=common.Run.batches: (
            batches(run, x, epoch) if epoch == 1 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            byol_disc.main()
    begun = torch.load("run/checkpoint.pt", weights_only=True)
    assert begun["done"] == 1 and begun["scaler"]["scale"] < SCALE
    assert 0 < begun["scaler"]["_growth_tracker"] < 6                  # some steps were left out
    byol_disc.main()
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert saved["done"] == 2 and saved["scaler"]["scale"] < SCALE
    f = load_ebm("ebm.pt", "cpu")
    assert same(saved, train(byol_disc, args, images, f)[0])
    args.precision = "fp32"                                             # a control
    assert not same(saved, train(byol_disc, args, images, f)[0])


def test_generated_images_join_the_others(program, monkeypatch):
    """--use dataset; every chain of the run, that of the picture too, has the flags' settings."""
    script = simclr_langevin
    args, images = program(script, "--use dataset --batch-size 16")
    f, calls = common.train_ebm(images, args), []

    def recorded(*given, **named):
        calls.append(inspect.signature(langevin).bind(*given, **named).arguments)
        return langevin(*given, **named)
    monkeypatch.setattr(common, "langevin", recorded)
    script.main()
    assert [call["steps"] for call in calls] == [5, 1, 6]               # marks of the picture; all
    for call in calls:
        assert {**CHAIN, "steps": call["steps"]} == pytest.approx(
            {name: call[name] for name in CHAIN})

    torch.manual_seed(args.seed)
    start = 0.7 * (images / 255) + (1 - 0.7) * torch.rand(images.shape)
    made = (langevin(f, start, **CHAIN) * 255).round().byte()
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert same(saved, train(script, args, torch.cat([images, made]), f)[0])
    assert not same(saved, train(script, args, images, f)[0])           # a control
