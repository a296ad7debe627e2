"""BYOL with the features of a frozen encoder as a third view: a teacher that is not generative.

The method is byol_disc.py's. In place of D's features stand those of the encoder of a finished
run, standardised in the same way.

    python .github/byol_teacher.py --teacher runs/simclr_disc-... --coeff 1
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from byol_disc import BYOL
from common import (Encoder, Run, augment, autocast, checksum, compile_networks, distribute, launch,
                    load, load_into, lr_factor, make_parser, number, parse_flags, target_tau,
                    training_images)
from linear_eval import evaluate


class Teacher(nn.Module):
    """The frozen encoder of the run in the directory `path`; its features, standardised over one
    augmented pass of images (N, 3, H, W), uint8, are read as a discriminator's are."""

    def __init__(self, path, images, args):
        super().__init__()
        config = load(Path(path) / "config.json", script=str, epochs=int, width=int)
        self.kind = f"{config['script']} of {config['epochs']} epochs"
        saved = load(Path(path) / "checkpoint.pt", model=dict)["model"]
        self.encoder = Encoder(config["width"]).to(images.device)
        self.dims = {"last": self.encoder.dim}
        load_into(self.encoder, {name.removeprefix("encoder."): value for name, value
                                 in saved.items() if name.startswith("encoder.")}, path)
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
    parser.add_argument("--teacher", required=True, help="directory of the run whose encoder it is")
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
    run = Run(args, images, evaluate)
    total_steps = run.total_steps(images)
    run.config["f"] = checksum(*teacher.state_dict().values())
    torch.manual_seed(args.seed)
    model = BYOL(args, teacher).to(args.device)
    ddp = distribute(compile_networks(model, args))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad),
                                 lr=args.lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(args.schedule, total_steps))

    for epoch in run.epochs(model=model, optimizer=optimizer, schedule=schedule):
        for x in run.batches(images, epoch):                              # (B, 3, H, W), uint8
            with autocast(args):
                loss, terms = ddp(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.update_target(target_tau(args.tau, schedule.last_epoch / total_steps))
            run.log(loss=loss, **terms)
    run.finish(model.encoder)


if __name__ == "__main__":
    launch(main)
