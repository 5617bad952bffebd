"""A data set on the device: decoded once, kept as uint8, augmented where it lies.

    bank = Bank(dataset, size=320, device=device)      # images [N, 3, 320, 320], 0.9 GB per 3,000
    order, batch = epoch_order(len(bank), 8, seed, epoch)
    for index, flip in batches(order, batch, seed, epoch):
        image = bank.images(index, flip)               # float [8, 3, 320, 320] in [0, 1]

With parts=("image", "mask") the bank holds masks too, and `bank.masks(index, flip)` reads them.
`MapBank` holds one map per image (a pseudo label) and can be written to: a map that was read
flipped is written back un-flipped, so labels stay aligned with their photo whatever the flips.

A bank that does not fit into half of the available memory becomes a memory-mapped file with the
same interface. The order of samples and the flips depend on (seed, epoch) alone, not on the number
of processes or workers, so a resumed run sees what an undisturbed one would have seen.
"""

import math
import mmap
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF

from common.datasets import report_left_out
from common.runtime import UserError, World, generator, parallel_map, progress, say


# ---- Pictures and labels -------------------------------------------------------------------------
def unit(pixels: Tensor, flip: Tensor, device: torch.device) -> Tensor:
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
        self.device = device
        self.names = dataset.names
        count = len(dataset)
        # A set of your own may lack what tells a replaced photo, and what was left out.
        file_size = getattr(dataset, "bytes", lambda i: 0)
        self.file_sizes = [file_size(i) for i in range(count)]
        if getattr(dataset, "left_out", None):
            report_left_out(dataset)
        shapes = {part: (count, self.CHANNELS[part], size, size) for part in parts}
        if budget is None:
            budget = free_memory(device) // 2
        if sum(map(math.prod, shapes.values())) > budget:
            budget = 0  # all parts go to the disk
        self.pixels = {}
        self.has = {}
        for part, shape in shapes.items():
            self.pixels[part] = storage(shape, device, folder, budget)
            self.has[part] = torch.ones(count, dtype=torch.bool)

        def load(i: int) -> list[Tensor | None]:
            # A JPEG of 12 million pixels is not decoded wholly, but at twice the wanted size or
            # more: 45 instead of 250 ms, with a mean difference of 0.2 grey levels at 320 pixels.
            if parts == ("image",) and hasattr(dataset, "photo"):
                return [resize(dataset.photo(i, at_least=2 * size), size)]
            sample = dataset[i]
            return [resize(sample[part], size) for part in parts]

        blank = Counter()  # masks of one value are legal, but seldom meant
        samples = parallel_map(load, range(count))
        for i, sample in enumerate(progress(samples, f"decode {dataset.title}", count)):
            for part, pixels in zip(parts, sample):
                self.has[part][i] = pixels is not None
                self.pixels[part][i] = 0 if pixels is None else pixels
                if part == "mask" and pixels is not None and pixels.min() == pixels.max():
                    blank["full" if pixels.any() else "empty"] += 1
        for kind, masks in blank.items():
            say(f"warning: {dataset.title} has {masks} {kind} mask(s)", error=True)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, part: str, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """index [B] (CPU), flip bool [B] -> float [B, C, size, size] in [0, 1] on the device."""
        if flip is None:
            flip = torch.zeros(len(index), dtype=torch.bool)
        pixels = self.pixels[part]
        return unit(pixels[index.to(pixels.device, non_blocking=True)], flip, self.device)

    def images(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """`read` the images: [B, 3, size, size]."""
        return self.read("image", index, flip)

    def masks(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """`read` the masks: [B, 1, size, size], grey where the resized mask has an edge."""
        return self.read("mask", index, flip)


class MapBank:
    """One map in [0, 1] per image, stored with 8 bits, at size x size.

    load: index -> uint8 [1, H, W] of any size.
    """

    def __init__(
        self,
        load: Callable[[int], Tensor],
        count: int,
        size: int,
        device: torch.device,
        folder: Path = Path("."),
        budget: int | None = None,
    ):
        self.device = device
        self.changed = False  # whether maps were written since they were last saved
        self.pixels = storage((count, 1, size, size), device, folder, budget)
        maps = parallel_map(lambda i: resize(load(i), size), range(count))
        for i, label in enumerate(progress(maps, "read labels", count)):
            self.pixels[i] = label

    def read(self, index: Tensor, flip: Tensor) -> Tensor:
        """index [B], flip [B] -> float [B, 1, size, size] in [0, 1], mirrored where `flip`."""
        pixels = self.pixels[index.to(self.pixels.device, non_blocking=True)]
        return unit(pixels, flip, self.device)

    def write(self, index: Tensor, flip: Tensor, maps: Tensor) -> None:
        """Store `maps` as `read` gave them: mirrored ones are turned back first."""
        self.changed = True
        flip = flip.to(maps.device, non_blocking=True).view(-1, 1, 1, 1)
        maps = (torch.where(flip, maps.flip(3), maps) * 255 + 0.5).byte()
        self.pixels[index.to(self.pixels.device, non_blocking=True)] = maps.to(self.pixels.device)

    def share(self, order: Tensor, batch: int, world: World) -> None:
        """After an epoch over `order`: give every process the maps that the others wrote."""
        if world.size == 1:
            return
        self.changed = True
        owner = torch.zeros(len(self.pixels), dtype=torch.long)  # rank 0 keeps untouched maps
        owner[order] = torch.arange(len(order)) % batch // (batch // world.size)

        # Every map is 0 in all processes but its owner's, so that their sum is the owner's map. In
        # parts, since the bank may lie on the disk.
        for rows in torch.arange(len(owner)).split(1024):
            part = self.pixels[rows[0] : rows[-1] + 1].to(self.device)
            part[(owner[rows] != world.rank).to(self.device)] = 0
            dist.all_reduce(part)
            self.pixels[rows[0] : rows[-1] + 1] = part.to(self.pixels.device)


def resize(pixels: Tensor | None, size: int) -> Tensor | None:
    """uint8 [C, H, W] -> [C, size, size]; None stays None."""
    return None if pixels is None else TF.resize(pixels, [size, size], antialias=True)


# ---- Crops ---------------------------------------------------------------------------------------
def draw_crops(count: int, share: float, random: torch.Generator) -> Tensor:
    """Boxes [B, 4] (left, top, right, bottom) in [0, 1], without up to `share` of each axis."""
    cut = torch.rand(count, 2, generator=random) * share
    start = torch.rand(count, 2, generator=random) * cut
    return torch.cat([start, start + 1 - cut], 1)


def crop(x: Tensor, box: Tensor, side: int | None = None) -> Tensor:
    """What lies in the boxes of [B, C, h, w], bilinear, at h x w, or at side x side.

    box: [B, 4] on the CPU, see `draw_crops`.
    """
    h, w = x.shape[2:]
    rows = torch.arange(len(box))[:, None]
    rois = torch.cat([rows, box * torch.tensor([w, h, w, h])], 1)  # [B, 5]
    rois = rois.to(x.device, non_blocking=True)
    return roi_align(x, rois, (side or h, side or w), sampling_ratio=1, aligned=True)


# ---- The order of an epoch -----------------------------------------------------------------------
def epoch_order(
    count: int, batch: int, seed: int, epoch: int, world: World = World()
) -> tuple[Tensor, int]:
    """(samples of an epoch in order [steps * batch], batch).

    The last incomplete batch is dropped; a set smaller than a batch is one batch, as far as the
    processes can share it evenly. Raises `UserError` for fewer samples than processes.
    """
    batch = min(batch, count // world.size * world.size)
    if batch == 0:
        raise UserError(f"{count} image(s) cannot be shared by {world.size} processes")
    order = torch.randperm(count, generator=generator("cpu", seed, "order", epoch))
    return order[: count // batch * batch], batch


def batches(
    order: Tensor,
    batch: int,
    seed: int,
    epoch: int,
    world: World = World(),
    flips: str = "anew",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (index [b], flip [b]) for every step; `batch` is global, b = batch / world.size.

    flips: "anew" draws a sample's flip in every epoch, "once" keeps the first one for all epochs.
    """
    # One number per sample, also for those that this epoch dropped, which are fewer than a batch.
    drawn_in = 0 if flips == "once" else epoch
    draw = torch.rand(len(order) + batch, generator=generator("cpu", seed, "flip", drawn_in))

    share = batch // world.size
    for whole in order.split(batch):
        index = whole[world.rank * share :][:share]
        yield index, draw[index] < 0.5


# ---- Memory --------------------------------------------------------------------------------------
CGROUPS = (  # of both versions: folder; files with a container's limit and use; what is cache of it
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used on `device`, those that PyTorch keeps from before included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still use: what the system has, or its container if that is less.

    Available is more than free, for the system gives up its cache of files on demand: after a data
    set was unpacked, 11.8 GB were free and 18.8 GB available. 8 GiB where nothing tells (Windows,
    macOS). root: the folder of /proc and /sys.
    """
    available = number_in(root / "proc/meminfo", "MemAvailable:")
    if available is None:
        return 8 << 30
    least = available * 1024
    for place, limit, used, cache in CGROUPS:
        for folder in control_groups(root, root / place):
            allowed = number_in(folder / limit)
            if allowed is not None:
                taken = number_in(folder / used) or 0
                taken -= number_in(folder / "memory.stat", cache) or 0
                least = min(least, max(0, allowed - taken))
    return least


def control_groups(root: Path, place: Path) -> set[Path]:
    """The control groups below `place` that this process belongs to: its own and those above."""
    folders = {place}
    for line in text_of(root / "proc/self/cgroup").split("\n"):
        path = line.rpartition(":")[2]  # "4:memory:/docker/5f3c"; "0::/docker/5f3c" in version 2
        own = place / path.strip("/")
        folders |= {own, *own.parents}
    return folders


def number_in(path: Path, name: str = "") -> int | None:
    """The whole number that follows `name` at the start of a line of `path`; None without one."""
    found = re.search(rf"^{name}\s*(\d+)", text_of(path), re.MULTILINE)
    return int(found[1]) if found else None


def text_of(path: Path) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def storage(
    shape: tuple[int, ...], device: torch.device, folder: Path, budget: int | None
) -> Tensor:
    """An uninitialised uint8 tensor on `device`, or on the disk if it is larger than `budget` bytes
    (default: half of the available memory).

    On the disk it is a file in `folder` without a name, which the system removes when the tensor
    is gone or the process ends, however it ends. Raises `UserError` if the disk is full.
    """
    size = math.prod(shape)
    if size <= (free_memory(device) // 2 if budget is None else budget):
        return torch.empty(shape, dtype=torch.uint8, device=device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a full disk is noticed now, not by a crash later
                os.posix_fallocate(file.fileno(), 0, size)
            pixels = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(
            f"{size / 1e9:.1f} GB of pictures fit neither into memory nor into {folder} "
            f"({error.strerror}); give --out on another disk, or lower --size"
        ) from None
    say(f"{size / 1e9:.1f} GB do not fit into memory: streaming from a file in {folder}")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)
