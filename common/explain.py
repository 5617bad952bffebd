"""A method at work on one photo, for --explain.

photo, image, path = one_photo(args.explain, settings)
seen = outputs_of(net, ["local", "region"], image)  # what these parts of the network give
harness.panels(path, [("photo", photo), ("R_r, Eq. 10", stretched(seen["region"]))])
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.datasets import open_photos
from common.flags import Settings
from common.harness import stack


def one_photo(file: Path, settings: Settings) -> tuple[Tensor, Tensor, Path]:
    """A photo, the same as the network sees it, and where its picture is drawn.

    uint8 [3, H, W]; [1, 3, S, S] in [0, 1] on the device (for pairs [1, 6, S, S]); and
    <out>/explain/<name>.png. Raises `UserError` if the photo cannot be read.
    """
    sample = open_photos(file, settings.data_root)[0]
    path = settings.out / "explain" / f"{Path(sample['name']).name}.png"
    return sample["image"], stack([sample], settings), path


@torch.no_grad()
def outputs_of(net: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, Tensor]:
    """What the parts of a network give when it sees `image`, by their names in the network."""
    seen = {}
    hooks = []
    for name in names:

        def keep(part: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
            seen[name] = output

        hooks.append(net.get_submodule(name).register_forward_hook(keep))
    net.eval()
    net(image)
    for hook in hooks:
        hook.remove()
    return seen


def stretched(x: Tensor) -> Tensor:
    """The mean over the channels with its range stretched to [0, 1]: [1, C, h, w] -> [1, h, w]."""
    x = x.float().mean(1)
    x = x - x.min()
    return x / x.max().clamp(min=1e-12)
