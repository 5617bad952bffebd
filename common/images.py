"""Reading one picture or mask."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common.runtime import UserError


def read(path: str | Path) -> Image.Image:
    """Decode a picture and turn it as its EXIF tag says; raises `UserError`."""
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # broken files make Pillow raise errors of many kinds
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot read {path} ({reason}); fetch it again or remove it") from None


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's convert() would clip at 255, scaled to 8 bits."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float32) / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def load_grey(path: str | Path) -> Image.Image:
    """A picture of any mode as 8-bit grey, mode "L"; raises `UserError`."""
    image = eight_bits(read(path))
    return image if image.mode == "L" else image.convert("L")


def load_image(path: str | Path) -> torch.Tensor:
    """A picture of any mode -> uint8 [3, H, W] without alpha; raises `UserError`."""
    image = eight_bits(read(path)).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_mask(path: str | Path) -> torch.Tensor:
    """A mask -> uint8 [1, H, W], 0 background and 255 foreground; raises `UserError`.

    Foreground is grey above 128 (of 255), for JPEG masks are noisy and PASCAL-S has grey levels;
    above 0 where the largest value is 1, and in a coloured palette, whose indices number objects.
    16-bit values, if the largest exceeds 255, are compared as rounded to 8 bits.
    """
    image = read(path)
    coloured = False
    if image.mode == "P":
        used = np.array(image.getpalette("RGB")).reshape(-1, 3)[np.unique(image)]
        coloured = bool((used != used[:, :1]).any())
    values = np.asarray(image if coloured or image.mode[0] == "I" else image.convert("L"))
    level = 128.5 * 257 if values.max() > 255 else 0 if coloured or values.max() == 1 else 128
    return torch.from_numpy((values > level).astype(np.uint8) * 255)[None]


def load_map(path: str | Path) -> Image.Image:
    """A saliency map of any mode -> 8-bit grey, mode "L"; a cut-out is read by its alpha."""
    image = read(path)
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        return image.getchannel("A")
    return load_grey(path)
