"""BYOL with the features of a pretrained discriminator as a third view.

    v1, v2, v3 = three independent augmentations of a batch x
    p_i = q(g(E(v_i))),  t_i = g'(E'(v_i))                         for i = 1, 2              (1)
    p_3 = q(g_D(D(v3))), t_3 = g_D'(D(v3))                         D: frozen features        (2)
    pair(a, b) = byol_loss(p_a, t_b) + byol_loss(p_b, t_a)         2 - 2 cos, both ways      (3)
    loss = pair(1, 2) + coeff * (pair(1, 3) + pair(2, 3)) / 2                                (4)
    E', g', g_D' <- tau * (E', g', g_D') + (1 - tau) * (E, g, g_D) after every step          (5)

E: encoder, g: projector, q: predictor. A prime marks the target network, whose EMA momentum tau
rises from --tau to 1. D(v): mean and variance of each channel of the discriminator's last feature
map (--layers all: of the last map of each stage), standardised; g_D: projector of these features.

    python byol_disc.py --smoke             # synthetic shapes, a minute or two on a CPU
    python byol_disc.py --coeff 0.1         # the slides' best setting: 92.13 % after 1000 epochs
    python byol_disc.py --coeff 0           # the BYOL baseline; the slides: 90.20 %
"""
from copy import deepcopy

import torch
import torch.nn as nn

from common import (Encoder, Run, augment, autocast, byol_loss, distribute, ema_update, grad_scaler,
                    graphed, launch, lr_factor, make_parser, mlp, number, parse_flags, target_tau,
                    training_images, z_std)
from linear_eval import evaluate


class BYOL(nn.Module):
    def __init__(self, args, discriminator):
        super().__init__()
        self.coeff, self.third_view, self.layers = args.coeff, args.coeff > 0, args.layers
        self.sees_image = args.disc_input == "image"
        self.encoder = Encoder(args.width)
        self.projector = mlp(self.encoder.dim, 1024, args.emb)
        self.predictor = mlp(args.emb, 1024, args.emb)
        self.target_encoder = deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = deepcopy(self.projector).requires_grad_(False)
        if self.third_view:
            self.discriminator = discriminator
            self.view_projector = mlp(discriminator.dims[args.layers], 1024, args.emb)
            self.target_view_projector = deepcopy(self.view_projector).requires_grad_(False)

    def forward(self, x):
        """x: (B, 3, H, W), uint8 -> loss, and the terms to log."""
        n = 3 if self.third_view and not self.sees_image else 2           # augmented views
        views = augment(x.repeat(n, 1, 1, 1)).split(len(x))               # n of (B, 3, H, W)
        v1, v2 = views[:2]
        z1 = self.projector(self.encoder(v1))
        z2 = self.projector(self.encoder(v2))
        p1, p2 = self.predictor(z1), self.predictor(z2)                   # eq. (1)
        with torch.no_grad():
            t1 = self.target_projector(self.target_encoder(v1))
            t2 = self.target_projector(self.target_encoder(v2))
        pair12 = byol_loss(p1, t2) + byol_loss(p2, t1)                    # eq. (3)
        if not self.third_view:
            return pair12, {"pair12": pair12, "z_std": z_std(z1)}

        v3 = x / 255 if self.sees_image else views[2]
        with torch.no_grad():
            h3 = self.discriminator.features(v3, self.layers)             # (B, C)
            t3 = self.target_view_projector(h3)
        p3 = self.predictor(self.view_projector(h3))                      # eq. (2)
        pair13 = byol_loss(p1, t3) + byol_loss(p3, t1)
        pair23 = byol_loss(p2, t3) + byol_loss(p3, t2)
        loss = pair12 + self.coeff * (pair13 + pair23) / 2                # eq. (4)
        return loss, {"pair12": pair12, "pair13": pair13, "pair23": pair23, "z_std": z_std(z1)}

    def update_target(self, tau):
        ema_update(self.target_encoder, self.encoder, tau)                # eq. (5)
        ema_update(self.target_projector, self.projector, tau)
        if self.third_view:
            ema_update(self.target_view_projector, self.view_projector, tau)


def parse():
    parser = make_parser(__doc__, __file__)
    parser.set_defaults(batch_size=256)
    add = parser.add_argument
    add("--coeff", type=number(float, 0), default=0.1,
        help="weight of the third view's loss; 0 = the BYOL baseline, no EBM")
    add("--layers", choices=["last", "all"], default="last",
        help="discriminator features: of the last stage, or of all stages")
    add("--disc-input", choices=["augment", "image"], default="augment",
        help="the discriminator sees a third augmented view, or the image itself")
    add("--teacher",
        help="a control: directory of a run whose frozen encoder replaces the discriminator")
    add("--tau", type=number(float, 0, 1), default=0.99,
        help="initial EMA momentum of the target network; it rises to 1")
    return parse_flags(parser)


def main():
    args = parse()
    images = training_images(args).to(args.device)                        # (N, 3, H, W), uint8
    run = Run(args, images, evaluate)
    discriminator = run.get_discriminator(images)                         # None with --coeff 0
    if run.is_finished():
        return
    total_steps = args.epochs * (len(images) // args.batch_size)
    torch.manual_seed(args.seed)
    model = BYOL(args, discriminator).to(args.device)
    ddp = distribute(model)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad),
                                 lr=args.lr, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(args.schedule, total_steps))
    scaler = grad_scaler(args)                                            # fp16 alone needs it

    def forward_backward(x):
        optimizer.zero_grad()
        with autocast(args):
            loss, terms = ddp(x)
        scaler.scale(loss).backward()
        return {"loss": loss, **terms}

    step = graphed(forward_backward, args)                                # with --graph
    for epoch in run.epochs(model=model, optimizer=optimizer, schedule=schedule, scaler=scaler):
        for x in run.batches(images, epoch):                              # (B, 3, H, W), uint8
            terms = step(x)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()                                               # last_epoch counts steps
            model.update_target(target_tau(args.tau, schedule.last_epoch / total_steps))
            run.log(**terms)
    del step                                                              # frees a graph's memory
    run.finish(model.encoder)


if __name__ == "__main__":
    launch(main)
