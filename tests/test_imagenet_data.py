"""imagenet/data.py: which files are images, how they are read, and what happens to those that can't be."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from imagenet.data import Bad, DataError, Images, open_data, read_image
from tests.oracles import HERE


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes, one grey image each, to train and to validate."""
    for number, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
        save(tmp_path / name / f"{number}.png", np.full((20, 20), number, np.uint8))
    return tmp_path


def opened(tree: Path, augment: str = "standard") -> tuple[Images, Images]:
    train, val, _ = open_data(
        Namespace(grayscale=False, image_size=224, dummy=None, data_dir=tree, augment=augment, seed=0)
    )
    assert isinstance(train, Images) and isinstance(val, Images)
    return train, val


# ------------------------------------------------------------------------------------------------ which files


def occupy(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)  # a socket's path may have 108 characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.parent / "missing.png")


@pytest.mark.parametrize("kind", ("pipe", "socket", "device", "dangling link"))
def test_only_regular_files_are_opened(tree, kind, monkeypatch):
    monkeypatch.chdir(tree)  # undone at the end
    occupy(tree / "train" / "a" / "x.JPEG", kind)
    train, _ = opened(tree)
    bad = train[0, 1]
    assert len(train) == 3 and isinstance(bad, Bad) and bad.path.endswith("x.JPEG")
    assert ("No such file" if kind == "dangling link" else "not a regular file") in bad.reason


def test_each_real_folder_counts_once(tree):
    a = tree / "train" / "a"
    save(a / "sub" / "5.png", np.zeros((4, 4), np.uint8))
    save(tree / "elsewhere" / "6.png", np.zeros((4, 4), np.uint8))
    before = [os.path.relpath(path, tree) for path, _ in opened(tree)[0].samples]
    assert before == ["train/a/0.png", "train/a/sub/5.png", "train/b/1.png"]
    for number, target in enumerate((a, a / "sub", a.parent, tree, Path("/"), tree / "train" / "b")):
        (a / f"loop{number}").symlink_to(target)
        (a / "sub" / f"loop{number}").symlink_to(target)
    found = opened(tree)[0].samples
    assert [target for _, target in found] == [0, 0, 1]
    assert [os.path.realpath(path) for path, _ in found] == [str((tree / name).resolve()) for name in before]
    (a / "more").symlink_to(tree / "elsewhere")  # a link out of the tree is followed
    assert str(a / "more" / "6.png") in [path for path, _ in opened(tree)[0].samples]


def test_a_class_folder_may_be_a_link_and_may_not_be_empty(tree):
    (tree / "train" / "b").rename(tree / "stored")
    (tree / "train" / "b").symlink_to(tree / "stored")
    assert [target for _, target in opened(tree)[0].samples] == [0, 1]
    (tree / "stored" / "1.png").rename(tree / "stored" / "1.txt")
    with pytest.raises(DataError, match="train/b has no image"):
        opened(tree)


# ----------------------------------------------------------------------------------------------------- pixels

RAMP = np.arange(65_536).reshape(256, 256)


@pytest.mark.parametrize("name", ("x.png", "x.tif", "big-endian.tif", "x.pgm"))
def test_16_bits_are_scaled_to_8(tmp_path, name):
    path = tmp_path / name
    if name == "x.pgm":
        path.write_bytes(b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes())
    elif name == "big-endian.tif":
        Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()).save(path)
    else:
        save(path, RAMP.astype(np.uint16))
    assert np.array_equal(np.asarray(read_image(str(path))), np.rint(RAMP / 257)[..., None].repeat(3, 2))


def test_floats_from_0_to_1_are_scaled_to_8_bits(tmp_path):
    pixels = (RAMP / 65_535).astype(np.float32)
    image = np.asarray(read_image(str(save(tmp_path / "x.tif", pixels))))
    assert np.abs(image / 255 - pixels[..., None]).max() < 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    "pixels, reason",
    (
        (np.full((4, 4), 200, np.float32), "0 … 1"),
        (np.array([[0.5, np.nan]], np.float32), "0 … 1"),
        (np.array([[-0.1, 0.5]], np.float32), "0 … 1"),
        (np.full((4, 4), 200, np.int32), "8 bits"),
        (np.full((4, 4), 2**31 - 1, np.int32), "8 bits"),
    ),
)
def test_pixels_of_unknown_range_are_a_bad_image(tree, pixels, reason):
    save(tree / "train" / "a" / "9.tif", pixels)
    bad = opened(tree)[0][0, 1]
    assert isinstance(bad, Bad) and reason in bad.reason


def test_a_tiff_of_12_bits_is_a_bad_image(tree):
    path = save(tree / "train" / "a" / "9.tif", RAMP.astype(np.uint16))
    bits_per_sample = (struct.pack("<HHIH", 258, 3, 1, bits) for bits in (16, 12))
    path.write_bytes(path.read_bytes().replace(*bits_per_sample))
    bad = opened(tree)[0][0, 1]
    assert isinstance(bad, Bad) and "8 bits" in bad.reason


def test_a_16_bit_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(RAMP[:10].astype(np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert read_image(str(tmp_path / "x.png")).size == (10, 256)


# -------------------------------------------------------------------------------------------------- large images


@pytest.mark.parametrize("shape", ((1, 30_000), (30_000, 1), (3, 20_000)))
@pytest.mark.parametrize("augment", ("standard", "none"))
def test_a_long_image_takes_little_memory(tree, shape, augment):
    save(tree / "train" / "a" / "9.png", np.zeros(shape, np.uint8))
    save(tree / "val" / "a" / "9.png", np.zeros(shape, np.uint8))
    train, val = opened(tree, augment)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for item in (train[0, 1], val[None, 1]):
        assert not isinstance(item, Bad) and item[0].shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; 8 GiB before


@pytest.mark.parametrize("shape", ((300, 500), (500, 301), (20, 160), (7, 50), (1000, 130), (1, 1)))
def test_ordinary_images_are_cropped_as_torchvision_does(tree, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    path = save(tree / "val" / "a" / "9.png", pixels)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(read_image(str(path)))
    item = opened(tree)[1][None, 1]
    assert not isinstance(item, Bad) and torch.equal(item[0], usual)


@pytest.mark.parametrize("width", (999, 1000))
def test_long_images_are_cropped_nearly_as_torchvision_does(tree, width):
    """Only pixels that the crop does not show are left out: the centre stays, up to a fraction of a pixel."""
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)[None].repeat(20, 0)
    path = save(tree / "val" / "a" / "9.png", ramp)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(read_image(str(path)))
    item = opened(tree)[1][None, 1]
    assert not isinstance(item, Bad) and (item[0].int() - usual.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", ((9_000, 10_000), (14_000, 14_000)))
def test_a_decompression_bomb_is_a_bad_image(tree, shape):
    with Image.new("1", shape[::-1]) as image:
        image.save(tree / "train" / "a" / "9.png")
    bad = opened(tree)[0][0, 1]
    assert isinstance(bad, Bad) and "DecompressionBomb" in bad.reason


def test_workers_end_with_the_process():
    """Also where something still refers to the loader at exit: the process must not wait for its workers for ever."""
    code = """
import builtins
from imagenet.data import Batches, DummyImages, make_loader
loader = make_loader(DummyImages(4, (3, 2, 2), 2, "train"), Batches(4, 2, 0, False, 0, 1), 1, False)
builtins.kept = (loader, iter(loader.loader))
print(len(list(builtins.kept[1])))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")
