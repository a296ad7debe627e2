"""The batched augmentation against torchvision's transforms, image by image."""
import pytest
import torch
import torchvision.transforms.v2 as T
from torchvision.transforms.v2 import functional as TF

import common
from common import augment, color_jitter, draw_shapes, luminance, resampling, shift_hue

REFERENCE = T.Compose([
    T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.1),
    T.RandomResizedCrop(32, (0.2, 1), (3 / 4, 4 / 3), T.InterpolationMode.BICUBIC, antialias=True),
    T.RandomHorizontalFlip(0.5)])

ADJUST = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def picture():
    """One smooth colour image without symmetry, (3, 32, 32) in [0, 1]."""
    v, u = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    return torch.stack([u, u * v, 0.2 + 0.5 * (1 - v)])


@pytest.mark.parametrize("box", [(0, 0, 32, 32), (3, 7, 20, 15), (18, 20, 14, 12)])
def test_crop_equals_torchvision(box):
    def crop(top, left, height, width):
        top, left, height, width = (torch.tensor([float(v)]) for v in (top, left, height, width))
        return resampling(top, height, 32)[:, None] @ x @ resampling(left, width, 32)[:, None].mT

    x = torch.rand(1, 3, 32, 32)
    expected = TF.resized_crop(x, *box, [32, 32], T.InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(crop(*box), expected, atol=1e-5)
    top, left, height, width = box
    assert not torch.allclose(crop(top, left, height - 1, width), expected, atol=1e-2)


def test_hue_and_gray_equal_torchvision():
    x, shift = torch.rand(4, 3, 8, 8), torch.tensor([-0.1, 0.0, 0.05, 0.1])
    x[0, :, 0] = 0.3                                                    # gray pixels have no hue
    expected = torch.stack([TF.adjust_hue(image, h.item()) for image, h in zip(x, shift)])
    assert torch.allclose(shift_hue(x, shift), expected, atol=1e-5)
    assert not torch.allclose(shift_hue(x, -shift), expected, atol=1e-2)
    assert torch.allclose(luminance(x), TF.rgb_to_grayscale(x), atol=1e-3)


def test_jitter_equals_torchvision_in_each_images_order():
    x, b = torch.rand(24, 3, 8, 8), 24
    factors, shift = 0.6 + 0.8 * torch.rand(b, 3), 0.2 * torch.rand(b) - 0.1
    order, hue_place = torch.rand(b, 3).argsort(1), torch.arange(b) % 4
    expected = []
    for i in range(b):
        names = order[i].tolist()
        names.insert(hue_place[i], 3)
        image = x[i]
        for name in names:
            image = ADJUST[name](image, factors[i, name].item() if name < 3 else shift[i].item())
        expected.append(image)
    expected = torch.stack(expected)
    assert torch.allclose(color_jitter(x, factors, shift, order, hue_place), expected, atol=2e-3)
    reversed_order = color_jitter(x, factors, shift, order.flip(1), hue_place)
    assert not torch.allclose(reversed_order, expected, atol=2e-2)


def statistics(views):
    """Moments that jitter, crop, flip and gray move: (name, per-view values)."""
    gray = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-3
    # The picture's red grows to the right in every crop, unless it is flipped.
    slope = views[:, :, :, 16:].mean((1, 2, 3)) - views[:, :, :, :16].mean((1, 2, 3))
    return {"mean": views.mean((1, 2, 3)), "contrast": views.std((1, 2, 3)),
            "red": views[:, 0].mean((1, 2)), "blue": views[:, 2].mean((1, 2)),
            "corner": views[:, :, 0, 0].mean(1), "gray": gray.float(),
            "flipped": (slope < 0).float(), "zoom": slope.abs()}


def distance(a, b):
    """Largest difference of two samples' distribution functions (Kolmogorov-Smirnov)."""
    grid = torch.cat([a, b]).sort().values
    return max(((a[:, None] <= part).float().mean(0) - (b[:, None] <= part).float().mean(0))
               .abs().max().item() for part in grid.split(500))


def test_distribution_equals_torchvision():
    n, x = 3000, picture()
    ours = statistics(augment(x.expand(n, 3, 32, 32)))
    theirs = statistics(torch.stack([REFERENCE(x) for _ in range(n)]))
    limit = 1.95 * (2 / n) ** 0.5                       # exceeded once in a thousand, by chance
    for name in ours:
        assert distance(ours[name], theirs[name]) < limit, name
    weaker = T.Compose([*REFERENCE.transforms[:2], T.RandomResizedCrop(32, (0.4, 1)),
                        T.RandomHorizontalFlip(0.3)])
    weak = statistics(torch.stack([weaker(x) for _ in range(n)]))
    assert distance(ours["zoom"], weak["zoom"]) > limit
    assert distance(ours["flipped"], weak["flipped"]) > limit
    assert theirs["gray"].mean().item() == pytest.approx(0.1, abs=0.02)


def test_jitter_is_drawn_as_torchvision_draws_it(monkeypatch):
    """With probability 0.8; each order of the three and each place of the hue alike often."""
    drawn, n = [], 4000
    monkeypatch.setattr(common, "color_jitter", lambda x, *drawn_now: drawn.append(drawn_now) or x)
    augment(torch.rand(n, 3, 8, 8))
    factors, shift, order, hue_place = drawn[0]
    jittered = (factors != 1).any(1)
    assert torch.equal(jittered, shift != 0)
    limit = 0.03                                        # four standard deviations or more
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=limit)
    for values, low, high in [*((column, 0.6, 1.4) for column in factors[jittered].T),
                              (shift[jittered], -0.1, 0.1)]:
        uniform = torch.linspace(low, high, 3001)
        assert low <= values.min() and values.max() <= high and distance(values, uniform) < 0.05
        assert distance(values, 0.8 * uniform + 0.2 * uniform.mean()) > 0.05
    assert (order.sort(1).values == torch.arange(3)).all()
    for kinds, count in [(order @ torch.tensor([9, 3, 1]), 6), (hue_place, 4)]:
        shares = kinds.unique(return_counts=True)[1] / n
        assert len(shares) == count and (shares - 1 / count).abs().max() < limit


def test_every_image_draws_its_own_parameters():
    views = augment(picture().expand(64, 3, 32, 32)).flatten(1)
    assert (torch.cdist(views, views) + torch.eye(64) > 1e-3).all()


def test_input_types_and_range():
    x, _ = draw_shapes(16, seed=3)
    torch.manual_seed(1)
    from_bytes = augment(x)
    torch.manual_seed(1)
    assert torch.equal(from_bytes, augment(x / 255))
    assert from_bytes.dtype == torch.float32 and from_bytes.min() >= 0 and from_bytes.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(from_bytes, augment(x))
    assert augment(torch.rand(2, 3, 48, 40)).shape == (2, 3, 48, 40)


def test_where_no_crop_fits_it_is_the_whole_image(monkeypatch):
    """Every try of the crop is wider than these two columns, or higher than these two rows."""
    monkeypatch.setattr(common, "color_jitter", lambda x, *_: x)
    for shape in [(64, 1, 64, 2), (64, 1, 2, 64)]:
        x = torch.rand(shape).expand(-1, 3, -1, -1)                     # gray, so gray leaves it
        views = augment(x)
        same = [(views - y).abs().amax((1, 2, 3)) < 1e-3 for y in (x, x.flip(3))]
        assert (same[0] | same[1]).all() and not same[0].all()
