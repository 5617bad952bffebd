"""A data set on the device: decoded once, kept as uint8, augmented where it lies.

    bank = Bank(dataset, size=320, device=device)      # images [N, 3, 320, 320], 0.9 GB per 3,000
    order, batch = epoch_order(len(bank), 8, seed, epoch)
    for index, flip in batches(order, batch, seed, epoch):
        image = bank.images(index, flip)               # float [8, 3, 320, 320] in [0, 1]

With parts=("image", "mask") the bank holds masks too, and `bank.masks(index, flip)` reads them.
`MapBank` holds one map per image (a pseudo label) and can be written to: a map that was read
flipped is written back un-flipped, so labels stay aligned with their photo whatever the flips.

A bank that does not fit into half of the free memory becomes a memory-mapped file with the same
interface. The order of samples and the flips depend on (seed, epoch) alone, not on the number of
processes or workers, so a resumed run sees what an undisturbed one would have seen.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF

from common.runtime import UserError, World, generator, parallel_map, progress, say


def free_memory(device: torch.device) -> int:
    """Free bytes on `device`, those that PyTorch keeps from an earlier stage included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 8 << 30


def storage(
    shape: tuple[int, ...], device: torch.device, file: Path, budget: int | None
) -> torch.Tensor:
    """An uninitialised uint8 tensor on `device`, or on the disk if it is larger than `budget` bytes
    (default: half of the free memory)."""
    size = torch.Size(shape).numel()
    if size <= (free_memory(device) // 2 if budget is None else budget):
        return torch.empty(shape, dtype=torch.uint8, device=device)
    file.parent.mkdir(parents=True, exist_ok=True)
    file = file.with_suffix(f".{os.environ.get('RANK', 0)}{file.suffix}")  # one for each process
    say(f"{size / 1e9:.1f} GB do not fit into memory: streaming from {file}")
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8).view(shape)


def unit(pixels: torch.Tensor, flip: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [B, C, H, W] to float in [0, 1] on `device`, the rows marked in `flip` [B] mirrored."""
    pixels = pixels.to(device, non_blocking=True).float() / 255
    flip = flip.to(device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(flip, pixels.flip(3), pixels)


class Bank:
    """The images of a data set at size x size and, if `parts` names them, masks and modalities.

    A sample without a part (photos in a joint set lack a modality) has zeros, and False in `has`.
    """

    CHANNELS = {"image": 3, "mask": 1, "modality": 3}

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        device: torch.device,
        folder: Path = Path("."),
        budget: int | None = None,
        parts: tuple[str, ...] = ("image",),
    ):
        self.device, self.names, count = device, dataset.names, len(dataset)
        shapes = {part: (count, self.CHANNELS[part], size, size) for part in parts}
        budget = free_memory(device) // 2 if budget is None else budget
        if sum(map(math.prod, shapes.values())) > budget:
            budget = 0  # all parts go to the disk
        self.pixels = {
            part: storage(shape, device, Path(folder, f"{part}.u8"), budget)
            for part, shape in shapes.items()
        }
        self.has = {part: torch.ones(count, dtype=torch.bool) for part in parts}

        def load(i: int) -> list[torch.Tensor | None]:
            sample = dataset[i]
            return [resize(sample[part], size) for part in parts]

        samples = parallel_map(load, range(count))
        for i, sample in enumerate(progress(samples, f"decode {dataset.title}", count)):
            for part, pixels in zip(parts, sample):
                self.has[part][i] = pixels is not None
                self.pixels[part][i] = 0 if pixels is None else pixels

    def __len__(self) -> int:
        return len(self.names)

    def read(
        self, part: str, index: torch.Tensor, flip: torch.Tensor | None = None
    ) -> torch.Tensor:
        """index [B] (CPU), flip bool [B] -> float [B, C, size, size] in [0, 1] on the device."""
        flip = torch.zeros(len(index), dtype=torch.bool) if flip is None else flip
        pixels = self.pixels[part]
        return unit(pixels[index.to(pixels.device, non_blocking=True)], flip, self.device)

    def images(self, index: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
        """`read` the images: [B, 3, size, size]."""
        return self.read("image", index, flip)

    def masks(self, index: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
        """`read` the masks: [B, 1, size, size], grey where the resized mask has an edge."""
        return self.read("mask", index, flip)


class MapBank:
    """One map in [0, 1] per image, stored with 8 bits, at size x size.

    load: index -> uint8 [1, H, W] of any size.
    """

    def __init__(
        self,
        load: Callable[[int], torch.Tensor],
        count: int,
        size: int,
        device: torch.device,
        folder: Path = Path("."),
        budget: int | None = None,
    ):
        self.device = device
        self.changed = False  # whether maps were written since they were last saved
        self.pixels = storage((count, 1, size, size), device, Path(folder, "maps.u8"), budget)
        maps = parallel_map(lambda i: resize(load(i), size), range(count))
        for i, label in enumerate(progress(maps, "read labels", count)):
            self.pixels[i] = label

    def read(self, index: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """index [B], flip [B] -> float [B, 1, size, size] in [0, 1], mirrored where `flip`."""
        pixels = self.pixels[index.to(self.pixels.device, non_blocking=True)]
        return unit(pixels, flip, self.device)

    def write(self, index: torch.Tensor, flip: torch.Tensor, maps: torch.Tensor) -> None:
        """Store `maps` as `read` gave them: mirrored ones are turned back first."""
        self.changed = True
        flip = flip.to(maps.device, non_blocking=True).view(-1, 1, 1, 1)
        maps = (torch.where(flip, maps.flip(3), maps) * 255 + 0.5).byte()
        self.pixels[index.to(self.pixels.device, non_blocking=True)] = maps.to(self.pixels.device)

    def share(self, order: torch.Tensor, batch: int, world: World) -> None:
        """After an epoch over `order`: give every process the maps that the others wrote."""
        if world.size == 1:
            return
        owner = torch.zeros(len(self.pixels), dtype=torch.long)  # rank 0 keeps untouched maps
        owner[order] = torch.arange(len(order)) % batch // (batch // world.size)
        for rows in torch.arange(len(owner)).split(1024):  # the bank may lie on the disk
            part = self.pixels[rows[0] : rows[-1] + 1].to(self.device)
            part[(owner[rows] != world.rank).to(self.device)] = 0
            dist.all_reduce(part)
            self.pixels[rows[0] : rows[-1] + 1] = part.to(self.pixels.device)


def resize(pixels: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """uint8 [C, H, W] -> [C, size, size]; None stays None."""
    return None if pixels is None else TF.resize(pixels, [size, size], antialias=True)


def draw_crops(count: int, share: float, random: torch.Generator) -> torch.Tensor:
    """Boxes [B, 4] (left, top, right, bottom) in [0, 1], without up to `share` of each axis."""
    cut = torch.rand(count, 2, generator=random) * share
    start = torch.rand(count, 2, generator=random) * cut
    return torch.cat([start, start + 1 - cut], 1)


def crop(x: torch.Tensor, box: torch.Tensor, side: int | None = None) -> torch.Tensor:
    """What lies in the boxes [B, 4] (see `draw_crops`; on the CPU) of [B, C, h, w], bilinear, at
    h x w, or at side x side."""
    h, w = x.shape[2:]
    rows = torch.arange(len(box))[:, None]
    rois = torch.cat([rows, box * torch.tensor([w, h, w, h])], 1)  # [B, 5]
    return roi_align(
        x,
        rois.to(x.device, non_blocking=True),
        (side or h, side or w),
        sampling_ratio=1,
        aligned=True,
    )


def epoch_order(
    count: int, batch: int, seed: int, epoch: int, world: World = World()
) -> tuple[torch.Tensor, int]:
    """(samples of an epoch in order [steps * batch], batch). The last incomplete batch is dropped;
    a set smaller than a batch is one batch, as far as the processes can share it evenly."""
    batch = min(batch, count // world.size * world.size)
    if batch == 0:
        raise UserError(f"{count} image(s) cannot be shared by {world.size} processes")
    order = torch.randperm(count, generator=generator("cpu", seed, "order", epoch))
    return order[: count // batch * batch], batch


def batches(
    order: torch.Tensor,
    batch: int,
    seed: int,
    epoch: int,
    world: World = World(),
    flips: str = "anew",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (index [b], flip [b]) for every step; `batch` is global, b = batch / world.size.

    flips: "anew" draws a sample's flip in every epoch, "once" keeps the first one for all epochs.
    """
    # one number per sample, also for those that this epoch dropped: fewer than a batch
    draw = torch.rand(
        len(order) + batch,
        generator=generator("cpu", seed, "flip", 0 if flips == "once" else epoch),
    )
    share = batch // world.size
    for whole in order.split(batch):
        index = whole[world.rank * share :][:share]
        yield index, draw[index] < 0.5
