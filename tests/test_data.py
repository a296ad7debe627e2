"""Image folders, drawn shapes, subsets."""
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common import (UserError, draw_shapes, load_images, make_parser, parse_flags,
                    training_images)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(["apple", "pear"]):
            for i in range(3):
                gray = np.full((32, 32, 3), 100 * label + i, np.uint8)
                write(tmp_path / split / name / f"{i}.png", gray)
    return tmp_path


def test_folder(folder):
    images, labels = load_images("folder", folder, "train")
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == torch.int64
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]


def test_folder_takes_any_size_and_mode(folder, capsys):
    apple = folder / "train" / "apple"
    write(apple / "gray.png", np.full((90, 50), 60, np.uint8))
    write(apple / "sixteen.png", np.full((40, 40), 70 * 257, np.uint16))
    clear = np.full((20, 70, 4), 50, np.uint8)
    clear[..., 3] = 0
    write(apple / "transparent.png", clear)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 80, 80, 80])
    palette.save(apple / "zpalette.png")
    upright = Image.new("L", (40, 60))
    upright.paste(90, (0, 0, 40, 30))                                   # its upper half is light
    exif = upright.getexif()
    exif[0x0112] = 6                                                    # lies on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(apple / "zturned.png", exif=exif)
    (apple / ".hidden").write_text("not an image")
    (apple / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    images, labels = load_images("folder", folder, "train")
    assert labels.tolist() == [0] * 8 + [1] * 3
    assert [image.unique().tolist() for image in images[3:7]] == [[60], [70], [255], [80]]
    assert images[7, :, :12].unique().tolist() == [90] and images[7, :, 20:].max() == 0
    assert "1 left out that are no images, " in capsys.readouterr().out


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def source(root, part, download=False):
        raise URLError("no route") if download else RuntimeError("not found")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    with pytest.raises(UserError, match="--dataset cifar10: cannot download it .*no route"):
        load_images("cifar10", str(tmp_path / "new"), "train")


def test_folder_names_what_is_wrong(folder):
    def refused(message, split="train"):
        load_images.cache_clear()
        with pytest.raises(UserError, match=message):
            load_images("folder", folder, split)

    with pytest.raises(UserError, match="--data-dir .*train/<class>"):
        load_images("folder", folder / "nowhere", "train")
    (folder / "train" / "apple" / "bad.jpg").write_bytes(b"\xff\xd8 broken")
    refused("bad.jpg: not a readable image")
    (folder / "train" / "apple" / "bad.jpg").unlink()
    (folder / "train" / "plum").mkdir()
    refused("plum: has no image")
    (folder / "train" / "plum").rmdir()
    (folder / "test" / "plum").mkdir()
    refused("test/plum: no such class", "test")


def test_shapes_are_deterministic_and_differ_by_split():
    again = load_images("synthetic", "", "train")
    assert torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=0)[0])
    assert not torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=1)[0])
    assert again[0].shape == (5000, 3, 32, 32) and again[1].unique().tolist() == list(range(10))


def test_subset_does_not_depend_on_the_seed():
    def images(*flags):
        return training_images(parse_flags(make_parser("x"), ["--dataset", "synthetic", *flags]))

    fifty = images("--subset", "50")
    assert torch.equal(fifty, images("--subset", "50", "--seed", "3")) and len(fifty) == 50
    assert torch.equal(fifty[:20], images("--subset", "20")) and len(images()) == 5000
    with pytest.raises(UserError, match="--subset 9999"):
        images("--subset", "9999")
