"""Images of 32 x 32: CIFAR-10's binary files, or scikit-learn's digits, made larger.

Order and augmentation are drawn for the batch of all ranks, by one generator in the same state on each: a rank takes
its share afterwards, and a run sees the same images however many processes it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from bench.experiments.digits import digits_split

SIZE, CHANNELS, CLASSES, PADDING = 32, 3, 10, 4
RECORD = 1 + CHANNELS * SIZE * SIZE  # bytes: label, then the red, green and blue plane, each row by row
FOLDER = "cifar-10-batches-bin"  # the archive unpacks to this folder
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)


@dataclass(frozen=True)
class Images:
    """Pixels (n, 3, 32, 32) in uint8, labels (n,); mean and std (3, 1, 1) of the training pixels, in float64.

    ``flip``: whether a mirrored image has the same label, as digits do not.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor
    flip: bool

    def standardized(self, x: Tensor) -> Tensor:
        """Standardize pixels with the training images' mean and deviation of each channel, in the default type."""
        mean, std = (t.to(x.device, torch.get_default_dtype()) for t in (self.mean, self.std))
        return (x - mean) / std


def images(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], flip: bool, device: torch.device) -> Images:
    """Return images and their statistics, from counts of the 256 values: exact, without 600 MB of float32 pixels."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([train[0][:, c].flatten().bincount(minlength=256) for c in range(CHANNELS)]).double()
    mean = (counts * values).sum(1) / counts.sum(1)
    std = ((counts * (values - mean[:, None]).square()).sum(1) / counts.sum(1)).sqrt()
    if not bool((std > 0).all()):
        raise ValueError(f"training images: expected pixels that differ, got standard deviations {std.tolist()}")
    (train_x, train_y), (test_x, test_y) = ([t.to(device) for t in both] for both in (train, test))
    return Images(train_x, train_y, test_x, test_y, mean.view(-1, 1, 1), std.view(-1, 1, 1), flip)


def digits(device: torch.device) -> Images:
    """Return the split of bench.experiments.digits as images of 32 x 32.

    They are 898 and 899 grey images, 8 x 8 in the original, with three equal channels.
    """
    data, split = load_digits(), digits_split()
    pixels = torch.from_numpy(data.images).unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    x = pixels.round().to(torch.uint8).expand(-1, CHANNELS, -1, -1)
    return images((x[split.train_index], split.train_y), (x[split.test_index], split.test_y), False, device)


def cifar(folder: Path, device: torch.device) -> Images:
    """Read CIFAR-10's binary version from ``folder`` or its subfolder cifar-10-batches-bin.

    Raises:
        FileNotFoundError, ValueError: a file is missing, is not made of records of 3073 bytes, or has labels above 9.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder with CIFAR-10's binary files, got {folder}")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    missing = [name for name in (*TRAIN_FILES, *TEST_FILES) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: expected CIFAR-10's binary files, got none named {', '.join(missing)}")
    train, test = ([read(folder / name) for name in names] for names in (TRAIN_FILES, TEST_FILES))
    return images(_joined(train), _joined(test), True, device)


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Read pixels (n, 3, 32, 32) in uint8 and labels (n,) of one file."""
    content = bytearray(path.read_bytes())
    if not content or len(content) % RECORD:
        raise ValueError(f"{path}: expected records of {RECORD} bytes, got {len(content)} bytes")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD)
    labels = records[:, 0].long()
    wrong = (labels >= CLASSES).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"{path}: expected labels from 0 to {CLASSES - 1}, got {labels[first]} in record {first}")
    return records[:, 1:].reshape(-1, CHANNELS, SIZE, SIZE), labels


def _joined(files: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in files]), torch.cat([y for _, y in files])


def batches(count: int, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yield the indices of each batch of an epoch, shuffled if there is a generator; the last batch may be smaller."""
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    yield from order.split(batch_size)


def share(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Return a rank's part of a batch: every ranks-th row, as DistributedSampler deals, but none twice.

    So the shares of one batch differ by one row at most; where a batch has fewer rows than there are ranks, some are
    empty.
    """
    return whole[rank::ranks]


def draws(count: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Draw (count, 3): the row and the column that a crop begins at, from 0 to 8, and whether it is mirrored."""
    offsets = torch.randint(2 * PADDING + 1, (count, 2), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator) if flip else torch.zeros(count, 1, dtype=torch.long)
    return torch.cat([offsets, mirrored], dim=1)


def augmented(x: Tensor, drawn: Tensor) -> Tensor:
    """Return crops of the images (n, 3, 32, 32), padded by 4 black pixels on each side, all in one gather."""
    row, column, mirrored = drawn.to(x.device).T.unsqueeze(-1)
    steps = torch.arange(SIZE, device=x.device)
    columns = column + torch.where(mirrored == 1, SIZE - 1 - steps, steps)
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(CHANNELS, device=x.device).view(1, -1, 1, 1)
    padded = F.pad(x, (PADDING,) * 4)
    return padded[image, channel, (row + steps)[:, None, :, None], columns[:, None, None, :]]
