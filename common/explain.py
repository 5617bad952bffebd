"""A method at work on one photo, for --explain.

photo, image, path = one_photo(args.explain, settings)
seen = outputs_of(net, ["local", "region"], image)  # what these parts of the network give
harness.panels(path, [("photo", photo), ("R_r, Eq. 10", stretched(seen["region"]))])
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from common import runtime
from common.datasets import open_photos
from common.flags import Settings
from common.harness import stack
from common.images import to_tensor
from common.runtime import UserError


def one_photo(file: Path, settings: Settings) -> tuple[Tensor, Tensor, Path]:
    """A photo, the same as the network sees it, and where its picture is drawn.

    uint8 [3, H, W]; [1, 3, S, S] in [0, 1] on the device (for pairs [1, 6, S, S]); and
    <out>/explain/<name>.png. Raises `UserError` if the photo cannot be read.
    """
    photos = open_photos(file, settings.data_root)
    if len(photos) > 1:
        raise UserError(f"--explain draws one photo, and {file} holds {len(photos)}")
    sample = photos[0]
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


def panels(path: Path, pictures: Sequence[tuple[str, Tensor]], columns: int = 5) -> None:
    """Save titled pictures in rows, all 256 pixels wide and of the first picture's aspect ratio.

    pictures: (title, [3, H, W], [1, H, W] or [H, W]); uint8, bool, or floats in [0, 1].
    Cells of a small map stay visible as squares of one colour.
    """
    width = 256
    first = pictures[0][1]
    height = round(width * first.shape[-2] / first.shape[-1])
    height = min(max(height, 1), 4 * width)  # of a very long photo
    cells = []
    for title, picture in pictures:
        scale = 255 if picture.dtype == torch.uint8 else 1
        x = picture.reshape(-1, *picture.shape[-2:]).cpu().float() / scale  # [1 or 3, H, W]
        small = x.shape[-1] < width
        mode = InterpolationMode.NEAREST if small else InterpolationMode.BILINEAR
        x = TF.resize(x, [height, width], mode).expand(3, -1, -1)
        cell = torch.cat([heading(title, width), x], 1)
        cells.append(F.pad(cell, (0, 4, 0, 4), value=1.0))  # white between the pictures

    # The last row is filled up with white.
    columns = min(columns, len(cells))
    cells += [torch.ones_like(cells[0])] * (-len(cells) % columns)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    runtime.picture_strip(path, rows, cells[0].shape[1:])


def heading(title: str, width: int) -> Tensor:
    """A white strip [3, 20, width] with a title, shortened if it is longer than the strip."""
    strip = Image.new("RGB", (width, 20), "white")
    draw = ImageDraw.Draw(strip)
    while draw.textlength(title) > width - 8:
        title = title[:-4] + "..."
    draw.text((4, 4), title, fill="black")
    return to_tensor(strip) / 255
