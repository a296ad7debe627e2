"""The losses against loops in float64, closed forms and finite differences."""
import math

import pytest
import torch

from common import byol_loss, nt_xent, z_std


def pair(b=6, d=5):
    return torch.randn(b, d, dtype=torch.float64), torch.randn(b, d, dtype=torch.float64)


def cosine(a, b):
    dot, aa, bb = (sum(x * y for x, y in zip(*pair)) for pair in [(a, b), (a, a), (b, b)])
    return dot / math.sqrt(aa * bb)


def nt_xent_in_loops(z1, z2, temperature):
    views, b, total = z1.tolist() + z2.tolist(), len(z1), 0.0
    for i, view in enumerate(views):
        others = {j: math.exp(cosine(view, views[j]) / temperature) for j in range(2 * b) if j != i}
        total -= math.log(others[(i + b) % (2 * b)] / sum(others.values()))
    return total / (2 * b)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_equals_loops(temperature):
    z1, z2 = pair()
    expected = nt_xent_in_loops(z1, z2, temperature)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(expected, abs=1e-10)
    wrong_partners = nt_xent(z1, z2.roll(1, 0), temperature).item()
    assert wrong_partners != pytest.approx(expected, abs=1e-3)
    assert nt_xent(torch.ones(8, 4), torch.ones(8, 4)).item() == pytest.approx(math.log(15))


def test_nt_xent_gradient():
    z1, z2 = (z.requires_grad_() for z in pair())
    assert torch.autograd.gradcheck(nt_xent, (z1, z2))


def test_byol_loss_equals_loops():
    p, t = pair()
    expected = sum(2 - 2 * cosine(a, b) for a, b in zip(p.tolist(), t.tolist())) / len(p)
    assert byol_loss(p, t).item() == pytest.approx(expected, abs=1e-10)
    assert byol_loss(p, t.roll(1, 0)).item() != pytest.approx(expected, abs=1e-3)
    assert byol_loss(p, -p).item() == pytest.approx(4) and byol_loss(p, 3 * p).item() < 1e-6


def test_byol_loss_has_gradient_into_the_prediction_alone():
    p, t = (z.requires_grad_() for z in pair())
    byol_loss(p, t).backward()
    assert t.grad is None and p.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda p: byol_loss(p, t), p)


@pytest.mark.parametrize("loss", [nt_xent, byol_loss])
def test_losses_are_fp32_under_autocast(loss):
    z1, z2 = (z.float() for z in pair(64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss(z1, z2)
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(loss(z1, z2).item(), abs=1e-6)
    assert loss(z1.bfloat16(), z2.bfloat16()).dtype == torch.float32


def test_z_std_shows_collapse():
    assert z_std(torch.ones(50, 8) * 3).item() < 1e-6
    assert z_std(torch.randn(5000, 8)).item() == pytest.approx(1, abs=0.02)
