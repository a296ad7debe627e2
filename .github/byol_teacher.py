"""BYOL with the features of a frozen encoder as a third view: a teacher that is not generative.

The method is byol_disc.py's. In place of D's features stand those of the encoder of a finished
run, standardised in the same way.

    python .github/byol_teacher.py --teacher runs/simclr_disc-coeff=0.0 --coeff 1
"""
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from byol_disc import BYOL
from common import (Run, UserError, augment, autocast, captured, checksum, compile_model,
                    distribute, launch, lr_factor, make_parser, number, parse_flags, reading,
                    target_tau, training_images)
from linear_eval import evaluate, load_encoder


class Teacher(nn.Module):
    """The frozen encoder of the run in the directory `path`; its features, standardised over one
    augmented pass of images (N, 3, H, W), uint8, are read as a discriminator's are."""

    def __init__(self, path, images, args):
        super().__init__()
        if not (Path(path) / "checkpoint.pt").exists() or Path(path).suffix == ".ebm":
            raise UserError(f"--teacher {path}: no run's directory; name one with a checkpoint.pt")
        with reading(Path(path) / "config.json") as config:
            self.kind = f"{config['script']} of {config['epochs']} epochs"
            for flag, plain in dict(coeff=0, width=args.width, subset=args.subset).items():
                self.kind += f", {flag} {config[flag]}" * (config[flag] != plain)
            if config["seed"] != args.seed:               # the same seed: the same initial weights
                self.kind += f", seed {config['seed'] - args.seed:+d}"
        with reading(Path(path) / "checkpoint.pt") as saved:
            if saved["done"] < config["epochs"]:
                raise UserError(f"--teacher {path}: is at epoch {saved['done']} of "
                                f"{config['epochs']}; finish it first")
            self.encoder = load_encoder(saved["model"], config["width"]).to(images.device)
        self.dims = {"last": self.encoder.dim}
        self.eval().requires_grad_(False)
        torch.manual_seed(args.seed)
        with autocast(args):
            h = torch.cat([self.encoder(augment(x)).float() for x in images.split(500)])
        std, self.mean = torch.std_mean(h, 0)                                      # (C,)
        self.std = std.clamp_min(1e-6)

    def features(self, x, layers):
        return (self.encoder(x) - self.mean) / self.std                            # (B, C)


def parse():
    parser = make_parser(__doc__)
    parser.set_defaults(batch_size=256, layers="last")
    parser.add_argument("--teacher", required=True,
                        type=lambda path: os.path.relpath(os.path.expanduser(path)),
                        help="directory of the run whose encoder it is")
    parser.add_argument("--coeff", type=number(float, 1e-9), default=0.1,
                        help="weight of the third view")
    parser.add_argument("--tau", type=number(float, 0, 1), default=0.99,
                        help="the target's moving-average rate at the start, rising to 1")
    return parse_flags(parser)


def main():
    args = parse()
    images = training_images(args).to(args.device)                        # (N, 3, H, W), uint8
    teacher = Teacher(args.teacher, images, args)
    args.teacher = teacher.kind                                           # where it is is no matter
    args.f = checksum(*teacher.state_dict().values())                     # a run is known by it
    run = Run(args, images, evaluate)
    total_steps = run.total_steps(images)
    torch.manual_seed(args.seed)
    model = BYOL(args, teacher).to(args.device)
    ddp = distribute(compile_model(model, args))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad),
                                 lr=args.lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(args.schedule, total_steps))

    def forward_backward(x):
        optimizer.zero_grad()
        with autocast(args):
            loss, terms = ddp(x)
        loss.backward()
        return {"loss": loss, **terms}

    step = captured(forward_backward, args)                               # a CUDA graph on a GPU
    for epoch in run.epochs(model=model, optimizer=optimizer, schedule=schedule):
        for x in run.batches(images, epoch):                              # (B, 3, H, W), uint8
            terms = step(x)
            optimizer.step()
            schedule.step()
            model.update_target(target_tau(args.tau, schedule.last_epoch / total_steps))
            run.log(**terms)
    run.finish(model.encoder)


if __name__ == "__main__":
    launch(main)
