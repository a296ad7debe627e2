"""SimCLR with images made by Langevin dynamics on an energy-based model as a third view.

    v1, v2 = two independent augmentations of a batch x
    I_0 = alpha * x + (1 - alpha) * U(0, 1);  then `steps` times, grad f and I being clamped,
    I <- I + step_size * grad f(I) + N(0, (noise_std * noise_unit)^2)
    v3 = augment(I)                                                                          (1)
    z_i = g(E(v_i))                                                for i = 1, 2, 3           (2)
    pair(a, b) = nt_xent(z_a, z_b, temperature)                    arXiv:2002.05709         (3)
    loss = pair(1, 2) + coeff * (pair(1, 3) + pair(2, 3)) / 2                                (4)

E: encoder, g: projector. f: output of the EBM's discriminator, the negative energy.

    python simclr_langevin.py --smoke       # synthetic shapes, minutes on a CPU
    python simclr_langevin.py --coeff 0.01  # the slides: 87.82 % after 1000 epochs
    python simclr_langevin.py --coeff 0     # the SimCLR baseline; the slides: 91.81 %
    python simclr_langevin.py --use dataset # generated images as more training images
"""
import torch
import torch.nn as nn

from common import (Encoder, Run, augment, autocast, batch_statistics, distribute, grad_scaler,
                    graphed, langevin_view, launch, lr_factor, make_parser, mlp, nt_xent, number,
                    parse_flags, training_images, z_std)
from linear_eval import evaluate


class SimCLR(nn.Module):
    def __init__(self, args, f):
        super().__init__()
        self.f, self.args = f, args
        self.coeff, self.third_view = args.coeff, args.coeff > 0 and args.use == "auxiliary"
        self.temperature = args.temperature
        self.encoder = Encoder(args.width)
        self.projector = nn.Sequential(mlp(self.encoder.dim, 1024, args.emb),
                                       nn.BatchNorm1d(args.emb))

    def forward(self, x):
        """x: (B, 3, H, W), uint8 -> loss, and the terms to log."""
        n = 3 if self.third_view and self.args.view == "augment" else 2   # augmented views
        views = augment(x.repeat(n, 1, 1, 1)).split(len(x))               # n of (B, 3, H, W)
        v1, v2 = views[:2]
        h1, h2 = self.encoder(v1), self.encoder(v2)                       # (B, C)
        z1, z2 = self.projector(torch.cat([h1, h2])).chunk(2)             # eq. (2)
        pair12 = nt_xent(z1, z2, self.temperature)                        # eq. (3)
        if not self.third_view:
            return pair12, {"pair12": pair12, "z_std": z_std(z1)}

        v3 = views[2] if n == 3 else augment(langevin_view(self.f, x, self.args))   # eq. (1)
        with batch_statistics(self):
            z3 = self.projector(self.encoder(v3))
        pair13 = nt_xent(z1, z3, self.temperature)
        pair23 = nt_xent(z2, z3, self.temperature)
        loss = pair12 + self.coeff * (pair13 + pair23) / 2                # eq. (4)
        return loss, {"pair12": pair12, "pair13": pair13, "pair23": pair23, "z_std": z_std(z1)}


def parse():
    parser = make_parser(__doc__, __file__)
    parser.set_defaults(batch_size=512)
    add = parser.add_argument
    add("--coeff", type=number(float, 0), default=0.01,
        help="weight of the third view's loss; 0 = the SimCLR baseline, no EBM")
    add("--steps", type=number(int, 0), default=15, help="Langevin steps; 0 = the noisy start I_0")
    add("--step-size", type=number(float, 0), default=10, help="factor of the gradient of f")
    add("--noise-std", type=number(float, 0), default=1.0, help="noise, in units of --noise-unit")
    add("--noise-unit", type=number(float, 0), default=0.005, help="fraction of the pixel range")
    add("--grad-clip", type=number(float, 0), default=0.01, help="largest entry of the gradient")
    add("--alpha", type=number(float, 0, 1), default=0.6, help="weight of the image in I_0")
    add("--use", choices=["auxiliary", "dataset"], default="auxiliary",
        help="auxiliary = a third view, new in each step; dataset = one sample per training image, "
             "generated once and added to the training set: an epoch has twice the steps")
    add("--view", choices=["langevin", "augment"], default="langevin",
        help="augment = a third augmented view in place of the sample: a control without an EBM")
    add("--temperature", type=number(float, 1e-3), default=0.5,
        help="of NT-Xent; smaller puts more weight on hard negatives")
    return parse_flags(parser)


def main():
    args = parse()
    images = training_images(args).to(args.device)                        # (N, 3, H, W), uint8
    run = Run(args, images, evaluate)
    f = run.get_discriminator(images)                                     # None if not used
    if run.is_finished():
        return
    run.save_chain(f, images[:16])
    if args.use == "dataset":
        images = torch.cat([images, run.generate_images(f, images)])
    total_steps = args.epochs * (len(images) // args.batch_size)
    torch.manual_seed(args.seed)
    model = SimCLR(args, f).to(args.device)
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
