"""Images for train_imagenet.py: folders in the layout of ILSVRC2012 or generated ones, decoded, augmented, and batched.

Everything random about an image is a function of (seed, epoch, index): the order of an epoch and each augmentation
are drawn from generators seeded by these alone, so that a run that was cut off goes on with the very same pictures,
whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ILSVRC2012
GRAY_MEAN, GRAY_STD = (0.458,), (0.226,)
DUMMY_IMAGES, DUMMY_CLASSES = (1_281_167, 50_000), 1000  # as many as ILSVRC2012 has
# what PIL raises for files that are no whole image
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(Exception):
    """The data is not there, or not as it should be; the message names the path and says what to do."""


class Bad(NamedTuple):
    path: str
    reason: str


class Batch(NamedTuple):
    images: Tensor  # (n, channels, size, size) uint8
    targets: Tensor  # (n,)
    indices: list[int]  # of the images in the data set
    bad: list[Bad]  # files that could not be read, and are not in the batch


def generator_of(*key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def standardized(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images (n, channels, size, size) as the network takes them: a batch at once, and on its device."""
    mean, std = (GRAY_MEAN, GRAY_STD) if images.shape[1] == 1 else (MEAN, STD)
    mean, std = ([255 * value for value in values] for values in (mean, std))  # white is 255, not 1
    return v2.functional.normalize(images.to(dtype), mean, std, inplace=True)


# ---------------------------------------------------------------------------------------------------- data sets


def read_image(path: str) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        colour = image if image.mode == "RGB" else image.convert("RGB")  # from grey and CMYK
        ImageOps.exif_transpose(colour, in_place=True)  # cameras turn an image by a tag
        return colour


class Folder(ImageFolder):
    """An ImageFolder whose classes are those of the training folder, so that an index means one class in both."""

    def __init__(self, root: Path, class_to_idx: dict[str, int]):
        self._classes = class_to_idx
        super().__init__(str(root), loader=read_image, allow_empty=True)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return list(self._classes), self._classes


class Images(Dataset):
    """(epoch, index) → image, class, index, or the Bad file. Epoch None: not augmented."""

    def __init__(self, folder: Folder, transform: v2.Transform, plain: v2.Transform, seed: int):
        self.folder, self.transform, self.plain, self.seed = folder, transform, plain, seed

    def __len__(self) -> int:
        return len(self.folder.samples)

    def name(self, index: int) -> str:
        return self.folder.samples[index][0]

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int, int] | Bad:
        epoch, index = key
        path, target = self.folder.samples[index]
        try:
            image = self.folder.loader(path)
        except UNREADABLE as error:
            return Bad(path, f"{type(error).__name__}: {error}")
        if epoch is None:
            return self.plain(image), target, index
        with torch.random.fork_rng(devices=[]):  # transforms draw from the global generator
            torch.random.default_generator.set_state(generator_of(self.seed, epoch, index).get_state())
            return self.transform(image), target, index


class DummyImages(Dataset):
    """Noise, a function of the index alone, and classes: enough to run everything but the decoding."""

    def __init__(self, size: int, shape: tuple[int, int, int], num_classes: int, part: str):
        self.size, self.shape, self.num_classes, self.part = size, shape, num_classes, part

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"dummy {self.part} image {index}"

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int, int]:
        _, index = key
        generator = generator_of(self.part, index)
        target = int(torch.randint(self.num_classes, (), generator=generator))
        return torch.randint(256, self.shape, dtype=torch.uint8, generator=generator), target, index


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


def open_folders(root: Path) -> tuple[Folder, Folder]:
    """The training and the validation folder, or the DataError that says what is wrong."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}: --data-dir must name a folder with train/ and val/ in it; or pass --dummy")
    train, val = class_folders(root / "train"), class_folders(root / "val")
    if unknown := sorted(set(val) - set(train)):
        raise DataError(f"{val[unknown[0]]} is a class that {root / 'train'} does not have ({len(unknown)} such)")
    class_to_idx = {name: index for index, name in enumerate(train)}
    folders = Folder(root / "train", class_to_idx), Folder(root / "val", class_to_idx)
    for folder, classes in zip(folders, (train, val), strict=True):
        found = {target for _, target in folder.samples}
        for name, path in classes.items():
            if class_to_idx[name] not in found:
                raise DataError(f"{path} has no image in it (.JPEG, .png, …): fill it, or remove the folder")
    return folders


def open_data(args) -> tuple[Dataset, Dataset, int]:
    """Training images, validation images, and the number of classes."""
    channels, size = (1 if args.grayscale else 3), args.image_size
    if args.dummy:
        shape, sizes = (channels, size, size), (args.dummy, max(1, args.dummy * DUMMY_IMAGES[1] // DUMMY_IMAGES[0]))
        train, val = (
            DummyImages(n, shape, args.dummy_classes, p) for n, p in zip(sizes, ("train", "val"), strict=True)
        )
        return train, val, args.dummy_classes
    last = [*([v2.Grayscale()] if args.grayscale else []), v2.PILToTensor()]
    centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *last])
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *last])
    whole = v2.Compose([v2.Resize((size, size)), *last])
    train, val = open_folders(args.data_dir)
    random, plain = (augmented, centre) if args.augment == "standard" else (whole, whole)
    return Images(train, random, plain, args.seed), Images(val, random, plain, args.seed), len(train.classes)


# ------------------------------------------------------------------------------------------------------ batches


class Batches:
    """The batches of an epoch as lists of (epoch, index), this rank's equal share of each; from batch `start` on.

    shuffled: by (seed, epoch); else in order and not augmented. All ranks see the same number of batches, and rank
    after rank they make up the batch of one process.
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
            order = torch.randperm(self.length, generator=generator_of(self.seed, epoch))
        for batch in range(self.start, len(self)):
            begin = batch * self.batch_size + self.rank * share
            yield [
                (epoch, index) for index in order[begin : min(begin + share, (batch + 1) * self.batch_size)].tolist()
            ]


def collate(items: list[tuple[Tensor, int, int] | Bad]) -> Batch:
    bad = [item for item in items if isinstance(item, Bad)]
    good = [item for item in items if not isinstance(item, Bad)]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), [], bad)
    images, targets, indices = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), list(indices), bad)


def leave_signals_to_the_main_process(_: int) -> None:
    """A worker that dies of Ctrl-C would take the step and its checkpoint with it; it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader_of(data: Dataset, batches: Batches, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its base seed shall not come from the global generator
    )


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
