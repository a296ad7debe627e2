"""ADE: the dynamics against hand-made steps, its two losses by hand, and spectral norm."""
import copy
import weakref
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import Discriminator, adversarial_dynamics, draw_shapes
from test_ebm import assert_step, flags, moved, sgd

CENTRE, CURVATURE = torch.tensor([0.3, -0.9, 1.4], dtype=torch.float64)[:, None, None], 0.02


def quadratic(x):
    """Whose gradient in q = 2 x - 1 is CURVATURE (CENTRE - q)."""
    return -CURVATURE / 2 * (2 * x - 1 - CENTRE).square().sum((1, 2, 3))


def slope(q):
    return (CURVATURE * (CENTRE - q)).clamp(-0.01, 0.01)


def two_steps(q0, p0, eps, slope=slope):
    """The dynamics for T = 2, a line each."""
    p = 0.5 * p0 + 0.5 * eps * slope(q0)
    q1 = torch.clamp(q0 + p, -1, 1)
    p = 0.5 * p + eps * slope(q1)
    q2 = torch.clamp(q1 + p, -1, 1)
    return q2, 0.5 * p + 0.5 * eps * slope(q2)


def start():
    q0 = torch.tensor([[-0.5, 0.95, 0.8], [0.2, -0.6, -0.97]], dtype=torch.float64)
    p0 = torch.tensor([[0.06, 0.6, 0.3], [-0.1, 0.04, -0.2]], dtype=torch.float64)
    eps = torch.tensor([8.0, 10.0, 12.0], dtype=torch.float64)
    return q0[:, :, None, None], p0[:, :, None, None], eps[:, None, None]


def dynamics(q0, p0, eps):
    x, p = adversarial_dynamics(quadratic, (q0 + 1) / 2, p0, eps, steps=2)
    return 2 * x - 1, p


def test_it_follows_a_quadratic():
    for ours, by_hand in zip(dynamics(*start()), two_steps(*start())):
        assert torch.allclose(ours, by_hand, atol=1e-12)
    clipped = slope(start()[0]).abs() == 0.01
    assert dynamics(*start())[0].abs().max() == 1 and clipped.any() and not clipped.all()


def test_its_gradient_is_that_with_the_slopes_of_f_held():
    """With those of f's slopes moving too, the control, it differs."""
    weights = torch.rand(2, 2, 3, 1, 1, dtype=torch.float64)

    def gradient(dynamics):
        inputs = [value.requires_grad_() for value in start()]
        q, p = dynamics(*inputs)
        return torch.autograd.grad((weights[0] * q + weights[1] * p).sum(), inputs)

    held = gradient(partial(two_steps, slope=lambda q: slope(q).detach()))
    for ours, right, wrong in zip(gradient(dynamics), held, gradient(two_steps), strict=True):
        assert torch.allclose(ours, right, atol=1e-12)
        assert not torch.allclose(ours, wrong, atol=1e-4)


def test_it_calls_f_once_more_than_its_thirty_steps_and_keeps_nothing_of_it():
    kept, layer = [], nn.Conv2d(3, 8, 3)

    def f(x):
        hidden = layer(x).tanh()
        kept.append(weakref.ref(hidden))
        return hidden.square().sum((1, 2, 3))

    x, p = torch.rand(2, 2, 3, 8, 8).requires_grad_()
    end = adversarial_dynamics(f, x, p, torch.full((3, 8, 8), 10.0))
    assert end[0].requires_grad and len(kept) == 31
    assert all(hidden() is None for hidden in kept)
    assert layer.weight.grad is None


def ade(tmp_path):
    """The state of an `ade` whose power iteration has converged; its D without spectral norm."""
    state = common.ebm_networks(flags(tmp_path, "--ebm-objective", "ade"))
    for _ in range(300):
        with common.spectral_weights(state["d"]):
            pass
    plain = Discriminator(8)
    for (_, layer), (_, normed) in zip(f_layers(plain), f_layers(state["d"])):
        weight = normed.parametrizations.weight.original.detach()
        layer.weight.data, layer.bias.data = weight.clone(), normed.bias.detach().clone()
    plain.rotation.load_state_dict(state["d"].rotation.state_dict())
    return state, plain


def f_layers(d):
    return [(name, layer) for name, layer in d.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and name != "rotation"]


def norm_of(weight):
    return torch.linalg.matrix_norm(weight.flatten(1), 2)


def over_norm(weights):
    """The parameters by name, each weight of f divided by its largest singular value."""
    return {name: w / norm_of(w) if name.endswith("weight") and "rotation" not in name else w
            for name, w in weights.items()}


def test_discriminator_step_equals_its_formula(tmp_path, monkeypatch):
    x, negatives = draw_shapes(8, seed=3)[0] / 255, torch.rand(8, 3, 32, 32)
    monkeypatch.setattr(common, "adversarial_dynamics", lambda f, x, p, eps: (x * 0 + negatives, p))
    state, plain = ade(tmp_path)
    d, g, weights = state["d"], state["g"], dict(plain.named_parameters())

    def gradient(sign, normed):
        f_real, f_sample = (torch.func.functional_call(plain, normed, y) for y in (x, negatives))
        return torch.autograd.grad(sign * (f_sample - f_real).mean(), list(weights.values()),
                                   allow_unused=True, materialize_grads=True)

    expected = gradient(1, over_norm(weights))
    wrong = [gradient(-1, over_norm(weights)), gradient(1, weights)]
    names = [name.replace("parametrizations.weight.original", "weight")
             for name, _ in d.named_parameters()]
    step = moved(d, lambda: common.ade_step(x, 0, d, sgd(d, 1.0), g, sgd(g, 0.0)))
    step = [dict(zip(names, step))[name] for name in weights]
    assert_step(step, expected, wrong, 1e-2, 1e-5)


def test_generator_and_eps_descend_energy_kinetic_energy_and_minus_entropy(tmp_path, monkeypatch):
    state, plain = ade(tmp_path)
    g, reference, seen = state["g"], copy.deepcopy(state["g"]), []

    def marked(f, x, p, eps):                     # differentiable in all, of terms that show
        seen.append((x.detach(), p, eps))
        return 0.9 * x + 0.001 * eps, x * eps + p

    monkeypatch.setattr(common, "adversarial_dynamics", marked)
    torch.manual_seed(5)
    z, noise = torch.randn(8, 128), torch.randn(8, 3, 32, 32)
    mu = reference(z)
    reference.eval()                                # the other branch's BatchNorm by hand
    h = reference.net[0](z[:, :, None, None])
    h = F.relu(F.batch_norm(h, None, None, reference.net[1].weight, reference.net[1].bias, True))
    reference.train()
    sigma = 1e-3 * reference.sigma(h)
    x_0 = mu + sigma * noise / 2
    images = 0.9 * x_0 + 0.001 * reference.eps
    weights = over_norm({name: p.detach() for name, p in plain.named_parameters()})
    energy = -torch.func.functional_call(plain, weights, images).mean()
    kinetic = (x_0 * reference.eps).square().sum() / 8
    surprise = -sigma.log().sum() / 8

    def gradient(energy, kinetic, surprise):
        return torch.autograd.grad(energy + 1e-5 * (kinetic + surprise),
                                   list(reference.parameters()), retain_graph=True)

    expected = gradient(energy, kinetic, surprise)
    wrong = [gradient(-energy, kinetic, surprise), gradient(energy, 0, surprise),
             gradient(energy, kinetic, 0 * surprise), gradient(energy, kinetic, -surprise),
             gradient(energy, 8 * kinetic, surprise)]
    assert torch.equal(g.eps, torch.full((3, 32, 32), 10.0))
    torch.manual_seed(5)
    step = moved(g, lambda: common.ade_step(draw_shapes(8, seed=3)[0] / 255, 0, state["d"],
                                            sgd(state["d"], 0.0), g, sgd(g, 1.0)))
    assert_step(step, expected, wrong, 2e-2, 1e-7)
    assert all(p.requires_grad for p in state["d"].parameters())
    (start, p_0, eps), = seen
    assert torch.allclose(start, x_0.detach(), atol=1e-6) and eps is g.eps and eps.requires_grad
    assert p_0.std().item() == pytest.approx(1e-4, rel=0.05)


def test_weights_are_normalised_once_a_step_in_fp32(tmp_path, monkeypatch):
    state, _ = ade(tmp_path)
    d, autocasts = state["d"], []
    norm = type(d.linear.parametrizations.weight[0])
    monkeypatch.setattr(norm, "forward", lambda self, weight, once=norm.forward: autocasts.append(
        torch.is_autocast_enabled("cpu")) or once(self, weight))
    with torch.autocast("cpu", torch.bfloat16):
        common.ade_step(torch.rand(2, 3, 32, 32), 0, **copy.deepcopy(state))
    assert autocasts == 12 * [False]                # 6 with D's step, 6 with G's
    with common.spectral_weights(d):
        normed = [layer.weight for _, layer in f_layers(d)]
    baked = common.fix_spectral_norm(d)
    assert not [name for name in baked.state_dict() if "parametrizations" in name]
    assert all(torch.equal(layer.weight, weight)
               for weight, (_, layer) in zip(normed, f_layers(baked)))
