"""The batched augmentation against torchvision's transforms, image by image."""
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common
from common import augment, draw_shapes

ADJUST = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def test_each_view_is_torchvisions_of_the_same_draws(monkeypatch):
    """Jitter, gray, crop, flip, in this order, image by image; nothing else is drawn alike."""
    jitters, crops = [], []
    monkeypatch.setattr(common, "color_jitter", lambda *args, jitter=common.color_jitter: (
        jitters.append(args) or jitter(*args)))
    monkeypatch.setattr(common, "resampling", lambda *args, matrices=common.resampling: (
        crops.append(args) or matrices(*args)))
    x = torch.rand(60, 3, 5, 7)
    x[:20, :, 0] = 0.3                                                  # gray pixels have no hue
    x = F.interpolate(x, size=(32, 32), mode="bilinear")
    views = augment(x)
    (_, factors, shifts, orders, hue_places), = jitters
    ((tops, lefts), (heights, widths), *_), = crops
    flips, grays = 0, 0
    for i, image in enumerate(x):
        names = orders[i].tolist()
        names.insert(hue_places[i], 3)
        for name in names:
            image = ADJUST[name](image, (factors[i, name] if name < 3 else shifts[i]).item())
        box = [int(side[i]) for side in (tops, lefts, heights, widths)]
        made = []
        for colours in (image, TF.rgb_to_grayscale(image, 3)):
            cropped = TF.resized_crop(colours, *box, [32, 32], T.InterpolationMode.BICUBIC,
                                      antialias=True).clamp(0, 1)
            made += [cropped, cropped.flip(2)]
        errors = [(views[i] - other).abs().max().item() for other in made]
        which = min(range(4), key=errors.__getitem__)
        assert errors.pop(which) < 3e-3 and min(errors) > 1e-2
        flips, grays = flips + which % 2, grays + which // 2
    assert 15 < flips < 45 and 0 < grays < 20


def distance(a, b):
    """Largest difference of two samples' distribution functions (Kolmogorov-Smirnov)."""
    at = torch.cat([a, b])
    of_a, of_b = (torch.searchsorted(x.sort().values, at, right=True) / len(x) for x in (a, b))
    return (of_a - of_b).abs().max().item()


@pytest.fixture(scope="module")
def drawn():
    """What 5000 images draw, {name: (5000,)}: what is passed on, and gray and flip as seen."""
    n, jitters, crops = 5000, [], []
    ramp = torch.stack([torch.linspace(0, 1, 32).expand(32, 32), *torch.zeros(2, 32, 32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "color_jitter", lambda x, *now: jitters.append(now) or x)
        patch.setattr(common, "resampling", lambda *now, matrices=common.resampling: (
            crops.append(now) or matrices(*now)))
        torch.manual_seed(0)
        views = augment(ramp.expand(n, 3, 32, 32))
    (factors, shift, order, hue_place), = jitters
    ((tops, lefts), (heights, widths), *_), = crops
    return {"jittered": (shift != 0).float(), "shift": shift, "hue place": hue_place.float(),
            **{f"factor {i}": factors[:, i] for i in range(3)},
            **{f"place of {i}": (order == i).float().argmax(1).float() for i in range(3)},
            "gray": (views[:, 0] == views[:, 1]).all(2).all(1).float(),
            "flip": (views[:, 0, 0, 0] > views[:, 0, 0, -1]).float(),
            "top": tops, "left": lefts, "height": heights, "width": widths}


def crop_features(top, left, height, width):
    """Functions of a crop, whose distributions tell its sides and place, jointly."""
    return {"width": width, "height": height, "area": width * height, "ratio": width / height,
            "left": left, "top": top, "right": left + width, "bottom": top + height,
            "at the left": left / (33 - width), "at the top": top / (33 - height),
            "corner": left - top, "center": left + width / 2 + top + height / 2}


def test_crops_are_drawn_as_torchvision_draws_them(drawn):
    names, image = ["top", "left", "height", "width"], torch.empty(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1], [3 / 4, 4 / 3])
                           for _ in drawn["top"]]).float()
    ours = crop_features(*map(drawn.get, names))
    square, theirs = crop_features(*theirs[:, [0, 0, 2, 2]].T), crop_features(*theirs.T)
    limit = 1.95 * (2 / 5000) ** 0.5                    # exceeded once in a thousand, by chance
    for name in ours:
        assert distance(ours[name], theirs[name]) < limit, name
    assert ours["area"].max() == 32 * 32 and ours["area"].min() <= 208  # once in 350, in 65
    far = {name for name in ours if distance(square[name], theirs[name]) > limit}   # a control
    assert {"ratio", "corner", "center"} <= far


def test_shares_and_ranges_are_the_base_codes(drawn):
    for name, share in [("jittered", 0.8), ("gray", 0.1), ("flip", 0.5)]:
        deviation = (share * (1 - share) / 5000) ** 0.5
        assert drawn[name].mean().item() == pytest.approx(share, abs=4 * deviation), name
    jittered = drawn["jittered"] == 1
    for name, low, high in [*((f"factor {i}", 0.6, 1.4) for i in range(3)), ("shift", -0.1, 0.1)]:
        values, uniform = drawn[name][jittered], torch.linspace(low, high, 4001)
        assert low <= values.min() and values.max() <= high
        assert distance(values, uniform) < 0.035 < distance(values, 0.9 * uniform + 0.1 * high)
        assert drawn[name][~jittered].unique().tolist() == [low + (high - low) / 2]
    orders = sum((4 ** i) * drawn[f"place of {i}"] for i in range(3)) + 64 * drawn["hue place"]
    shares = orders.unique(return_counts=True)[1] / 5000
    assert len(shares) == 24 and (shares - 1 / 24).abs().max() < 0.012  # four deviations


def test_every_draw_is_independent_of_every_other(drawn):
    """Within an image, of the image before it, and of the same image half a batch away."""
    within = {"left": (drawn["left"] + 0.5) / (33 - drawn["width"]) - 0.5,
              "top": (drawn["top"] + 0.5) / (33 - drawn["height"]) - 0.5}
    names, values = list(drawn), torch.stack([*(drawn | within).values()]).double()
    values = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
    known = {("height", "width"), *((f"place of {i}", f"place of {j}")
                                    for i in range(3) for j in range(i + 1, 3))}
    for roll in (0, 1, 2500):
        correlation = values @ values.roll(roll, 1).T / 5000 ** 0.5
        far = {(a, b) for i, a in enumerate(names) for j, b in enumerate(names)
               if correlation[i, j].abs() > 4.8 and (roll or i != j)}   # of thousands of pairs
        assert {tuple(sorted(pair)) for pair in far} == (set() if roll else known), roll


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
