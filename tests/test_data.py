"""Image folders, drawn shapes, subsets."""
import os
import shutil
import socket
import struct
import unicodedata
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from torchvision.datasets.folder import make_dataset

from common import (UserError, checksum, draw_shapes, has_test, load_images, make_parser,
                    parse_flags, read_image, training_images)
from processes import CONTEXT


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
    (apple / ".ipynb_checkpoints").mkdir()
    write(apple / ".ipynb_checkpoints" / "gray-checkpoint.png", np.full((9, 9), 60, np.uint8))
    write(folder / "train" / "loose.png", np.full((9, 9), 60, np.uint8))
    images, labels = load_images("folder", folder, "train")
    assert labels.tolist() == [0] * 8 + [1] * 3
    assert [image.unique().tolist() for image in images[3:7]] == [[60], [70], [255], [80]]
    assert images[7, :, :12].unique().tolist() == [90] and images[7, :, 20:].max() == 0
    assert "2 left out, no images of a class, or read already: " in capsys.readouterr().out


def test_the_order_is_torchvisions(tmp_path):
    """Class by class, its folders as strings, then their files; each image says which it is."""
    paths = [tmp_path / "train" / c / sub / name for c in ("b", "a", "a-b", "Z")
             for sub in ("", "sub", "sub-x", "sub/y", "0") for name in ("9.png", "10.PNG", "B.png")]
    for i, path in enumerate(paths):
        write(path, np.full((32, 32), i, np.uint8))
    classes = {"Z": 0, "a": 1, "a-b": 2, "b": 3}
    expected = make_dataset(tmp_path / "train", classes, extensions=(".png",))
    images, labels = load_images("folder", tmp_path, "train")
    ours = [(str(paths[i]), label) for i, label in zip(images[:, 0, 0, 0], labels.tolist())]
    assert ours == expected and len(ours) == 60
    assert ours != sorted(expected, key=lambda item: item[0].split("/"))               # a control


def test_a_file_or_folder_is_read_once(folder, capsys):
    apple, elsewhere = folder / "train" / "apple", folder / "elsewhere"
    write(elsewhere / "sub" / "60.png", np.full((9, 9), 60, np.uint8))
    write(elsewhere / "61.png", np.full((9, 9), 61, np.uint8))
    (apple / "more").symlink_to(elsewhere / "sub")                      # both are read
    (apple / "more.png").symlink_to("../../elsewhere/61.png")
    (elsewhere / "sub" / "back").symlink_to(apple)
    for name in ("self", "again"):
        (apple / name).symlink_to(".")
    (apple / "zero.png").symlink_to("0.png")
    os.link(apple / "1.png", apple / "one.png")
    (folder / "train" / "pear").rename(folder / "pears")
    (folder / "train" / "pear").symlink_to("../pears")
    images, labels = load_images("folder", folder, "train")
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 61, 60, 100, 101, 102]
    assert labels.tolist() == [0] * 5 + [1] * 3
    assert "5 left out, no images of a class, or read already: " in capsys.readouterr().out


@pytest.mark.parametrize("link, target", [
    ("apple/up", ".."), ("apple/root", "../.."), ("apple/all", "/"), ("apple/more", "../pear"),
    ("apple/more", "../../elsewhere"), ("plum", "apple"), ("pear/3.png", "../apple/0.png")])
def test_nothing_is_of_two_classes(folder, link, target):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "pear").symlink_to(folder / "train" / "pear")
    load_images("folder", folder, "train")                              # a control
    load_images.cache_clear()
    (folder / "train" / link).symlink_to(target)
    with pytest.raises(UserError, match=f"train/{link}[^:]*: is .* too, of another class"):
        load_images("folder", folder, "train")


def test_only_files_are_opened(folder, monkeypatch, capsys):
    """Not a device, which may never end, a socket, or a pipe, which would block."""
    monkeypatch.chdir(folder / "train" / "apple")
    os.symlink("/dev/null", "device.png")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.png")
    assert len(load_images("folder", "../..", "train")[0]) == 6
    os.mkfifo("pipe.png")
    os.mkfifo("../pipe.png")
    load_images.cache_clear()
    assert len(load_images("folder", "../..", "train")[0]) == 6
    assert "4 left out, no images of a class, or read already: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "__MACOSX",
                                  "lost+found", ".thumbnails"])
def test_what_a_system_keeps_beside_images_is_left_out(folder, name):
    for place in ("train", "train/apple", "test"):
        write(folder / place / name / "0.png" / "SYNOPHOTO_THUMB_M.png", np.zeros((9, 9), np.uint8))
    for split in ("train", "test"):
        assert load_images("folder", folder, split)[1].tolist() == [0, 0, 0, 1, 1, 1]


@contextmanager
def as_nobody():
    """Permissions count, as they do not for root."""
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)
    except OSError:
        pytest.skip("a root that cannot become another")
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", ["train/apple/sub", "train/pear", "train", "test/pear", "test",
                                    "train/pear/1.png"])
def test_what_cannot_be_read_is_named(folder, monkeypatch, closed):
    write(folder / "train" / "apple" / "sub" / "0.png", np.zeros((9, 9), np.uint8))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    monkeypatch.chdir(folder)
    split = closed.split("/")[0]
    with as_nobody():
        assert len(load_images("folder", ".", split)[0]) in (6, 7)      # a control
    load_images.cache_clear()
    (folder / closed).chmod(0)
    with as_nobody(), pytest.raises(OSError) as refused:                # `launch` prints it
        assert has_test(SimpleNamespace(dataset="folder", data_dir="."))
        load_images("folder", ".", split)
    (folder / closed).chmod(0o755)
    message = str(refused.value)
    assert closed in message and "Permission denied" in message and "remove" not in message


@pytest.mark.parametrize("name", ["train/apple/3.png", "train/apple/more", "train/plum",
                                  "test/pear", "test"])
def test_a_link_to_nothing_is_named(folder, name):
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    (folder / name).symlink_to("/nowhere")
    assert has_test(SimpleNamespace(dataset="folder", data_dir=folder))
    with pytest.raises(OSError, match=f"No such file or directory: '.*{name}'"):
        load_images("folder", folder, name.split("/")[0])


def test_an_accent_has_one_form(folder):
    """A Mac writes it as two characters; the order is that of the names in train."""
    for split, form in [("train", "NFC"), ("test", "NFD")]:
        (folder / split / "apple").rename(folder / split / unicodedata.normalize(form, "\xe9"))
        images, labels = load_images("folder", folder, split)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert images[:, 0, 0, 0].tolist() == [100, 101, 102, 0, 1, 2]
    (folder / "test" / "e").mkdir()                                     # a control
    write(folder / "test" / "e" / "0.png", np.zeros((9, 9), np.uint8))
    load_images.cache_clear()
    with pytest.raises(UserError, match="test/e: a class needs images in train/"):
        load_images("folder", folder, "test")


@pytest.mark.parametrize("error, is_the_files", [
    (OSError(5, "Input/output error"), False), (OSError(24, "Too many open files"), False),
    (MemoryError(), False), (OSError("out of memory error when reading image file"), False),
    (OSError("truncated"), True), (EOFError(), True)], ids=repr)
def test_only_what_is_wrong_with_a_file_is_blamed_on_it(folder, monkeypatch, error, is_the_files):
    def fail(*_, **__):
        raise error
    path = folder / "train" / "apple" / "0.png"
    read_image(path)                                                    # a control
    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(UserError if is_the_files else type(error)) as refused:
        read_image(path)
    if is_the_files:
        kind = type(error).__name__
        assert str(refused.value).startswith(f"{path}: not a readable image ({kind}")
    else:
        assert refused.value is error


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("put, tolerance", [
    (lambda p: p.write_bytes(b"P5\n64 64\n65535\n" + RAMP.astype(">u2").tobytes()), 1),
    (lambda p: p.write_bytes(b"P5\n64 64\n1023\n" + (RAMP / 64.1).astype(">u2").tobytes()), 1),
    (lambda p: Image.fromarray(RAMP.astype(np.uint16)).save(p, "PNG"), 1),
    (lambda p: Image.fromarray(RAMP.astype(np.uint16)).save(p, "TIFF"), 1),
    (lambda p: Image.fromarray(RAMP.astype(">u2")).save(p, "TIFF"), 1),
    (lambda p: Image.fromarray((65535 - RAMP).astype(np.uint16)).save(
        p, "TIFF", tiffinfo={262: 0}), 1),
    (lambda p: Image.fromarray((RAMP / 257).astype(np.uint8)).save(p, "PNG"), 1),       # controls
    (lambda p: Image.fromarray((RAMP / 257).astype(np.uint8)).save(
        p, "TIFF", tiffinfo={262: 0}), 1),
], ids=["16-bit PGM", "10-bit PGM", "16-bit PNG", "16-bit TIFF", "16-bit big-endian TIFF",
        "16-bit TIFF, 0 is white", "8-bit PNG", "8-bit TIFF, 0 is white"])
def test_gray_values_are_scaled_by_the_range_of_the_format(tmp_path, put, tolerance):
    """A ramp from black to white stays one, of any number of bits."""
    path = tmp_path / "ramp.png"                                        # its content decides
    put(path)
    expected = np.asarray(Image.fromarray((RAMP / 257).astype(np.uint8)).resize(
        (32, 32), Image.Resampling.BICUBIC)).astype(int)
    for channel in read_image(path).numpy().astype(int).transpose(2, 0, 1):
        assert np.abs(channel - expected).max() <= tolerance


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_the_gray_value_that_a_png_calls_transparent_is_white(tmp_path, dtype):
    """That one alone, not its neighbour, which may have the same 8 bits."""
    gray = np.repeat(np.array([100, 101], dtype), 16 * 32).reshape(32, 32)
    gray = gray + dtype(25600 if dtype == np.uint16 else 0)
    for value, expected in [(gray[0, 0], [255, gray[31, 0]]), (gray[31, 0], [gray[0, 0], 255]),
                            (7, [gray[0, 0], gray[31, 0]])]:
        Image.fromarray(gray).save(tmp_path / "gray.png", transparency=int(value))
        image = read_image(tmp_path / "gray.png")
        shown = [x if x == 255 or dtype == np.uint8 else round(x / 257) for x in expected]
        assert [image[0].unique().tolist(), image[31].unique().tolist()] == [[x] for x in shown]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int16])
def test_gray_values_without_a_range_are_refused(tmp_path, dtype):
    path = tmp_path / "ramp.tiff"
    gray = np.ascontiguousarray(RAMP / 64 - 512, dtype)
    if dtype == np.int16:                               # PIL reads it, and does not write it
        Image.fromarray(gray.view(np.uint16)).save(path, tiffinfo={339: 2})
    else:
        Image.fromarray(gray).save(path)
    with pytest.raises(UserError, match="ramp.tiff: .* has no range of its own; save it with 8"):
        read_image(path)


def test_twelve_bits_in_a_tiff(tmp_path):
    """Two pixels a row of three bytes: 0 and 4095 are black and white. Its XMP is no metadata."""
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 4, 1), (279, 4, 3), (700, 2, 120)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    path = tmp_path / "twelve.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0"
                     + struct.pack("<H", len(tags)) + entries + bytes(4))
    image = read_image(path)
    assert image[:, :4].max() == 0 and image[:, -4:].min() == 255


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_only_the_orientation_of_the_metadata_matters(tmp_path, kind):
    """All eight orientations, beside a tag of the wrong type, and metadata that is none."""
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).resize((64, 48))
    for orientation, turned in {1: upright, 2: upright.transpose(0), 3: upright.transpose(3),
                                4: upright.transpose(1), 5: upright.transpose(5),
                                6: upright.transpose(2), 7: upright.transpose(6),
                                8: upright.transpose(4)}.items():
        path = tmp_path / f"{orientation}.{kind}"
        exif = (b"Exif\0\0" if kind == "jpeg" else b"") + b"II*\0" + struct.pack(
            "<IHHHIIHHI4sI", 8, 2, 0x0112, 3, 1, orientation, 0x011A, 2, 4, b"bad\0", 0)
        if kind == "tiff":
            turned.save(path, tiffinfo={0x0112: orientation, 0x010E: "bad"})
        else:
            turned.save(path, exif=exif, **({"quality": 100} if kind == "jpeg" else {}))
        expected = upright.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        error = read_image(path).numpy().astype(int) - np.asarray(expected)
        assert np.abs(error).max() <= 6, orientation
        if kind == "tiff":                                              # and of 16 bits
            Image.fromarray(np.asarray(turned).astype(np.uint16) * 257).save(
                path, tiffinfo={0x0112: orientation})
            error = read_image(path).numpy().astype(int) - np.asarray(expected)
            assert np.abs(error).max() <= 1, orientation
    if kind != "tiff":                                                  # whose tags are its pixels'
        upright.save(path, exif=b"Exif\0\0nonsense")
        assert read_image(path).shape == (32, 32, 3)


def test_cifar10_as_torchvision_holds_it(monkeypatch):
    """Images (N, H, W, 3) there; a set that is not read is refused, also from an old config."""
    data = np.arange(4 * 32 * 32 * 3, dtype=np.uint8).reshape(4, 32, 32, 3)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train: SimpleNamespace(
        data=data, targets=[3, 1, 4, 1 + train]))
    for split, last in [("train", 2), ("test", 1)]:
        images, labels = load_images("cifar10", "nowhere", split)
        assert (images.numpy() == data.transpose(0, 3, 1, 2)).all() and images.is_contiguous()
        assert labels.tolist() == [3, 1, 4, last] and labels.dtype == torch.int64
    for name in ("mnist3", "stl10"):
        with pytest.raises(UserError, match=f"--dataset {name}: .*use --dataset folder"):
            load_images(name, "nowhere", "train")
    with pytest.raises(UserError, match="'stl10'.*; use --dataset folder"):
        make_parser("x").parse_args(["--dataset", "stl10"])


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
    refused("1 of 7 images failed: .*bad.jpg: not a readable image")
    (folder / "train" / "pear" / "0.png").write_bytes(b"")
    refused("2 of 7 images failed: .*bad.jpg: not a readable image")
    (folder / "train" / "apple" / "bad.jpg").unlink()
    refused("1 of 6 images failed: .*pear/0.png: not a readable image")
    (folder / "train" / "plum").mkdir()
    refused("train/plum: a class needs images in train/")
    (folder / "train" / "plum").rmdir()
    (folder / "test" / "pear").rename(folder / "test" / "plum")
    refused("test/p(ear|lum): a class needs images in train/ .and test/.", "test")
    shutil.rmtree(folder / "test" / "plum")
    refused("test/pear: a class needs images in train/ .and test/.", "test")
    (folder / "test" / "pear").mkdir()
    refused("test/pear: a class needs images in train/ .and test/.", "test")
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    refused("train/<class>: a class needs images in train/")


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
    processes = [CONTEXT.Process(target=draw, args=(capability, tmp_path / capability))
                 for capability in ("default", "avx2")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    plain, avx2 = (torch.load(tmp_path / capability) for capability in ("default", "avx2"))
    assert plain[1] == avx2[1] == checksum(draw_shapes(200, seed=0)[0]) == 3576287084
    assert plain[0] == "DEFAULT" and (plain[0] == avx2[0] or not torch.equal(plain[2], avx2[2]))


def test_subset_does_not_depend_on_the_seed():
    def images(*flags):
        return training_images(parse_flags(make_parser("x"), ["--dataset", "synthetic", *flags]))

    fifty = images("--subset", "50")
    assert torch.equal(fifty, images("--subset", "50", "--seed", "3")) and len(fifty) == 50
    assert torch.equal(fifty[:20], images("--subset", "20")) and len(images()) == 5000
    with pytest.raises(UserError, match="--subset 9999"):
        images("--subset", "9999")
