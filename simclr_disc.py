"""SimCLR with the features of a pretrained discriminator as a third view.

    v1, v2, v3 = three independent augmentations of a batch x
    z_i = g(E(v_i))                                                for i = 1, 2              (1)
    z_3 = g_D(D(v3))                                               D: frozen features        (2)
    pair(a, b) = nt_xent(z_a, z_b, temperature)                    arXiv:2002.05709         (3)
    loss = pair(1, 2) + coeff * (pair(1, 3) + pair(2, 3)) / 2                                (4)

E: encoder, g: projector. D(v): mean and variance of each channel of the discriminator's last
feature map (--layers all: of the last map of each stage), standardised; g_D: projector of these
features.

    python simclr_disc.py --smoke           # synthetic shapes, a minute or two on a CPU
    python simclr_disc.py --coeff 0.1       # the slides: 91.66 % after 1000 epochs
    python simclr_disc.py --coeff 0         # the SimCLR baseline; the slides: 91.81 %
"""
import torch
import torch.nn as nn

from common import (Encoder, Run, augment, autocast, distribute, grad_scaler, graphed, launch,
                    lr_factor, make_parser, mlp, nt_xent, number, parse_flags, training_images,
                    z_std)
from linear_eval import evaluate


class SimCLR(nn.Module):
    def __init__(self, args, discriminator):
        super().__init__()
        self.coeff, self.third_view, self.layers = args.coeff, args.coeff > 0, args.layers
        self.sees_image = args.disc_input == "image"
        self.temperature = args.temperature
        self.encoder = Encoder(args.width)
        self.projector = nn.Sequential(mlp(self.encoder.dim, 1024, args.emb),
                                       nn.BatchNorm1d(args.emb))
        if self.third_view:
            self.discriminator = discriminator
            self.view_projector = nn.Sequential(
                mlp(discriminator.dims[args.layers], 1024, args.emb), nn.BatchNorm1d(args.emb))

    def forward(self, x):
        """x: (B, 3, H, W), uint8 -> loss, and the terms to log."""
        n = 3 if self.third_view and not self.sees_image else 2           # augmented views
        views = augment(x.repeat(n, 1, 1, 1)).split(len(x))               # n of (B, 3, H, W)
        v1, v2 = views[:2]
        h1, h2 = self.encoder(v1), self.encoder(v2)                       # (B, C)
        z1, z2 = self.projector(torch.cat([h1, h2])).chunk(2)             # eq. (1)
        pair12 = nt_xent(z1, z2, self.temperature)                        # eq. (3)
        if not self.third_view:
            return pair12, {"pair12": pair12, "z_std": z_std(z1)}

        v3 = x / 255 if self.sees_image else views[2]
        with torch.no_grad():
            h3 = self.discriminator.features(v3, self.layers)             # (B, C)
        z3 = self.view_projector(h3)                                      # eq. (2)
        pair13 = nt_xent(z1, z3, self.temperature)
        pair23 = nt_xent(z2, z3, self.temperature)
        loss = pair12 + self.coeff * (pair13 + pair23) / 2                # eq. (4)
        return loss, {"pair12": pair12, "pair13": pair13, "pair23": pair23, "z_std": z_std(z1)}


def parse():
    parser = make_parser(__doc__, __file__)
    parser.set_defaults(batch_size=512)
    add = parser.add_argument
    add("--coeff", type=number(float, 0), default=0.1,
        help="weight of the third view's loss; 0 = the SimCLR baseline, no EBM")
    add("--layers", choices=["last", "all"], default="last",
        help="discriminator features: of the last stage, or of all stages")
    add("--disc-input", choices=["augment", "image"], default="augment",
        help="the discriminator sees a third augmented view, or the image itself")
    add("--teacher",
        help="a control: directory of a run whose frozen encoder replaces the discriminator")
    add("--temperature", type=number(float, 1e-3), default=0.5,
        help="of NT-Xent; smaller puts more weight on hard negatives")
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
    model = SimCLR(args, discriminator).to(args.device)
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
            schedule.step()
            run.log(**terms)
    del step                                                              # frees a graph's memory
    run.finish(model.encoder)


if __name__ == "__main__":
    launch(main)
