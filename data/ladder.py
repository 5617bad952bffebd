"""The ladder: how well maps of 7 x 7 cells of different kinds predict masks.

    found = Ladder()
    found.add(samples, sums, features)          # of every batch of photos
    found.merge(world)
    found.report(title, mean_mask("DUTS-TR"), seed, folder)    # AUC of every kind of map

A captioner's maps can guide a saliency network only if they know where salient objects are. The
rungs tell how much they know: between the mask itself, which is the most that 49 numbers can hold,
and maps that know nothing of the photo (a Gaussian in the middle, the mean of the training masks).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from common.datasets import open_set
from common.runtime import UserError, World, generator, parallel_map, save_json, say

CELLS = 7
SIDE = 56  # masks are compared at 56 x 56
MOST = 500  # photos of a set


# ---- Maps ----------------------------------------------------------------------------------------
def centre_map() -> Tensor:
    """A Gaussian in the middle with a standard deviation of two cells. [1, 1, 7, 7]"""
    d = torch.arange(CELLS) - CELLS // 2
    squares = d.square()[:, None] + d.square()  # [7, 7]
    return torch.exp(-squares / (2 * 2**2))[None, None]


def mask_map(masks: Tensor) -> Tensor:
    """Masks [N, 1, H, W] in [0, 1] -> the share of each cell that they cover. [N, 1, 7, 7]"""
    return F.adaptive_avg_pool2d(masks, CELLS)


def others(count: int, random: torch.Generator) -> Tensor:
    """For each of `count` photos the number of another one; each is used once. [count]

    The photos are put in a random circle, in which each takes its predecessor.
    """
    circle = torch.randperm(count, generator=random)
    found = torch.empty_like(circle)
    found[circle] = circle.roll(1)
    return found


def spread(dataset: Dataset) -> Dataset:
    """A set, or `MOST` of its samples at equal distances."""
    count = len(dataset)
    if count <= MOST:
        return dataset
    return Subset(dataset, [count * i // MOST for i in range(MOST)])


def mean_mask(data: str, root: str) -> Tensor | None:
    """The mean of the masks of a set at 7 x 7, or None if it is not there or has none."""
    try:
        dataset = spread(open_set(data, root))
    except UserError:
        return None
    samples = parallel_map(dataset.__getitem__, range(len(dataset)))
    masks = [
        mask_map(sample["mask"][None] / 255) for sample in samples if sample["mask"] is not None
    ]
    return torch.cat(masks).mean(0, keepdim=True) if masks else None


def rungs(
    sums: Tensor, features: Tensor, masks: Tensor, mean_mask: Tensor | None, random: torch.Generator
) -> dict[str, Tensor]:
    """The maps that are compared, by name, [N or 1, 1, 7, 7].

    sums: of the maps of each caption's words, features: norms of the CNN's features, both
    [N, 1, 7, 7]. masks: [N, 1, 56, 56]. mean_mask: of the training set [1, 1, 7, 7].
    """
    share = sums / sums.sum((2, 3), keepdim=True).clamp(min=1e-9)  # the number of words cancels
    mean = share.mean(0, keepdim=True)
    maps = {"mask": mask_map(masks.float()), "centre": centre_map()}
    if mean_mask is not None:
        maps["training_masks"] = mean_mask
    return maps | {
        "features": features,
        "captioner": sums,
        "captioner_other": sums[others(len(sums), random)],
        "captioner_mean": mean,
        "captioner_less_mean": share - mean,
    }


# ---- Scores --------------------------------------------------------------------------------------
def auc(heat: Tensor, mask: Tensor) -> float:
    """The probability that a salient pixel has a higher value than another one; ties count half.

    heat: [H, W]. mask: bool [H, W], neither empty nor full.
    """
    salient = heat[mask].contiguous()
    rest = heat[~mask].sort().values
    below = torch.searchsorted(rest, salient)
    not_above = torch.searchsorted(rest, salient, right=True)
    return ((below + not_above).double().mean() / (2 * len(rest))).item()


def mean_auc(maps: Tensor, masks: Tensor) -> float:
    """Mean of `auc` over photos: maps [N or 1, 1, 7, 7], resized; masks, bool [N, 1, 56, 56]."""
    heat = F.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=False)
    heat = heat.expand(len(masks), -1, -1, -1)
    values = [auc(h[0], mask[0]) for h, mask in zip(heat, masks)]
    return sum(values) / len(values)


class Ladder:
    """What a captioner's maps have to be compared with: of every photo with a mask the sum of its
    words' maps, the norm of the CNN's features, the mask."""

    def __init__(self):
        self.rows = []

    def add(self, samples: list[dict], sums: Tensor, features: Tensor) -> None:
        """A batch: sums [B, 1, 7, 7], features [B, C, 7, 7]; empty and full masks are left out."""
        norms = features.float().norm(dim=1, keepdim=True)
        for sample, total, norm in zip(samples, sums.cpu(), norms.cpu()):
            if sample["mask"] is not None:
                mask = F.adaptive_avg_pool2d(sample["mask"] / 255, SIDE) > 0.5
                if mask.any() and not mask.all():
                    self.rows.append((total, norm, mask))

    def merge(self, world: World) -> None:
        """Join the photos of all processes."""
        self.rows = [row for part in world.gather(self.rows) for row in part]

    def report(self, title: str, mean_mask: Tensor | None, seed: int, folder: Path) -> None:
        """Print the AUC of every rung; write <folder>/maps-<title>.json."""
        if not self.rows:
            return
        sums, features, masks = (torch.stack(part) for part in zip(*self.rows))
        maps = rungs(sums, features, masks, mean_mask, generator("cpu", seed, "other maps"))
        scores = {name: mean_auc(m, masks) for name, m in maps.items()}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        say(f"AUC of 7 x 7 maps on {len(masks)} masks of {title}: {shown}")
        save_json(folder / f"maps-{title}.json", {"photos": len(masks), "auc": scores})
