"""The Langevin sampler against densities whose stationary state is known."""
import pytest
import torch
import torch.nn as nn

from common import Discriminator, langevin, mix_with_noise


def test_mix_with_noise_moments():
    x = torch.full((200_000,), 0.2)
    for alpha in (0.0, 0.6, 1.0):
        mixed = mix_with_noise(x, alpha)
        assert mixed.mean().item() == pytest.approx(alpha * 0.2 + (1 - alpha) * 0.5, abs=2e-3)
        assert mixed.std().item() == pytest.approx((1 - alpha) / 12 ** 0.5, abs=2e-3)
        assert mixed.min() >= alpha * 0.2 - 1e-6 and mixed.max() <= alpha * 0.2 + 1 - alpha + 1e-6
    assert mix_with_noise(x, 0.6).mean().item() != pytest.approx(0.4 * 0.2 + 0.6 * 0.5, abs=0.02)


def test_stationary_variance_of_a_gaussian():
    """For f = -(x - 1/2)^2 / 2s^2 the chain is AR(1): variance n^2 / (1 - (1 - h / s^2)^2)."""
    s, h, n = 0.1, 0.004, 0.05

    def f(x):
        return -((x - 0.5) ** 2).sum(1) / (2 * s * s)

    sample = langevin(f, torch.rand(20_000, 2), 60, h, n, grad_clip=1e9)
    expected = n * n / (1 - (1 - h / s ** 2) ** 2)
    assert sample.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert sample.var().item() == pytest.approx(expected, rel=0.03)
    assert sample.var().item() != pytest.approx(s * s, rel=0.1)     # that of the density itself


def test_it_climbs_f_by_clamped_steps_and_stays_in_range():
    x = torch.full((2, 3), 0.5)
    moved = langevin(lambda x: 1000 * x[:, 0] - 1000 * x[:, 1] + 1e-3 * x[:, 2], x, 1, 10, 0.0)
    assert torch.allclose(moved, torch.tensor([0.6, 0.4, 0.51]).expand(2, 3))
    assert langevin(lambda x: 1000 * x.sum(1), x, 99, 10, 0.0).max() == 1
    assert langevin(lambda x: -1000 * x.sum(1), x, 99, 10, 0.0).min() == 0
    assert torch.equal(x, torch.full((2, 3), 0.5))                  # the argument stays as it is


def test_f_is_untouched_and_the_sample_detached():
    f, start = Discriminator(8), torch.rand(2, 3, 32, 32)
    f.stages[0].insert(1, nn.BatchNorm2d(8))
    f.eval()
    before = {name: value.clone() for name, value in f.state_dict().items()}
    with torch.no_grad():                                           # the caller's
        sample = langevin(f, start, 3, 10, 0.005)
    assert not sample.requires_grad and not start.requires_grad
    assert not langevin(f, start.requires_grad_(), 0, 10, 0.0).requires_grad
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    f.train()(sample)                                               # a control: this is seen
    assert any(not torch.equal(value, before[name]) for name, value in f.state_dict().items())
