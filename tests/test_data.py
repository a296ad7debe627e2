"""Image folders, drawn shapes, subsets."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError, draw_shapes, load_images, load_split, make_parser, parse_flags


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


def test_folder_takes_any_size_and_mode(folder):
    write(folder / "train" / "apple" / "wide.png", np.full((20, 70, 4), 50, np.uint8))
    write(folder / "train" / "apple" / "gray.png", np.full((90, 50), 60, np.uint8))
    (folder / "train" / "apple" / ".hidden").write_text("not an image")
    images, _ = load_images("folder", folder, "train")
    assert images.shape == (8, 3, 32, 32) and images[3].unique().tolist() == [60]


def test_folder_names_what_is_wrong(folder):
    with pytest.raises(UserError, match="--data-dir .*train/<class>"):
        load_images("folder", folder / "nowhere", "train")
    (folder / "train" / "apple" / "bad.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(UserError, match="bad.jpg: not a readable image"):
        load_images("folder", folder, "train")


def test_shapes_are_deterministic_and_differ_by_split():
    again = load_images("synthetic", "", "train")
    assert torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=0)[0])
    assert not torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=1)[0])
    assert again[0].shape == (5000, 3, 32, 32) and again[1].unique().tolist() == list(range(10))


def test_subset_does_not_depend_on_the_seed():
    def split(*flags):
        args = parse_flags(make_parser("x"), ["--dataset", "synthetic", *flags])
        return load_split(args, "train")

    images, labels = split("--subset", "50")
    assert torch.equal(images, split("--subset", "50", "--seed", "3")[0]) and len(labels) == 50
    assert torch.equal(images[:20], split("--subset", "20")[0])
    with pytest.raises(UserError, match="--subset 9999"):
        split("--subset", "9999")
