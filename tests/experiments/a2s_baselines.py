"""Maps that need no training, scored like those of A2S on 140 photos of ECSSD.

    python -m tests.experiments.a2s_baselines --data-root DIR --backbone-weights FILE

A Gaussian in the middle, and the single feature map of the encoder (E3, E4 or E5) that agrees best
with the masks of 60 other photos: the best that one unit of the frozen network knows by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.backbones import backbone
from common.datasets import open_set
from common.harness import at_size
from common.metrics import Metrics, to_uint8
from common.runtime import environment
from tests.experiments.tables import TEST, options, write_table

CHOOSE = "ECSSD@data/splits/ECSSD-val60.txt"
SIDE = 160


def main() -> None:
    """Score both and write the table."""
    args = options(__doc__)
    net = backbone("mobilenet_v2", args.backbone_weights).eval()
    chosen = choose(net, args.data_root)
    gaussian, feature = Metrics(), Metrics()
    for sample in open_set(TEST, args.data_root):
        truth = sample["mask"][0] > 127
        gaussian.add(to_uint8(centred(*sample["size"])), truth)
        found = features(net, sample)[chosen]
        feature.add(to_uint8(at_size(torch.logit(found[None], 1e-6), sample)), truth)
    header = ["map", "F_mean", "F_max", "S", "MAE"]
    rows = []
    for name, metrics in (("a centred Gaussian", gaussian), ("the best single feature", feature)):
        scores = metrics.scores()
        rows.append([name, *(f"{scores[key]:.3f}".lstrip("0") for key in header[1:])])
    commit = environment(torch.device("cpu"))["commit"]
    note = "`python -m tests.experiments.a2s_baselines --data-root DIR --backbone-weights FILE`"
    write_table("docs/a2s.md", "a2s_baselines", header, rows, [f"{note}, commit {commit}"])


def centred(height: int, width: int) -> Tensor:
    """A Gaussian with a standard deviation of a fifth of each side. [H, W]"""
    y = torch.linspace(-2.5, 2.5, height)[:, None]
    x = torch.linspace(-2.5, 2.5, width)
    return torch.exp(-(x.square() + y.square()) / 2)


@torch.no_grad()
def features(net: nn.Module, sample: dict) -> Tensor:
    """All channels of E3, E4 and E5 and their opposites, each from 0 to 1, [C, 40, 40]."""
    image = F.interpolate(sample["image"][None].float() / 255, (SIDE, SIDE), mode="bilinear")
    maps = [F.interpolate(level, (40, 40), mode="bilinear") for level in net(image)[2:]]
    x = torch.cat(maps, 1)[0]  # [C / 2, 40, 40]
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-6)
    return torch.cat([x, 1 - x])


def choose(net: nn.Module, root: str) -> int:
    """The channel whose correlation with the mask is greatest, as a mean over the photos."""
    total = 0
    for sample in open_set(CHOOSE, root):
        mask = F.interpolate(sample["mask"][None] / 255, (40, 40), mode="area").flatten()
        x = features(net, sample).flatten(1)
        x = x - x.mean(1, keepdim=True)
        mask = mask - mask.mean()
        total = total + (x @ mask) / (x.norm(dim=1) * mask.norm()).clamp(min=1e-6)
    return int(total.argmax())


if __name__ == "__main__":
    main()
