"""Image folders, drawn shapes, subsets."""
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common import (UserError, checksum, draw_shapes, has_test, load_images, make_parser,
                    parse_flags, read_image, training_images)
from processes import wait


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def gray(value, *size):
    return np.full(size or (9, 9), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(["apple", "pear"]):
            for i in range(3):
                write(tmp_path / split / name / f"{i}.png", gray(100 * label + i))
    return tmp_path


def test_folder_takes_any_size_and_mode(folder, capsys):
    apple = folder / "train" / "apple"
    write(apple / "gray.png", gray(60, 90, 50))
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 80, 80, 80])
    palette.save(apple / "palette.png")
    Image.new("CMYK", (9, 9), (0, 0, 0, 165)).save(apple / "print.jpg")
    (apple / "notes.txt").write_text("not an image")
    write(folder / "train" / "loose.png", gray(60))
    images, labels = load_images("folder", folder, "train")
    assert images.dtype == torch.uint8 and images.shape == (9, 3, 32, 32)
    assert labels.tolist() == [0] * 6 + [1] * 3 and labels.dtype == torch.int64
    assert [image.unique().tolist() for image in images] == [
        [0], [1], [2], [60], [80], [90], [100], [101], [102]]
    assert "reading 9 images of 2 classes" in capsys.readouterr().out


def test_what_is_hidden_is_skipped(folder):
    """Beside the classes, within one, and within what is within it; not above the data."""
    above = folder / ".cache" / "data"
    for split in ("train", "test"):
        shutil.move(folder / split, above / split)
        for place in ("", "apple", "apple/more"):
            write(above / split / place / ".ipynb_checkpoints" / "0-checkpoint.png", gray(60))
            write(above / split / place / "._0.png", gray(60))
        assert load_images("folder", above, split)[1].tolist() == [0, 0, 0, 1, 1, 1]
    write(above / "train" / "apple" / "more" / "0.png", gray(60))
    load_images.cache_clear()
    assert load_images("folder", above, "train")[1].tolist() == [0] * 4 + [1] * 3    # a control


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused_by_name(folder, dtype):
    """They would be clipped: a ramp from black to white would be white but for its first pixels."""
    ramp, path = np.linspace(0, 65535, 1024).reshape(32, 32), folder / "train" / "pear" / "ramp.png"
    Image.fromarray(ramp.astype(dtype)).save(path, "tiff")
    with pytest.raises(UserError, match="pear/ramp.png: .*save it with 8 bits"):
        load_images("folder", folder, "train")
    write(path, (ramp / 257).astype(np.uint8))                          # a control
    assert load_images("folder", folder, "train")[0][-1].unique().numel() == 256


def test_what_is_transparent_is_white(tmp_path):
    """By an alpha channel, in part too, by a colour, and in a palette."""
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 80, 80, 80])
    for image, transparency, expected in [
            *((Image.new("RGBA", (20, 70), (50, 50, 50, alpha)), None, expected)
              for alpha, expected in [(0, 255), (255, 50), (51, 214)]),
            (Image.new("LA", (9, 9), (50, 0)), None, 255),
            (Image.new("L", (9, 9), 80), 80, 255), (Image.new("L", (9, 9), 80), 79, 80),
            (palette, 1, 255), (palette, 0, 80)]:
        image.save(tmp_path / "image.png", transparency=transparency)
        assert read_image(tmp_path / "image.png").unique().tolist() == [expected]


def test_every_image_stands_upright(tmp_path):
    """Whichever of the eight orientations its metadata names."""
    upright = Image.fromarray(5 * np.arange(48, dtype=np.uint8).reshape(6, 8)).resize((64, 48))
    upright.save(tmp_path / "upright.png")
    expected = read_image(tmp_path / "upright.png")
    for orientation, turn in enumerate([None, 0, 3, 1, 5, 2, 6, 4], 1):
        turned, exif = upright if turn is None else upright.transpose(turn), Image.Exif()
        exif[0x0112] = orientation
        turned.save(tmp_path / "turned.png", exif=exif)
        assert torch.equal(read_image(tmp_path / "turned.png"), expected), orientation
        turned.save(tmp_path / "turned.png")                            # a control
        assert torch.equal(read_image(tmp_path / "turned.png"), expected) == (orientation == 1)


def test_cifar10_as_torchvision_holds_it(monkeypatch):
    """Images (N, H, W, 3) there."""
    data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train: SimpleNamespace(
        data=data, targets=[3, 1, 4, 1 + train]))
    for split, last in [("train", 2), ("test", 1)]:
        images, labels = load_images("cifar10", "nowhere", split)
        assert (images.numpy() == data.transpose(0, 3, 1, 2)).all() and images.is_contiguous()
        assert labels.tolist() == [3, 1, 4, last] and labels.dtype == torch.int64


def test_folder_names_what_is_wrong(folder):
    def refused(named, split="train"):
        load_images.cache_clear()
        with pytest.raises(UserError, match=named) as error:
            load_images("folder", folder, split)
        assert "\n" not in str(error.value)

    bad, train, test = folder / "train" / "apple" / "bad.jpg", folder / "train", folder / "test"
    Image.new("RGB", (90, 90), "red").save(bad)
    for content in (b"\xff\xd8 broken", bad.read_bytes()[:-99], b""):
        bad.write_bytes(content)
        refused("apple/bad.jpg: not a readable image")
    bad.unlink()
    bad.symlink_to("/nowhere")
    refused("apple/bad.jpg: not a readable image")
    bad.unlink()
    (test / "plum").mkdir()
    refused("test/<class>/; test/ has 3", "test")                       # has a class more
    (train / "plum").mkdir()
    with pytest.raises(FileNotFoundError, match="plum"):                # is empty
        load_images("folder", folder, "train")
    (train / "plum").rmdir()
    (test / "pear").rename(test / "plum" / "pear")
    refused("test/<class>/; test/ has 2", "test")                       # has another class
    shutil.rmtree(test)
    assert not has_test(SimpleNamespace(dataset="folder", data_dir=folder))
    test.mkdir()
    assert has_test(SimpleNamespace(dataset="folder", data_dir=folder))
    refused("test/<class>/; test/ has 0", "test")
    shutil.rmtree(train)
    refused("train/<class>/ .*; train/ has 0")


def draw(path):
    """The CPU's vector instructions, and what it draws; in a process of its own."""
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    torch.save([torch.backends.cpu.get_cpu_capability(), draw_shapes(200, seed=0)[0], noise], path)


def test_shapes_depend_on_the_seed_alone(tmp_path, monkeypatch):
    """Not on the CPU either."""
    images, labels = draw_shapes(200, seed=0)
    assert checksum(images) == 3576287084 and labels.unique().tolist() == [*range(10)]
    assert not torch.equal(images, draw_shapes(200, seed=1)[0])
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")    # torch reads it at import
    process = multiprocessing.get_context("spawn").Process(target=draw, args=(tmp_path / "drawn",))
    process.start()
    assert wait(process) == 0
    capability, drawn, noise = torch.load(tmp_path / "drawn")
    scalar = ("DEFAULT", "NO AVX")                          # torch 2.6 has the second name
    assert capability in scalar and torch.equal(drawn, images)
    same_noise = torch.equal(noise, torch.randn(4096, generator=torch.manual_seed(0)))
    assert same_noise == (torch.backends.cpu.get_cpu_capability() in scalar)        # a control


def test_subset_does_not_depend_on_the_seed(small):
    def images(*flags):
        parser = make_parser("x", __file__)
        return training_images(parse_flags(parser, ["--dataset", "synthetic", *flags]))

    fifty = images("--subset", "50")
    assert torch.equal(fifty, images("--subset", "50", "--seed", "3")) and len(fifty) == 50
    assert torch.equal(fifty[:20], images("--subset", "20")) and len(images()) == 200
    with pytest.raises(UserError, match="--subset 9999"):
        images("--subset", "9999")
