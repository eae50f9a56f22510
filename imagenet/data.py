"""The images: folders in the layout of ILSVRC2012, or generated ones; reading, augmentation, batches.

All that is random about an image is a function of (seed, epoch, index). So a run that was cut off goes on with the same
pictures, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import os
import signal
import stat
import struct
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ILSVRC2012
GRAY_MEAN, GRAY_STD = (0.458,), (0.226,)
DUMMY_IMAGES, DUMMY_CLASSES = (1_281_167, 50_000), 1000  # the numbers of ILSVRC2012
MAX_ASPECT = 8  # longer side : shorter side; what is beyond never enters the central crop
# raised for a file that is not a whole image, and for one of more pixels than Image.MAX_IMAGE_PIXELS
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


class DataError(Exception):
    """The data is missing or wrong. The message names the path and says what to do."""


class Bad(NamedTuple):
    """A file that could not be read."""

    path: str
    reason: str


class Batch(NamedTuple):
    images: Tensor  # (n, channels, size, size) uint8
    targets: Tensor  # (n,)
    indices: list[int]  # of the images in their set
    bad: list[Bad]  # not in `images`


def seeded_generator(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def standardized(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (n, channels, size, size) to numbers of about zero mean and unit variance."""
    statistics = (GRAY_MEAN, GRAY_STD) if images.shape[1] == 1 else (MEAN, STD)
    mean, std = ([255 * value for value in values] for values in statistics)  # white is 255, not 1
    return v2.functional.normalize(images.to(dtype), mean, std, inplace=True)


# ---------------------------------------------------------------------------------------------------- data sets


def in_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in 8 bits. PIL's own conversion would clip it to white or to black.

    - 16-bit integers: divided by 257, so that 65,535 becomes 255.
    - floats: must lie in 0 … 1; multiplied by 255.
    - other integers (signed or of 12 or 32 bits, in TIFF): their range is not known. ValueError.
    """
    pixels = np.asarray(image)
    if image.mode == "F":
        if not (0 <= pixels.min() and pixels.max() <= 1):  # NaN fails too
            raise ValueError(f"float pixels must lie in 0 … 1, these in {pixels.min():g} … {pixels.max():g}")
        return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    bits = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample of a TIFF
    if bits != (16,) or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # in these, I holds 16 bits
        raise ValueError("integer pixels must have 8 bits, or 16 without sign: save the image again")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))


def read_image(path: str) -> Image.Image:
    """The RGB image in a file, upright; one of the UNREADABLE errors if there is none."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # cameras turn an image by a tag
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                return in_8_bits(image).convert("RGB")
            return image if image.mode == "RGB" else image.convert("RGB")  # from grey and CMYK


def without_far_ends(image: Image.Image) -> Image.Image:
    """The centre of a very long image; any other unchanged. Resized whole, 30,000 × 1 pixels would take 8 GiB."""
    longest = MAX_ASPECT * min(image.size)
    return v2.CenterCrop([min(image.height, longest), min(image.width, longest)])(image)


def images_below(root: Path, skipped: set[Path]) -> Iterator[str]:
    """The image files below a class folder, in order. Links are followed, but each real folder is entered once."""
    seen = skipped - {root.resolve()}
    walk = []
    for folder, folders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        folders[:] = [] if real in seen else sorted(folders)
        if real not in seen:
            walk.append((folder, sorted(names)))
        seen.add(real)
    for folder, names in sorted(walk):
        yield from (os.path.join(folder, name) for name in names if name.lower().endswith(IMG_EXTENSIONS))


class Images(Dataset):
    """The images of DIR/train or DIR/val. Both have the classes of DIR/train, so that an index means one class.

    (epoch, index) → image, class, index; or a Bad file. Epoch None: not augmented.
    """

    def __init__(
        self,
        root: Path,
        classes: list[str],
        samples: list[tuple[str, int]],
        augment: Transform,
        plain: Transform,
        seed: int,
    ):
        self.root, self.classes, self.samples = root, classes, samples
        self.augment, self.plain, self.seed = augment, plain, seed

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def files(self) -> Iterable[str]:
        """The names of all files, from train/ or val/ on."""
        return (self.root.name + path.removeprefix(str(self.root)) for path, _ in self.samples)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int, int] | Bad:
        epoch, index = key
        path, target = self.samples[index]
        try:
            image = read_image(path)
        except UNREADABLE as error:
            return Bad(path, f"{type(error).__name__}: {error}")
        if epoch is None:
            return self.plain(image), target, index
        with torch.random.fork_rng(devices=[]):  # transforms draw from the global generator
            torch.random.default_generator.set_state(seeded_generator(self.seed, epoch, index).get_state())
            return self.augment(image), target, index


class DummyImages(Dataset):
    """As Images, but noise and a class that are functions of the index: enough to run everything but the decoding."""

    def __init__(self, size: int, shape: tuple[int, int, int], num_classes: int, part: str):
        self.size, self.shape, self.num_classes, self.part = size, shape, num_classes, part
        self.classes = [f"{num_classes} generated classes"]

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"dummy {self.part} image {index}"

    def files(self) -> Iterable[str]:
        return ()

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int, int]:
        _, index = key
        generator = seeded_generator(self.part, index)
        target = int(torch.randint(self.num_classes, (), generator=generator))
        return torch.randint(256, self.shape, dtype=torch.uint8, generator=generator), target, index


ImageSet = Images | DummyImages


class Data(NamedTuple):
    train: ImageSet
    val: ImageSet
    num_classes: int

    def files_digest(self) -> str:
        """A short digest of the names of all files."""
        digest = hashlib.blake2b(digest_size=8)
        for images in (self.train, self.val):
            for name in images.files():
                digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()


def class_folders(root: Path) -> dict[str, Path]:
    """The class folders of DIR/train or DIR/val by name."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "is missing"
        raise DataError(f"{root} {what}: expected one folder a class in it, as in {root}/n01440764/*.JPEG")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if not entry.is_dir():
            raise DataError(f"{entry} is a file where a class folder should be: move it into one, or away")
    if not entries:
        raise DataError(f"{root} is empty: expected one folder a class in it, as in {root}/n01440764/*.JPEG")
    return {entry.name: entry for entry in entries}


def list_images(root: Path, paths: dict[str, Path], classes: list[str]) -> list[tuple[str, int]]:
    """The path and class index of each image below the class folders; DataError if one has no image."""
    # a link to one of these would bring the images of one class into another
    skipped = {root.resolve(), *root.resolve().parents, *(path.resolve() for path in paths.values())}
    samples = []
    for name, path in paths.items():
        index, found = classes.index(name), list(images_below(path, skipped))
        if not found:
            raise DataError(f"{path} has no image in it (.JPEG, .png, …): fill it, or remove the folder")
        samples += [(image, index) for image in found]
    return samples


def open_folders(root: Path, augment: Transform, plain: Transform, seed: int) -> Data:
    """The images below root/train and root/val; DataError if they are not as they should be."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}: --data-dir must name a folder with train/ and val/ in it; or pass --dummy")
    train, val = class_folders(root / "train"), class_folders(root / "val")
    if unknown := sorted(set(val) - set(train)):
        raise DataError(f"{val[unknown[0]]} is a class that {root / 'train'} does not have ({len(unknown)} such)")
    classes = list(train)
    train_set, val_set = (
        Images(folder, classes, list_images(folder, paths, classes), augment, plain, seed)
        for folder, paths in ((root / "train", train), (root / "val", val))
    )
    return Data(train_set, val_set, len(classes))


def open_data(args: argparse.Namespace) -> Data:
    """The images that the flags name; DataError if they are not as they should be."""
    channels, size = (1 if args.grayscale else 3), args.image_size
    if args.dummy:
        shape, classes = (channels, size, size), args.dummy_classes
        to_validate = max(1, args.dummy * DUMMY_IMAGES[1] // DUMMY_IMAGES[0])
        generated = DummyImages(args.dummy, shape, classes, "train")
        return Data(generated, DummyImages(to_validate, shape, classes, "val"), classes)
    last = [*([v2.Grayscale()] if args.grayscale else []), v2.PILToTensor()]
    whole = v2.Compose([v2.Resize((size, size)), *last])
    if args.augment == "none":
        return open_folders(args.data_dir, whole, whole, args.seed)
    centre = v2.Compose([without_far_ends, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *last])
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *last])
    return open_folders(args.data_dir, augmented, centre, args.seed)


# ------------------------------------------------------------------------------------------------------ batches


class Batches:
    """The batches of an epoch, each a list of (epoch, index): this rank's equal share of each, from batch `start` on.

    shuffled: by (seed, epoch). If not, the images come in order and without augmentation.
    All ranks see the same number of batches. Together, rank after rank, they see the batches of one process.
    """

    def __init__(self, length: int, batch_size: int, seed: int, shuffled: bool, rank: int, ranks: int):
        self.length, self.batch_size, self.seed, self.shuffled = length, batch_size, seed, shuffled
        self.rank, self.ranks, self.epoch, self.start = rank, ranks, 0, 0

    def __len__(self) -> int:
        return -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        order, epoch, share = torch.arange(self.length), None, self.batch_size // self.ranks
        if self.shuffled:
            epoch = self.epoch
            order = torch.randperm(self.length, generator=seeded_generator(self.seed, epoch))
        for batch in range(self.start, len(self)):
            begin = batch * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[begin : begin + share].tolist()]


def collate(items: list[tuple[Tensor, int, int] | Bad]) -> Batch:
    bad = [item for item in items if isinstance(item, Bad)]
    good = [item for item in items if not isinstance(item, Bad)]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), [], bad)
    images, targets, indices = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), list(indices), bad)


def ignore_signals(_: int) -> None:
    """Ctrl-C must not end the workers: the main process still takes its step and saves. They end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader(NamedTuple):
    """An iterable of Batch, and what it is made of."""

    images: ImageSet
    batches: Batches
    loader: DataLoader


def make_loader(images: ImageSet, batches: Batches, num_workers: int, pin_memory: bool) -> Loader:
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # leaves the global generator alone
    )
    atexit.register(end_workers, weakref.ref(loader))
    return Loader(images, batches, loader)


def end_workers(reference: weakref.ref[DataLoader]) -> None:
    """At exit Python ends its children by SIGTERM, which the workers ignore, and would wait for them for ever."""
    loader = reference()
    iterator = None if loader is None else loader._iterator
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
