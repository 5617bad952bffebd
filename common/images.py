"""Reading one picture, mask or saliency map.

    load_image("photo.jpg")      photo -> uint8 [3, H, W]
    load_modality("depth.png")   depth, thermal or flow picture -> uint8 [3, H, W]
    load_mask("mask.png")        mask -> uint8 [1, H, W], 0 or 255, see `mask_of`
    load_map("map.png")          saliency map or cut-out -> 8-bit grey Pillow image

All of them turn a picture as its EXIF tag says, and take the first frame or page of a file that
holds several. They raise `UserError` with a sentence that names the file.
"""

import io
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from common.runtime import UserError, first_line

# What each value of the EXIF tag "orientation" asks for; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

HALF = 128  # grey above it is foreground, as in PySODMetrics
COLOURED = 31  # channels that differ by more are a colour, as VOC's darkest; JPEG's noise is less
WHITE = 240  # from here on a level is white with noise
FEW = 16  # up to so many levels may be numbers of labels; shades of grey are more
PAINTS = 64  # up to so many colours are paint; a photo or shaded paint has more
VOID = (224, 224, 192)  # PASCAL VOC's colour for pixels without a label


# ---- Pictures ------------------------------------------------------------------------------------
def read(path: str | Path, at_least: int | None = None) -> Image.Image:
    """Decode a picture of any format that Pillow knows and turn it upright; raises `UserError`.

    at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both
    sides keep so many pixels.
    """
    try:
        # Pillow maps a grey TIFF that it opens by name, and then loses its rows if it is turned.
        # The standard input, "-", is read whole, since Pillow goes back and forth in a file.
        opened = io.BytesIO(sys.stdin.buffer.read()) if str(path) == "-" else open(path, "rb")
        with opened as file:
            image = Image.open(file)
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            if image.mode in ("LAB", "HSV"):  # Pillow knows no way from these to grey
                image = image.convert("RGB")
            return upright(image)
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # broken files make Pillow raise errors of many kinds
        name = "the standard input" if str(path) == "-" else path
        raise UserError(f"{name} {fault(error)}") from None


def fault(error: Exception) -> str:
    """What is wrong with a file, and what to do, by the exception that reading it raised."""
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        return (
            f"has more than {limit} million pixels and may be a decompression bomb: make it "
            "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture that Pillow reads; fetch it again, convert it, or remove it"
    if isinstance(error, OSError) and error.errno:  # from the system, not from the decoder
        return f"cannot be read ({error.strerror}); check its place and its permissions"
    return f"is damaged ({first_line(error)}); fetch it again or remove it"


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF tag says.

    `ImageOps.exif_transpose` also writes the other tags back, which fails for odd ones.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # an unreadable tag asks for nothing
        turn = None
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image, stretch_below: float = 0) -> Image.Image:
    """Grey of 16 bits or floating point, which Pillow's convert() would clip at 255, as 8 bits.

    Values go from 0 to 65,535 (floating point: to 1, 255 or 65,535, whichever holds them) and are
    scaled to 255. If all would then be below `stretch_below`, they are a sensor's numbers, such as
    millimetres: the smallest above 0 becomes 1, the largest 255, and 0, "not measured", stays 0.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    high = values.max()
    low = values[values > 0].min(initial=high)
    top = 65535
    if image.mode == "F" and high <= 255:
        top = 1 if high <= 1 else 255
    if low < high < stretch_below * top / 255:
        values = np.where(values > 0, 1 + (values - low) * 254 / (high - low), 0)
    else:
        values = values * (255 / top)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def load_image(
    path: str | Path, stretch_below: float = 64, at_least: int | None = None
) -> torch.Tensor:
    """A picture of any mode -> uint8 [3, H, W] without alpha; raises `UserError`.

    16-bit grey is divided by 257, unless it would be too dark for a photo, see `eight_bits`.
    at_least: see `read`.
    """
    return to_tensor(eight_bits(read(path, at_least), stretch_below))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A Pillow picture of any 8-bit mode -> uint8 [3, H, W] without alpha."""
    pixels = np.array(image.convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_modality(path: str | Path) -> torch.Tensor:
    """A depth, thermal or flow picture -> uint8 [3, H, W]; 16 bits are always stretched."""
    return load_image(path, stretch_below=float("inf"))


def load_map(path: str | Path) -> Image.Image:
    """A saliency map -> 8-bit grey, mode "L"; a cut-out by its alpha.

    Raises `UserError`, also for a picture in colours and for values that are negative or NaN.
    """
    image = read(path)
    alpha = alpha_of(image)
    if alpha is not None:
        return alpha
    if image.mode == "F" and not (np.isfinite(image) & (np.asarray(image) > -0.01)).all():
        raise UserError(
            f"{path} holds negative values or such that are no numbers; the values of a map go "
            "from 0 to 1, 255 or 65,535"
        )
    image = eight_bits(image)
    if image.mode != "L" and is_coloured(image):
        raise UserError(
            f"{path} is a picture in colours, whose brightness is no saliency; save the map in "
            "grey, or a cut-out with the map in its alpha channel"
        )
    return image.convert("L")


# ---- Masks ---------------------------------------------------------------------------------------
def load_mask(path: str | Path) -> torch.Tensor:
    """A mask -> uint8 [1, H, W], 0 background and 255 foreground, see `mask_of`."""
    inside = mask_of(read(path), path)
    return torch.from_numpy(inside.astype(np.uint8) * 255)[None]


def mask_of(image: Image.Image, path: str | Path) -> np.ndarray:
    """The foreground of a decoded mask, bool [H, W]; an empty or a full one is legal.

    What it holds is decided by the set of its values:

    alpha   An alpha channel that is not the same everywhere is the mask.
    colour  Paint on black: every pixel that is not black is foreground. A palette is read by its
            colours, in whatever order; one without black must have the background at index 0, its
            darkest colour.
    grey    Two levels, whatever they are: the lighter is foreground. More levels are shades, with
            foreground above 128 of 255, unless they may be numbers of labels, see `may_be_labels`.

    Raises `UserError` where this does not decide: label numbers, a void label, a photo.
    """
    numbers = image.mode in ("L", "F") or image.mode.startswith("I")
    if numbers or image.mode == "P" and not shows_indices(image):
        return grey_mask(np.asarray(image), path)

    coloured = is_coloured(image)
    grey = np.asarray(image.convert("L"))
    alpha = alpha_of(image)
    if alpha is None:
        return paint_mask(image, path) if coloured else grey_mask(grey, path)

    inside = grey_mask(np.asarray(alpha), path)
    levels = np.unique(grey)
    if not coloured and len(levels) == 2 and ((grey == levels[1]) != inside).any():
        raise unclear(path, "two different masks, one in its alpha channel and one in grey", levels)
    return inside


def is_coloured(image: Image.Image) -> bool:
    """Whether any pixel is not grey, apart from noise."""
    channels = combinations(image.convert("RGB").split(), 2)
    return max(ImageChops.difference(*pair).getextrema()[1] for pair in channels) > COLOURED


def is_photo(path: str | Path) -> bool:
    """Whether a picture holds more colours than a mask may; False if it cannot be read."""
    try:
        image = read(path).convert("RGB")
    except UserError:
        return False
    return is_coloured(image) and image.getcolors(256) is None


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The alpha channel as 8-bit grey if it carries a mask, else None.

    It carries none if it is the same everywhere; but an invisible picture of one colour is empty.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa"):
        return None
    alpha = image.getchannel(image.getbands()[-1])
    low, high = alpha.getextrema()
    invisible = high == 0 and image.convert("RGB").getcolors(1) is not None
    return alpha if low < min(high, WHITE) or invisible else None


def shows_indices(image: Image.Image) -> bool:
    """Whether a palette has a colour for every index that is used, and its darkest only once."""
    used = np.unique(image)
    colours = np.reshape(image.getpalette() or [], (-1, 3)).tolist()
    if used[-1] >= len(colours):
        return False
    colours = [colours[index] for index in used]
    return colours.count(min(colours, key=max)) == 1


def paint_mask(image: Image.Image, path: str | Path) -> np.ndarray:
    """The foreground of a coloured mask, bool [H, W]; see `mask_of`."""
    rgb = image.convert("RGB")
    counted = rgb.getcolors(PAINTS)
    if counted is None:
        raise unclear(path, f"more than {PAINTS} colours", ["as a photo or shaded paint does"])
    colours = [colour for _, colour in counted]

    # The background is black, or the first entry of a palette if no entry is darker.
    background = min(colours, key=max)
    if max(background) > COLOURED:
        first = image.getpalette()[:3] if image.mode == "P" else []
        if not first or max(first) > max(background):
            raise unclear(path, "colours without a black background", colours)
        background = first

    # A void label is neither foreground nor background.
    last = image.mode == "P" and np.max(image) == 255
    if VOID in colours or last and len(colours) > 2:
        raise unclear(path, "a void label", colours)
    away = np.abs(np.asarray(rgb).astype(int) - background).max(2)
    return away > (COLOURED if max(background) <= COLOURED else 0)


def grey_mask(values: np.ndarray, path: str | Path) -> np.ndarray:
    """The foreground of a mask of numbers [H, W] of any type, bool; see `mask_of`."""
    levels = np.unique(values)
    if not np.isfinite(levels).all():
        raise unclear(path, "values that are not finite numbers", levels)

    # The range is that of 8 bits, of 16 if a value needs it, or from 0 to 1.
    top = 1 if levels[-1] <= 1 else 255 if levels[-1] <= 255 else 65535
    grey = np.rint(levels * (255 / top))
    if len(levels) == 1 and 0 < grey[0] <= HALF:
        raise unclear(path, "one level of grey, neither black nor white", levels)
    if len(levels) == 2 and grey[0] < WHITE:
        return values == levels[1]
    if len(levels) > 2 and may_be_labels(values, levels, grey):
        raise unclear(path, "levels that may be numbers of labels", levels)
    return np.isin(values, levels[grey > HALF])


def may_be_labels(values: np.ndarray, levels: np.ndarray, grey: np.ndarray) -> bool:
    """Whether three or more levels, which are `grey` of 255, may be numbers rather than shades.

    They may if none is above half; if none is white and they are few, or half cuts off most of the
    object, of which only JPEG's noise is brighter; or if below a single white there are only dark
    ones that cover much: 0, 1, 255 are labels with a void border. Twelfths of 255 are shades:
    PASCAL-S stores how many of twelve viewers chose an object.
    """
    twelfths = grey / (255 / 12)
    rounded = (np.abs(twelfths - np.rint(twelfths)) < 12 / 255).all()  # up or down
    if rounded and len(np.unique(grey)) == len(grey):
        return False
    if grey[-1] <= HALF:
        return True
    if grey[-1] < WHITE:
        bright = np.isin(values, levels[grey > HALF])
        noise = (values > levels[-1] / 2).sum() > 2 * bright.sum()
        return noise or len(levels) <= FEW
    if len(levels) > FEW:
        return False
    between = (values > levels[0]) & (values < levels[-1])
    return grey[-2] < HALF / 2 and between.sum() > (values == levels[-1]).sum() / 10


def unclear(path: str | Path, what: str, values: Sequence) -> UserError:
    """The error for a mask that cannot be decided: file, values found, what to do."""
    shown = ", ".join(str(value) for value in values[:6])
    more = ", …" if len(values) > 6 else ""
    return UserError(
        f"{path} holds {what} ({shown}{more}), so its foreground cannot be told; save it as black "
        "for the background and white for the foreground"
    )
