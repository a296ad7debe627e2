"""Image folders, drawn shapes, subsets."""
import os
import shutil
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import (UserError, checksum, draw_shapes, has_test, load_images, make_parser,
                    parse_flags, read_image, training_images)
from processes import CONTEXT, wait


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
    values = [image.unique().tolist() for image in images]
    assert values == [[0], [1], [2], [60], [80], [90], [100], [101], [102]]
    assert "reading 9 images of 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/0-checkpoint.png", "._0.png"])
def test_what_is_hidden_is_skipped(folder, hidden):
    """Beside the classes, within one, and within what is within it; not above the data."""
    above = folder / ".cache" / "data"
    for split in ("train", "test"):
        shutil.move(folder / split, above / split)
        for place in ("", "apple", "apple/more"):
            write(above / split / place / hidden, gray(60))
        assert load_images("folder", above, split)[1].tolist() == [0, 0, 0, 1, 1, 1]
    write(above / "train" / "apple" / "more" / "0.png", gray(60))
    load_images.cache_clear()
    assert load_images("folder", above, "train")[1].tolist() == [0] * 4 + [1] * 3    # a control


@pytest.mark.parametrize("dtype, kind", [
    (np.uint16, "png"), (np.uint16, "tiff"), (">u2", "tiff"), (np.int32, "tiff"),
    (np.float32, "tiff"), (np.uint16, "pgm")])
def test_more_than_eight_bits_are_refused_by_name(folder, dtype, kind):
    """They would be clipped: a ramp from black to white would be white but for its first pixels."""
    ramp, path = np.linspace(0, 65535, 1024).reshape(32, 32), folder / "train" / "pear" / "ramp.png"
    if kind == "pgm":
        path.write_bytes(b"P5\n32 32\n65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp.astype(dtype)).save(path, kind)
    with pytest.raises(UserError, match="pear/ramp.png: .*save it with 8 bits"):
        load_images("folder", folder, "train")
    write(path, (ramp / 257).astype(np.uint8))                          # a control
    assert load_images("folder", folder, "train")[0][-1].unique().numel() == 256


def test_what_is_transparent_is_white(tmp_path):
    """By an alpha channel, in part too, by a colour, and in a palette."""
    for mode, alpha, expected in [("RGBA", 0, 255), ("RGBA", 255, 50), ("RGBA", 51, 214),
                                  ("LA", 0, 255)]:
        color = (50,) * (len(mode) - 1) + (alpha,)
        Image.new(mode, (20, 70), color).save(tmp_path / "image.png")
        assert read_image(tmp_path / "image.png").unique().tolist() == [expected]
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 80, 80, 80])
    for image, clear in [(Image.new("L", (9, 9), 80), 80), (palette, 1)]:
        for transparency, expected in [(clear, 255), (clear - 1, 80)]:
            image.save(tmp_path / "image.png", transparency=transparency)
            assert read_image(tmp_path / "image.png").unique().tolist() == [expected]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_every_image_stands_upright(tmp_path, kind):
    """Whichever of the eight orientations its metadata names."""
    upright = Image.fromarray(5 * np.arange(48, dtype=np.uint8).reshape(6, 8)).resize((64, 48))
    expected = np.asarray(upright.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))
    for orientation, turn in enumerate([None, 0, 3, 1, 5, 2, 6, 4], 1):
        turned, path = upright if turn is None else upright.transpose(turn), tmp_path / f"x.{kind}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned.save(path, exif=exif, **({"quality": 100} if kind == "jpeg" else {}))
        assert np.abs(read_image(path).numpy().astype(int) - expected).max() <= 6, orientation
        off = np.abs(np.asarray(turned.resize((32, 32)))[..., None] - expected.astype(int)).max()
        assert off > 20 or orientation == 1                             # a control


def test_cifar10_as_torchvision_holds_it(monkeypatch):
    """Images (N, H, W, 3) there."""
    data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train: SimpleNamespace(
        data=data, targets=[3, 1, 4, 1 + train]))
    for split, last in [("train", 2), ("test", 1)]:
        images, labels = load_images("cifar10", "nowhere", split)
        assert (images.numpy() == data.transpose(0, 3, 1, 2)).all() and images.is_contiguous()
        assert labels.tolist() == [3, 1, 4, last] and labels.dtype == torch.int64


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def source(root, part, download=False):
        raise URLError("no route") if download else RuntimeError("not found")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    with pytest.raises(UserError, match="--dataset cifar10: cannot download it .*no route"):
        load_images("cifar10", str(tmp_path / "new"), "train")


def test_folder_names_what_is_wrong(folder, capsys):
    """On one line, with status 2."""
    def refused(named, split="train", data_dir=folder):
        load_images.cache_clear()
        with pytest.raises(SystemExit) as end:
            common.launch(lambda: load_images("folder", data_dir, split))
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and named in line, line

    apple, plum = folder / "train" / "apple", folder / "train" / "plum"
    refused("--data-dir", data_dir=folder / "nowhere")
    Image.new("RGB", (90, 90), "red").save(apple / "bad.jpg")
    whole = (apple / "bad.jpg").read_bytes()
    for content in (b"\xff\xd8 broken", whole[:-99], b""):
        (apple / "bad.jpg").write_bytes(content)
        refused(f"{apple}/bad.jpg: not a readable image")
    (apple / "bad.jpg").unlink()
    (apple / "3.png").symlink_to("/nowhere")
    refused("apple/3.png")
    (apple / "3.png").unlink()
    plum.mkdir()
    (folder / "test" / "plum").mkdir()
    refused("plum")                                                     # is empty
    plum.rmdir()
    refused("test/<class>/", "test")                                    # has a class more
    (folder / "test" / "pear").rename(folder / "test" / "plum" / "pear")
    refused("test/<class>/", "test")                                    # has another class
    shutil.rmtree(folder / "test" / "plum")
    refused("test/<class>/", "test")                                    # has a class less
    (folder / "test" / "apple").rename(folder / "apple")
    assert has_test(SimpleNamespace(dataset="folder", data_dir=folder))
    refused("test/<class>/", "test")                                    # has no class
    shutil.rmtree(folder / "train")
    refused("train/<class>/")


def test_shapes_are_deterministic_and_differ_by_split():
    again = load_images("synthetic", "data", "train")
    assert torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=0)[0])
    assert not torch.equal(draw_shapes(100, seed=0)[0], draw_shapes(100, seed=1)[0])
    assert again[0].shape == (5000, 3, 32, 32) and again[1].unique().tolist() == list(range(10))


def draw(capability, path):
    """What a CPU of this capability draws, and its randn; in a process of its own."""
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    torch.set_num_threads(1)
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    torch.save([torch.backends.cpu.get_cpu_capability(), checksum(draw_shapes(200, seed=0)[0]),
                noise], path)


def test_shapes_do_not_depend_on_the_cpu(tmp_path):
    for capability in ("default", "avx2"):
        process = CONTEXT.Process(target=draw, args=(capability, tmp_path / capability))
        process.start()
        assert wait(process) == 0
    plain, avx2 = (torch.load(tmp_path / capability) for capability in ("default", "avx2"))
    assert plain[1] == avx2[1] == checksum(draw_shapes(200, seed=0)[0]) == 3576287084
    assert plain[0] == "DEFAULT" and (plain[0] == avx2[0] or not torch.equal(plain[2], avx2[2]))


def test_subset_does_not_depend_on_the_seed():
    def images(*flags):
        parser = make_parser("x", "x.py")
        return training_images(parse_flags(parser, ["--dataset", "synthetic", *flags]))

    fifty = images("--subset", "50")
    assert torch.equal(fifty, images("--subset", "50", "--seed", "3")) and len(fifty) == 50
    assert torch.equal(fifty[:20], images("--subset", "20")) and len(images()) == 5000
    with pytest.raises(UserError, match="--subset 9999"):
        images("--subset", "9999")
