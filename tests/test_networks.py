"""Shapes, the encoder against torchvision's ResNet-18, the discriminator's features against f."""
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Discriminator, Encoder, Generator, augment, draw_shapes, mlp, pool,
                    resolve_precision, seed_of, standardise_features)

ARGS = SimpleNamespace(seed=0, ebm_iters=0, device="cpu", precision="fp32")


def test_encoder_is_torchvisions_resnet18_with_the_cifar_stem():
    reference = torchvision.models.resnet18()
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool, reference.fc = nn.Identity(), nn.Identity()
    encoder = Encoder(64)
    reference.load_state_dict(dict(zip(reference.state_dict(), encoder.state_dict().values())))
    x = torch.rand(4, 3, 32, 32)
    assert torch.allclose(encoder(x), reference((x - 0.5) / 0.25), atol=1e-4)
    assert not torch.allclose(encoder(x), reference(x), atol=1e-2)
    assert encoder(x).shape == (4, encoder.dim) == (4, 512)


def test_shapes_and_ranges():
    assert Encoder(8)(torch.rand(2, 3, 24, 40)).shape == (2, 64)
    assert [type(layer) for layer in mlp(3, 5, 2)] == [nn.Linear, nn.BatchNorm1d, nn.ReLU,
                                                       nn.Linear]
    image = Generator(8, z_dim=7)(9 * torch.randn(8, 7))
    assert image.shape == (8, 3, 32, 32) and image.min() >= 0 and image.max() <= 1


def test_discriminator_layer_by_layer():
    """Convolutions with LeakyReLU 0.1, a mean over 2 x 2 pixels before the later two stages."""
    d, x = Discriminator(8), torch.rand(2, 3, 32, 32)

    def maps(slope=0.1, pool=F.avg_pool2d):
        image, made = (x - 0.5) / 0.25, []
        for i, layer in enumerate(m for m in d.modules() if isinstance(m, nn.Conv2d)):
            image = pool(image, 2) if i in (2, 4) else image
            image = F.conv2d(image, layer.weight, layer.bias, padding=1)
            image = torch.where(image > 0, image, slope * image)
            made.append(image)
        return made[1], made[3], made[4]

    for ours, right, *wrong in zip(d.maps(x), maps(), maps(0.2), maps(0.1, F.max_pool2d)):
        assert torch.allclose(ours, right, atol=1e-4)
        assert not torch.allclose(ours, wrong[0], atol=1e-2)
    assert not torch.allclose(ours, wrong[1], atol=1e-2)
    assert [(m.in_channels, m.out_channels, m.bias.abs().max()) for m in d.modules()
            if isinstance(m, nn.Conv2d)] == [(3, 8, 0), (8, 16, 0), (16, 16, 0), (16, 32, 0),
                                             (32, 32, 0)]


def test_features_are_mean_and_variance_of_each_channel():
    """Of the last map f is a linear function."""
    d, x = Discriminator(8), torch.rand(2, 3, 32, 32)
    assert torch.allclose(d.linear(d.features(x)).squeeze(1), d(x), atol=1e-6)
    assert all(d.features(x, layers).shape == (2, dim) for layers, dim in d.dims.items())

    def expected(variance):
        return torch.cat([torch.tensor([[of(channel.flatten().tolist()) for channel in image]
                                        for image in stage])
                          for stage in d.maps(x) for of in (statistics.fmean, variance)], 1)

    right, unbiased = expected(statistics.pvariance), expected(statistics.variance)
    assert torch.allclose(d.features(x, "all"), right, rtol=1e-4, atol=1e-6)
    assert torch.allclose(d.features(x, "last"), right[:, -64:], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(d.features(x, "all"), unbiased, rtol=1e-4, atol=1e-6)
    rounded = d.maps(x)[-1].bfloat16()
    assert torch.equal(pool(rounded), pool(rounded.float()))            # in fp32, whatever the map


def test_features_are_standardised_over_augmented_images():
    d, (images, _) = Discriminator(8), draw_shapes(60, seed=3)
    torch.manual_seed(seed_of(0, 0))
    views, energies = augment(images), d(images / 255)
    raw = d.features(views, "all").detach()
    standardise_features(d, draw_shapes(20, seed=4)[0], ARGS)           # which leaves no trace
    assert not torch.allclose(d.features(views).mean(0), torch.zeros(64), atol=1e-3)
    standardise_features(d, images, ARGS)
    expected = (raw - raw.mean(0)) / raw.std(0, correction=0)
    assert torch.allclose(d.features(views, "all"), expected, atol=1e-3)
    assert torch.equal(d.features(views), d.features(views, "all")[:, -64:])
    assert torch.equal(d(images / 255), energies)
    assert (d.features(images / 255).mean(0).abs() > 0.05).any()        # on those as they are, not


def test_constant_features_stay_finite():
    d, black = Discriminator(8), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for _ in range(2):
        standardise_features(d, black, ARGS)                            # black in every view
        assert torch.allclose(d.features(black / 255), torch.zeros(64), atol=1e-3)
        assert d.features(draw_shapes(8, seed=3)[0] / 255).abs().max() < 1e7


def test_initial_spread_of_the_weights():
    """Encoder: He's for the gradients, as torchvision's ResNet; generator: DCGAN's; f: He's."""
    for network, std_of in [(Encoder(16), lambda w: (2 / (w.shape[0] * w.shape[2] ** 2)) ** 0.5),
                            (Generator(16), lambda w: 0.02),
                            (Discriminator(16), lambda w: (2 / 1.01 / (w.shape[1] * 9)) ** 0.5)]:
        weights = [m.weight for m in network.modules()
                   if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(weights) in (20, 4, 5)
        for weight in weights:
            assert weight.std().item() == pytest.approx(std_of(weight), rel=0.2)
            assert weight.std().item() != pytest.approx(1.4 * std_of(weight), rel=0.15)


@pytest.mark.parametrize("vendor, has, used, auto", [
    ("AuthenticAMD", ["avx512_bf16"], "AVX512", True), ("AuthenticAMD", [], "AVX512", False),
    ("AuthenticAMD", ["avx512_bf16"], "AVX2", False),
    ("GenuineIntel", ["avx512_bf16"], "AVX512", False),
    ("GenuineIntel", ["avx512_bf16", "amx_tile"], "AVX512", True)])
def test_precision_auto_is_what_the_cpu_is_fast_in(vendor, has, used, auto, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    for feature in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda f=feature: f in has)
    for precision, expected in [("auto", "bf16" if auto else "fp32"), ("bf16", "bf16"),
                                ("fp16", "fp16"), ("fp32", "fp32")]:
        args = SimpleNamespace(device="cpu", precision=precision)
        assert resolve_precision(args) == expected
